"""Routed experts: all versions against the sum over tokens in float64; the router against its five lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import experts

VERSIONS = {"loop": experts.loop, "every": experts.every, "mix": experts.mix}
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
def test_the_definition(version: str, count: int, top_k: int):
    given = inputs(count, top_k)
    torch.testing.assert_close(VERSIONS[version](*given).double(), truth(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "top_k"), CASES)
def test_gradients_agree(count: int, top_k: int):
    gradients = []
    for version in (experts.loop, experts.every):
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


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_router(top_k: int):
    generator = torch.Generator().manual_seed(top_k)
    scores, scale = torch.randn(9, 5, generator=generator) * 3, torch.rand(5, generator=generator) + 0.5
    weights, chosen = experts.route(scores, top_k, scale)
    for token in range(9):
        odds = scores[token].double().exp()
        best = sorted(range(5), key=lambda expert: -float(odds[expert]))[:top_k]
        assert chosen[token].tolist() == best
        wanted = odds[best] / odds[best].sum() * scale[best].double()
        torch.testing.assert_close(weights[token].double(), wanted, rtol=1e-6, atol=1e-7)
