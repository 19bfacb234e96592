"""The rates against their closed form, and which rule gets which parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blockpress.config import ModelConfig
from blockpress.errors import ConfigError
from blockpress.model import Network
from blockpress.train.optimizer import Muon, OptimizerConfig, build_average, build_optimizers, orthogonal, set_rates


@given(st.integers(1, 200), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_warms_up_stays_and_decays_linearly(steps: int, warmup: int, decay: float, final: float):
    config = OptimizerConfig(warmup=warmup, decay=decay, final=final)
    for step in range(steps):
        warm = 1.0 if step + 1 >= warmup else (step + 1) / warmup
        remaining = (steps - step) / steps
        falling = 1.0 if remaining >= decay else remaining / decay
        assert config.factor(step, steps) == pytest.approx(warm * (final + (1 - final) * falling))


def test_the_first_rate_is_not_zero_and_the_last_is_above_the_end():
    config = OptimizerConfig(warmup=100, decay=0.5, final=0.1)
    assert config.factor(0, 1000) == pytest.approx(0.01)
    assert config.factor(500, 1000) == 1
    assert config.factor(999, 1000) == pytest.approx(0.1 + 0.9 / 500)
    assert OptimizerConfig(warmup=0, decay=0.0).factor(0, 10) == OptimizerConfig(warmup=0, decay=0.0).factor(9, 10) == 1


@pytest.mark.parametrize("muon_rate", [None, 1e-2])
def test_every_parameter_has_one_optimizer(small: ModelConfig, muon_rate: float | None):
    network = Network(small)
    optimizers = build_optimizers(network, OptimizerConfig(rate=2e-3, muon_rate=muon_rate))
    owners = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    assert sorted(sum(owners, [])) == sorted(id(p) for p in network.parameters())
    if muon_rate is None:
        assert len(owners) == 1
        return
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    adam, muon = ({names[parameter] for parameter in owned} for owned in owners)
    assert {name.split(".")[-2] for name in muon} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert {"embed_tokens.weight", "layers.0.experts.gate_up_proj", "layers.1.router.proj.weight"} <= adam


def test_rates_scale_the_full_ones(small: ModelConfig):
    optimizers = build_optimizers(Network(small), OptimizerConfig(rate=2e-3, muon_rate=1e-2))
    set_rates(optimizers, 0.5)
    set_rates(optimizers, 0.25)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [5e-4, 2.5e-3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate", 0.0),
        ("rate", float("nan")),
        ("muon_rate", 0.0),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("weight_decay", -1.0),
        ("warmup", -1),
        ("decay", 1.5),
        ("final", -0.5),
        ("clip", 0.0),
        ("ema", 0.0),
        ("ema", 1.0),
    ],
)
def test_a_bad_optimizer_is_refused_by_name(field: str, value: object):
    with pytest.raises(ConfigError, match=field) as caught:
        OptimizerConfig(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in caught.value.message


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 1000))
def test_orthogonalisation_keeps_singular_vectors(rows: int, columns: int, seed: int):
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    got = left.mT @ orthogonal(x) @ right.mT
    sizes = sizes / x.norm(dim=(1, 2))[:, None]
    found = got.diagonal(dim1=1, dim2=2)
    assert torch.allclose(got, torch.diag_embed(found), atol=1e-6)
    # Five steps bring up what is above a fiftieth of the whole; smaller ones stay small.
    assert ((found > 0.6) & (found < 1.3))[sizes > 0.02].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_equals_torch_muon(dtype: torch.dtype):
    """torch's computes in bfloat16, so it is no nearer to ours than bfloat16 goes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (16, 16), (24, 16)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    one = Muon(ours, lr=1e-2, momentum=0.9, weight_decay=0.1, dtype=dtype)
    other = torch.optim.Muon(theirs, lr=1e-2, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, their in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            their.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, their, start in zip(ours, theirs, starts, strict=True):
        moved = (their - start).norm()
        assert (mine - their).norm() < 0.03 * moved
    assert {name for state in one.state.values() for name in state} == {"momentum_buffer"}


def test_the_average_follows_the_weights(small: ModelConfig):
    network = Network(small)
    average = build_average(network, 0.75)
    with torch.no_grad():
        network.norm.weight.fill_(4.0)
        average.update_parameters(network)  # the first is taken whole
        network.norm.weight.fill_(8.0)
        average.update_parameters(network)
    assert average.module.norm.weight.tolist() == pytest.approx([5.0] * small.hidden_size)
