"""Attention: both versions against one another and against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockpress.ops import attention

VERSIONS = {"plain": attention.plain, "grouped": attention.grouped, "fused": attention.fused}


@pytest.fixture(autouse=True, params=[True, False], ids=["gradients", "inference"])
def gradients(request: pytest.FixtureRequest):
    """`grouped` is `plain` where gradients are wanted, and something else where they are not."""
    with torch.set_grad_enabled(request.param):
        yield request.param


def inputs(heads: int, kv_heads: int, queries: int = 5, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    shapes = [(2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def truth(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.zeros(query.shape, dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            own = key[row, head // groups].double(), value[row, head // groups].double()
            for place in range(query.shape[2]):
                seen = slice(None) if mask is None else mask[row % len(mask), place]
                weights = torch.softmax(own[0][seen] @ query[row, head, place].double(), dim=0)
                out[row, head, place] = weights @ own[1][seen]
    return out


def masks(queries: int = 5, keys: int = 9) -> dict[str, Tensor | None]:
    some = torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(7)) < 0.4
    some[:, :, 3] = True
    return {"none": None, "own": some, "shared": some[:1]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mask", ["none", "own", "shared"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_every_version_follows_the_definition(version: str, mask: str, heads: int, kv_heads: int):
    query, key, value = inputs(heads, kv_heads)
    got = VERSIONS[version](query, key, value, masks()[mask])
    torch.testing.assert_close(got.double(), truth(query, key, value, masks()[mask]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["none", "own", "shared"])
def test_gradients_agree(mask: str, gradients: bool):
    if not gradients:
        return
    found = []
    for version in VERSIONS.values():
        leaves = [x.requires_grad_() for x in inputs(4, 2)]
        version(*leaves, masks()[mask]).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for plain, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_masked_keys_have_no_influence(version: str):
    query, key, value = inputs(4, 2)
    mask = torch.ones(1, 5, 9, dtype=torch.bool)
    mask[:, :, 6:] = False
    before = VERSIONS[version](query, key, value, mask)
    key[:, :, 6:], value[:, :, 6:] = 50.0, -1e6
    assert torch.equal(VERSIONS[version](query, key, value, mask), before)


def test_bfloat16_agrees_within_its_rounding():
    query, key, value = (x.bfloat16() for x in inputs(4, 2))
    wanted = truth(query, key, value, None)
    for version in VERSIONS.values():
        got = version(query, key, value, None)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, rtol=0.03, atol=0.03)
