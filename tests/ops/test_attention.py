"""Attention: all versions against one another and against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import attention, compiled, rows

VERSIONS = {"plain": attention.plain, "grouped": attention.grouped, "fused": attention.fused}


@pytest.fixture(autouse=True, params=[True, False], ids=["gradients", "inference"])
def gradients(request: pytest.FixtureRequest):
    """`grouped` overwrites its scores where no gradients are wanted."""
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


built = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    seen=st.integers(1, 70), masks=st.sampled_from([0, 1, 4]), heads=st.sampled_from([2, 4]), seed=st.integers(0, 99)
)
def test_gradients_of_any_size_and_type_agree(dtype: torch.dtype, seen: int, masks: int, heads: int, seed: int):
    """With queries that see no key, too: padding does."""
    shapes = (4, heads, 5, 8), (4, 2, seen, 8), (4, 2, seen, 8)
    mask = torch.rand(masks, 5, seen, generator=torch.Generator().manual_seed(seed)) < 0.4 if masks else None
    found = []
    for version in (attention.plain, attention.grouped):
        leaves = [numbers(*shape, dtype=dtype, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes)]
        with torch.enable_grad():
            assert rows.differentiates(leaves[0])
            version(*leaves, mask).backward(numbers(4, heads, 5, 8, dtype=dtype, seed=seed + 3))
        found.append([leaf.grad for leaf in leaves])
    for plain, grouped in zip(*found, strict=True):
        size = max(1.0, float(plain.abs().max()))  # smaller ones are differences of numbers of that size
        torch.testing.assert_close(grouped, plain, rtol=0, atol=size * (5e-2 if dtype == torch.bfloat16 else 5e-6))


@built
@pytest.mark.parametrize("masks", [0, 1, 3])
def test_the_one_pass_softmax_is_an_operator_that_torch_can_compile(masks: int, gradients: bool):
    mask = torch.rand(masks, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.7 if masks else None
    scores = numbers(3, 2, 4, 9, dtype=torch.bfloat16, seed=1).requires_grad_(gradients)
    assert set(torch.library.opcheck(torch.ops.blockpress.softmax.default, (scores, mask)).values()) == {"SUCCESS"}


@built
def test_no_float32_scores_are_kept_for_the_gradients(gradients: bool):
    if not gradients:
        return
    leaves = [numbers(1, 2, 6, 8, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in range(3)]
    kept: dict[str, list[torch.dtype]] = {"plain": [], "grouped": []}
    for name, found in kept.items():
        with torch.autograd.graph.saved_tensors_hooks(lambda x, found=found: found.append(x.dtype) or x, lambda x: x):
            VERSIONS[name](*leaves, torch.ones(1, 6, 6, dtype=torch.bool))
    assert torch.float32 in kept["plain"] and torch.float32 not in kept["grouped"]


@built
@pytest.mark.slow  # torch's compiler, which cannot trace the checks of shapes either
def test_what_torch_compiles_has_the_operator_once_the_library_is_loaded():
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph.code)
        return graph.forward

    query, key, value = inputs(4, 2)
    assert rows.load_library()
    got = torch.compile(attention.grouped, backend=backend)(query, key, value, None)
    assert "blockpress.softmax" in graphs[0]
    torch.testing.assert_close(got, attention.plain(query, key, value, None), rtol=1e-5, atol=1e-6)
