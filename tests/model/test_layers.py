"""The parts of a layer against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from blockpress.config import ModelConfig
from blockpress.model.layers import GatedMLP, Linear, SelfConditioning
from blockpress.model.network import CachedAttention, Network
from blockpress.ops import attention
from blockpress.ops.rope import inverse_frequencies, rotary_tables, rotate


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5


@pytest.fixture(scope="module")
def network(tiny: ModelConfig, random_network) -> Network:  # type: ignore[no-untyped-def]
    return random_network(tiny, seed=4)


def test_the_gated_mlp_follows_the_formula():
    mlp = GatedMLP(6, 10)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    gate, up, down = (part.weight.double() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    wanted = (F.gelu(x.double() @ gate.T, approximate="tanh") * (x.double() @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x).double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_router_reads_a_normed_scaled_input(network: Network):
    router = network.layers[0].router
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)) * 5
    weights, chosen = router(x)
    scores = (rms(x.double()) * router.scale.double() * 32**-0.5) @ router.proj.weight.double().T
    best = scores.softmax(-1).topk(2)
    assert torch.equal(chosen, best.indices)
    share = best.values / best.values.sum(-1, keepdim=True) * router.per_expert_scale.double()[best.indices]
    torch.testing.assert_close(weights.double(), share, rtol=1e-5, atol=1e-6)


def test_full_layers_have_no_v_proj_and_sliding_ones_do(network: Network):
    names = [name for name in network.state_dict() if "v_proj" in name]
    assert names == ["layers.0.self_attn.v_proj.weight"]


@pytest.mark.parametrize("index", [0, 1], ids=["sliding", "full"])
def test_attention_follows_the_formula(network: Network, index: int):
    """Normed queries and keys, turned by their places; values normed without a weight; no 1/sqrt(dim)."""
    part, sizes = network.layers[index].self_attn, network.config.layers[index]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    rotary = rotary_tables(
        torch.arange(5)[None], inverse_frequencies(network.config.rope(sizes.kind), part.dim), x.dtype
    )
    look = CachedAttention(None, None, attention.plain)
    got = part(x[None], rotary, look)
    kept_key, kept_value = look.new_kv

    def heads(projection: Linear) -> torch.Tensor:
        return (x @ projection.weight.T).view(5, -1, part.dim).transpose(0, 1)[None]

    query, key = rms(heads(part.q_proj)) * part.q_norm.weight, rms(heads(part.k_proj)) * part.k_norm.weight
    query, key = rotate(query, *rotary), rotate(key, *rotary)
    value = rms(heads(part.v_proj if sizes.sliding else part.k_proj))
    torch.testing.assert_close(kept_key, key, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept_value, value, rtol=1e-5, atol=1e-5)
    own = [head // (4 // sizes.kv_heads) for head in range(4)]
    mixed = torch.softmax(query[0] @ key[0, own].transpose(1, 2), dim=-1) @ value[0, own]
    wanted = mixed.transpose(0, 1).flatten(1) @ part.o_proj.weight.T
    torch.testing.assert_close(got[0], wanted, rtol=1e-4, atol=1e-5)


def test_self_conditioning_norms_without_weight_even_a_zero_signal(tiny: ModelConfig, network: Network):
    part = network.self_conditioning
    embedded, signal = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part(embedded, torch.zeros_like(signal)), rms(embedded), rtol=1e-5, atol=1e-6)
    normed = rms(signal) * part.pre_norm.weight
    told = part.down_proj(F.gelu(part.gate_proj(normed), approximate="tanh") * part.up_proj(normed))
    torch.testing.assert_close(part(embedded, signal), rms(embedded + told), rtol=1e-5, atol=1e-6)


def test_self_conditioning_has_the_size_of_the_dense_mlp(tiny: ModelConfig):
    shapes = {name: tuple(x.shape) for name, x in SelfConditioning(tiny).named_parameters()}
    assert shapes == {
        "pre_norm.weight": (32,),
        "gate_proj.weight": (48, 32),
        "up_proj.weight": (48, 32),
        "down_proj.weight": (32, 48),
    }


def test_the_whole_layer_is_scaled_at_its_end(tiny: ModelConfig, random_network):  # type: ignore[no-untyped-def]
    layer = random_network(tiny, seed=1).layers[1]
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    rotary = (torch.ones(1, 1, 3, 16), torch.zeros(1, 1, 3, 16))
    outputs = {
        causal: layer(x, rotary, CachedAttention(None, None, attention.plain), causal=causal)
        for causal in (True, False)
    }
    ratio = layer.causal_scalar / layer.layer_scalar
    torch.testing.assert_close(outputs[True], outputs[False] * ratio, rtol=1e-5, atol=1e-6)
    assert not torch.equal(outputs[True], outputs[False])
