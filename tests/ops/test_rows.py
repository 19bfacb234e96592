"""The one-pass versions in C++ against the plain ones in torch, of any size and layout, in float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import attention, compiled, geglu, norm, rope, rows

pytestmark = [
    pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("no_gradients"),
]
TYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, size: float = 2.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def same(got: Tensor, wanted: Tensor) -> None:
    """Equal within float rounding: in bfloat16 nearly all values to the last bit, the others in the last."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if got.dtype == torch.bfloat16:
        assert (got != wanted).float().mean() <= 0.01 + 1 / got.numel()
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-6)
    else:
        torch.testing.assert_close(got, wanted, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@given(size=st.integers(1, 70), count=st.integers(1, 9), weighted=st.booleans(), seed=st.integers(0, 99))
def test_native_rms_norm_equals_plain(dtype: torch.dtype, size: int, count: int, weighted: bool, seed: int) -> None:
    x, weight = numbers(count, size, dtype=dtype, seed=seed), numbers(size, dtype=dtype) if weighted else None
    assert rows.supports(x, weight)
    same(norm.rms_norm(x, weight, 1e-6), norm.plain(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", TYPES)
def test_native_rms_norm_of_heads_keeps_strides(dtype: torch.dtype) -> None:
    whole = numbers(2, 7, 3 * 24, dtype=dtype).unflatten(-1, (3, 24)).transpose(1, 2)
    for x in (whole, whole[:, :, 2:], whole[:, 1:]):
        same(rows.rms_norm(x, None, 1e-6), norm.plain(x, None, 1e-6))
    assert rows.rms_norm(whole, None, 1e-6).stride() == whole.stride()


@pytest.mark.parametrize("dtype", TYPES)
@given(size=st.integers(1, 70), count=st.integers(1, 9), spread=st.sampled_from([0.1, 2.0, 30.0]))
def test_native_geglu_equals_plain(dtype: torch.dtype, size: int, count: int, spread: float) -> None:
    gate, up = numbers(count, 3, 2 * size, dtype=dtype, size=spread).chunk(2, dim=-1)
    got, wanted = geglu.geglu(gate, up).double(), geglu.plain(gate, up).double()
    # 1 + tanh is a difference for a negative gate: what is left of it is 6e-8 and its multiples.
    allowed = 2e-7 * (gate.double() * up.double()).abs() + (2**-7 if dtype == torch.bfloat16 else 3e-6) * wanted.abs()
    assert ((got - wanted).abs() <= allowed + 1e-9).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("dim", [4, 16, 64, 72])
def test_native_rotate_equals_plain(dtype: torch.dtype, dim: int, skip: int) -> None:
    x = numbers(2, 9 - skip, 3 * dim, dtype=dtype).unflatten(-1, (3, dim)).transpose(1, 2)
    turns = torch.rand(dim // 2, generator=torch.Generator().manual_seed(1))
    cos, sin = rope.rotary_tables(torch.arange(18).view(2, 9), turns, dtype)
    same(rope.rotate(x, cos[:, :, skip:], sin[:, :, skip:]), rope.plain(x, cos[:, :, skip:], sin[:, :, skip:]))


@pytest.mark.parametrize("dtype", TYPES)
@given(seen=st.integers(1, 70), kind=st.sampled_from(["none", "own", "shared", "row", "two"]), seed=st.integers(0, 99))
def test_native_softmax_equals_torch(dtype: torch.dtype, seen: int, kind: str, seed: int) -> None:
    scores = numbers(4, 2, 5, seen, dtype=dtype, seed=seed, size=4.0)
    shape = {"own": (4, 5), "shared": (1, 5), "row": (4, 1), "two": (2, 5), "none": (1, 1)}[kind]
    drawn = torch.rand(*shape, seen, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = None if kind == "none" else drawn.expand(-1, 5, -1)
    hidden = (
        scores
        if mask is None
        else scores.masked_fill(~mask.repeat(4 // len(mask), 1, 1)[:, None], torch.finfo(dtype).min)
    )
    wanted = torch.softmax(hidden, dim=-1, dtype=torch.float32).to(dtype)
    same(attention.softmax(scores.clone(), mask), wanted)


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf):
        scores = numbers(1, 1, 3, 20, dtype=dtype)
        scores[0, 0, 1, 17] = bad
        got = attention.softmax(scores.clone(), None)
        assert got[0, 0, 1].isnan().all() and not got[0, 0, ::2].isnan().any()
        assert norm.rms_norm(scores, None, 1e-6)[0, 0, 1].isnan().any()
        assert not norm.rms_norm(scores, None, 1e-6)[0, 0, ::2].isnan().any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [3, 16, 50])
def test_native_weigh_equals_plain(dtype: torch.dtype, size: int) -> None:
    y, weights = numbers(12, size, dtype=dtype), numbers(4, 3, dtype=torch.float32)
    places = torch.randperm(12, generator=torch.Generator().manual_seed(2)).view(4, 3)
    same(rows.weighted_sum(y, places, weights), (y[places] * weights[..., None]).to(dtype).sum(1))


def test_large_inputs_are_split_over_threads() -> None:
    x, threads = numbers(300, 600, dtype=torch.float32), torch.get_num_threads()
    alone = rows.rms_norm(x, None, 1e-6)
    torch.set_num_threads(2)
    try:
        assert torch.equal(rows.rms_norm(x, None, 1e-6), alone)
    finally:
        torch.set_num_threads(threads)


def test_unsupported_inputs_stay_in_torch() -> None:
    x = numbers(8, 16, dtype=torch.float32)
    assert rows.supports(x)
    assert not rows.supports(x.double()) and not rows.supports(x, x.bfloat16()) and not rows.supports(x.t())
    assert not rows.supports(torch.empty(8, 16, device="meta"))
    with torch.inference_mode(False), torch.enable_grad():
        assert not rows.supports(x), "gradients are torch's"
