"""4-bit weights and e4m3 through C++ against the tables of packed.py, to the last bit, and the loop of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import compiled, experts, unpacking
from blockpress.ops.packed import E4M3, Float4, Nibbles

from .layouts import LAYOUTS, Layout

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
TYPES = [torch.bfloat16, torch.float32]
FOURS = ["int4", "int4 asymmetric", "int4 groups", "nvfp4", "nvfp4 divided", "mxfp4"]


@contextmanager
def tables() -> Iterator[None]:
    with mock.patch.object(unpacking, "_library", return_value=None):
        yield


def readings(weight: Layout, dtype: torch.dtype) -> list[Tensor]:
    matrix, scale = (weight if len(weight.shape) == 2 else weight[0]).factors(dtype)
    return [weight.unpack(dtype), matrix, *(() if scale is None else (scale,))]


def same_bits(weight: Layout) -> None:
    for dtype in TYPES:
        with tables():
            wanted = readings(weight, dtype)
        with mock.patch.object(unpacking, "unpack_4bit", wraps=unpacking.unpack_4bit) as native:
            got = readings(weight, dtype)
        assert native.call_count == 2, "both readings went through C++"
        for ours, theirs in zip(got, wanted, strict=True):
            alike(ours, theirs)


def alike(ours: Tensor, theirs: Tensor) -> None:
    """The same bits, signs of zeros included; any NaN is as good as another."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(ours.isnan(), theirs.isnan())
    kind = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.view(kind)[~ours.isnan()], theirs.view(kind)[~theirs.isnan()])


@pytest.mark.parametrize("name", FOURS)
@given(
    lead=st.lists(st.integers(1, 3), max_size=1),
    rows=st.integers(1, 9),
    runs=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_size_unpacks_to_the_same_bits(name: str, lead: list[int], rows: int, runs: int, seed: int) -> None:
    same_bits(LAYOUTS[name]((*lead, rows, 32 * runs), seed))


@pytest.mark.parametrize("name", FOURS)
def test_parts_and_threads_unpack_to_the_same_bits(name: str) -> None:
    weight, threads = LAYOUTS[name]((3, 300, 256), 1), torch.get_num_threads()
    for part in (weight[1], weight[2][7:90], weight[0][torch.tensor([5, 0, 5])]):
        same_bits(part)
    torch.set_num_threads(2)
    try:
        same_bits(weight)
    finally:
        torch.set_num_threads(threads)


def test_every_scale_byte_is_unpacked() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    for kind, group in (("e4m3", 16), ("e8m0", 32)):
        scales = torch.arange(64 * 512 // group).remainder(256).to(torch.uint8).view(64, -1)
        same_bits(Float4(packed=packed, scale=scales, kind=kind, group=group))  # type: ignore[arg-type]


def test_unsupported_layouts_use_the_tables() -> None:
    narrow, wide = LAYOUTS["int4 groups asymmetric"]((4, 96), 0), LAYOUTS["int4"]((4, 96), 0)
    halves = Nibbles(packed=wide.packed, scale=wide.scale.half(), group=96)  # type: ignore[union-attr]
    with mock.patch.object(unpacking, "unpack_4bit") as native:
        narrow.unpack(torch.bfloat16)  # groups of 8
        halves.unpack(torch.bfloat16)  # rounded to float16 first
    assert not native.called


@pytest.mark.parametrize("dtype", TYPES)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_e4m3_of_any_size_unpacks_to_the_same_bits(dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=draw).view(E4M3)
    alike(unpacking.unpack_e4m3(codes, dtype), codes.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_e4m3_code_unpacks_to_the_same_bits(dtype: torch.dtype) -> None:
    codes, threads = torch.arange(256, dtype=torch.uint8).repeat(3, 300).view(E4M3), torch.get_num_threads()
    for part in (codes, codes[1], codes[:, 5:90], codes.t()):
        alike(unpacking.unpack_e4m3(part, dtype), part.to(dtype))
    torch.set_num_threads(2)
    try:
        alike(unpacking.unpack_e4m3(codes, dtype), codes.to(dtype))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["fp8", "fp8 groups"])
@pytest.mark.parametrize("dtype", TYPES)
def test_cpp_unpacks_to_the_bits_of_the_tables(name: str, dtype: torch.dtype) -> None:
    weight = LAYOUTS[name]((2, 9, 96), 3)
    with tables():
        wanted = readings(weight, dtype)
    with mock.patch.object(unpacking, "unpack_e4m3", wraps=unpacking.unpack_e4m3) as native:
        got = readings(weight, dtype)
    assert native.called
    for ours, theirs in zip(got, wanted, strict=True):
        alike(ours, theirs)


@pytest.mark.parametrize("name", FOURS)
@torch.inference_mode()
def test_four_bit_experts_unpack_to_the_same_bits(name: str) -> None:
    draw = torch.Generator().manual_seed(4)
    gate_up, down = LAYOUTS[name]((5, 64, 96), 1), LAYOUTS[name]((5, 96, 32), 2)
    x = torch.randn(23, 96, generator=draw).bfloat16() * 0.05
    given = (x, *experts.route(torch.randn(23, 5, generator=draw), 2, torch.ones(5)), gate_up, down)
    with tables():
        wanted = experts.moe_loop(*given)
    got = experts.ordered(*given)
    assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()
    assert torch.equal(experts.moe_forward(*given), got)
