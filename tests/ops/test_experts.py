"""Routed experts: all versions against the sum over tokens in float64; the router against its five lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import experts, rows
from blockpress.ops.cpu import bridge
from tests.ops.draws import threads

VERSIONS = {
    "loop": experts.moe_loop,
    "every": experts.moe_dense,
    "ordered": experts.ordered,
    "mix": experts.moe_forward,
}
CASES = [(1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (16, 3)]


def inputs(count: int, top_k: int, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count * 10 + top_k)
    scores = torch.randn(tokens, count, generator=generator)
    weights, chosen = experts.route(scores, top_k, torch.rand(count, generator=generator) + 0.5)
    gate_up = torch.randn(count, 2 * 5, 6, generator=generator) * 6**-0.5
    down = torch.randn(count, 6, 5, generator=generator) * 5**-0.5
    return torch.randn(tokens, 6, generator=generator), weights, chosen, gate_up, down


def truth(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token].double(), chosen[token].tolist(), strict=True):
            both = gate_up[expert].double() @ x[token].double()
            half = len(both) // 2
            out[token] += weight * (down[expert].double() @ (F.gelu(both[:half], approximate="tanh") * both[half:]))
    return out


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("count", "top_k"), CASES)
def test_every_version_follows_the_definition(version: str, count: int, top_k: int):
    given = inputs(count, top_k)
    torch.testing.assert_close(VERSIONS[version](*given).double(), truth(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "top_k"), CASES)
def test_gradients_agree(count: int, top_k: int):
    gradients = []
    for version in (experts.moe_loop, experts.moe_dense):
        x, weights, chosen, gate_up, down = inputs(count, top_k)
        leaves = [leaf.requires_grad_() for leaf in (x, weights, gate_up, down)]
        version(x, weights, chosen, gate_up, down).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for loop, every in zip(*gradients, strict=True):
        torch.testing.assert_close(loop, every, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("count", [4, 16])
def test_bfloat16_agrees_within_its_rounding(version: str, count: int):
    x, weights, chosen, gate_up, down = inputs(count, 2)
    x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    got = VERSIONS[version](x, weights, chosen, gate_up, down)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), truth(x, weights, chosen, gate_up, down), rtol=0.05, atol=0.05)


def wide(count: int, top_k: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In bfloat16; the first experts are chosen far more often than the last, which nobody takes."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, count, generator=draw) - torch.arange(count) * 0.5
    scores[:, -1] = -100.0
    weights, chosen = experts.route(scores, top_k, torch.rand(count, generator=draw) + 0.5)
    gate_up = (torch.randn(count, 2 * 32, 96, generator=draw) * 96**-0.5).bfloat16()
    down = (torch.randn(count, 96, 32, generator=draw) * 32**-0.5).bfloat16()
    return torch.randn(tokens, 96, generator=draw).bfloat16(), weights, chosen, gate_up, down


HALF = torch.ones(1, 32, 32, dtype=torch.bfloat16)
with torch.inference_mode():
    in_cpp = pytest.mark.skipif(bridge.for_product(HALF, HALF) is None, reason="no C++ compiler, or torch is faster")


@in_cpp
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 300])
@pytest.mark.parametrize("top_k", [1, 3])
@torch.inference_mode()
def test_bfloat16_in_cpp_is_no_less_exact_than_the_plain_version(tokens: int, top_k: int):
    given = wide(5, top_k, tokens, seed=tokens)
    got, plain, wanted = (
        experts.moe_forward(*given).double(),
        experts.moe_loop(*given).double(),
        truth(*(x.float() if x.is_floating_point() else x for x in given)),
    )
    assert (got - wanted).norm() <= 1.05 * (plain - wanted).norm()


@in_cpp
@torch.inference_mode()
def test_bfloat16_in_cpp_does_not_depend_on_threads_or_neighbours():
    x, weights, chosen, gate_up, down = wide(5, 2, 200)
    whole = experts.moe_forward(x, weights, chosen, gate_up, down)
    with threads(2):
        assert torch.equal(experts.moe_forward(x, weights, chosen, gate_up, down), whole)
    some = torch.tensor([7, 3, 150])
    assert torch.equal(experts.moe_forward(x[some], weights[some], chosen[some], gate_up, down), whole[some])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_sorted_tokens_give_what_the_loop_gives(native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    if not native:
        monkeypatch.setattr(rows, "_library", lambda: None)
        monkeypatch.setattr(bridge, "supports", lambda x: False)
    x, weights, chosen, gate_up, down = wide(5, 2, 100)
    given = x.to(dtype), weights, chosen, gate_up.to(dtype), down.to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03}
    torch.testing.assert_close(experts.ordered(*given), experts.moe_loop(*given), **close)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_router_picks_and_weighs_by_the_definition(top_k: int):
    generator = torch.Generator().manual_seed(top_k)
    scores, scale = torch.randn(9, 5, generator=generator) * 3, torch.rand(5, generator=generator) + 0.5
    weights, chosen = experts.route(scores, top_k, scale)
    for token in range(9):
        odds = scores[token].double().exp()
        best = sorted(range(5), key=lambda expert: -float(odds[expert]))[:top_k]
        assert chosen[token].tolist() == best
        wanted = odds[best] / odds[best].sum() * scale[best].double()
        torch.testing.assert_close(weights[token].double(), wanted, rtol=1e-6, atol=1e-7)
