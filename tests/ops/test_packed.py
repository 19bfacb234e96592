"""Layouts of packed weights against their definition in float64, value by value; slices, moves, factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops.packed import Codes, Float4, HalfFloats, Nibbles
from blockpress.ops.weight import Packed
from tests.ops.layouts import E4M3, LAYOUTS, Layout, fp8

NAMES = st.sampled_from(sorted(LAYOUTS))
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3).map(lambda groups: 32 * groups))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def defined(weight: Layout) -> Tensor:
    """The values of a matrix by the formats' definitions, one Python number after another, unrounded."""
    rows, columns = weight.shape
    return torch.tensor([[value(weight, r, c) for c in range(columns)] for r in range(rows)], dtype=torch.float64)


def value(weight: Layout, row: int, column: int) -> float:
    if isinstance(weight, HalfFloats):
        return float(weight.values[row, column])
    group = column // weight.group
    if isinstance(weight, Codes):
        code = weight.codes[row, column].view(torch.uint8).item()
        number = e4m3(code) if weight.codes.dtype == E4M3 else code - 256 * (code > 127)
    else:
        both = int(weight.packed[row, column // 2])
        nibble = both >> 4 if column % 2 else both & 15
        number = e2m1(nibble) if isinstance(weight, Float4) else nibble - 8
    if isinstance(weight, Float4):
        code = int(weight.scale[row, group])
        inner = e4m3(code) if weight.kind == "e4m3" else 2.0 ** (code - 127)
        outer = 1.0 if weight.global_scale is None else float(weight.global_scale[row])
        return number * (inner / outer if weight.divides else inner * outer)
    zero = 0 if weight.zero_point is None else int(weight.zero_point[row, group])
    return (number - zero) * float(weight.scale[row, group])


def e4m3(code: int) -> float:
    """Four bits of exponent with bias 7, three of fraction; the smallest exponent is that of subnormals."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return -size if code > 127 else size


def e2m1(code: int) -> float:
    exponent, fraction = code >> 1 & 3, code & 1
    size = (2 + fraction) * 2.0 ** (exponent - 2) if exponent else fraction / 2
    return -size if code > 7 else size


def scale_type(weight: Layout) -> torch.dtype:
    if isinstance(weight, HalfFloats):
        return weight.values.dtype
    return torch.float32 if isinstance(weight, Float4) else weight.scale.dtype


@given(name=NAMES, shape=SHAPES, seed=SEEDS, dtype=DTYPES)
def test_values_are_those_of_the_definition(name: str, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    weight = LAYOUTS[name](shape, seed)
    assert isinstance(weight, Packed)
    assert weight.shape == shape
    got, wanted = weight.unpack(dtype), defined(weight)
    assert got.dtype == dtype
    if isinstance(weight, Float4):
        # The two scales are joined first, which rounds once more.
        torch.testing.assert_close(got.double(), wanted, rtol=2**-22 + torch.finfo(dtype).eps / 2, atol=1e-7)
    else:
        assert torch.equal(got, wanted.to(scale_type(weight)).to(dtype)), "rounded once, in the scale's type"


@given(name=NAMES, shape=SHAPES, seed=SEEDS, dtype=DTYPES)
def test_factors_are_exact(name: str, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    weight = LAYOUTS[name](shape, seed)
    matrix, scale = weight.factors(dtype)
    assert matrix.dtype == dtype
    if scale is None:
        assert isinstance(weight, Float4) or torch.equal(matrix, weight.unpack(dtype))
        torch.testing.assert_close(
            matrix.double(),
            defined(weight),
            rtol=torch.finfo(scale_type(weight)).eps + torch.finfo(dtype).eps,
            atol=1e-7,
        )
    else:
        assert scale.dtype == torch.float32
        assert dtype != torch.float16, "sums of products with codes are beyond it"
        # Nothing of the codes is rounded.
        torch.testing.assert_close(matrix.double() * scale.double()[:, None], defined(weight), rtol=2**-23, atol=0)


@given(name=NAMES, seed=SEEDS, data=st.data())
def test_indexing_selects_as_from_the_floats(name: str, seed: int, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), 64)
    weight = LAYOUTS[name](shape, seed)
    floats = weight.unpack(torch.float32)
    expert = data.draw(st.integers(-shape[0], shape[0] - 1))
    start, stop = data.draw(st.integers(0, shape[1])), data.draw(st.integers(0, shape[1] + 2))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[1] - 1), max_size=6)), dtype=torch.long)
    for taken, wanted in (
        (weight[expert], floats[expert]),
        (weight[expert][start:stop], floats[expert][start:stop]),
        (weight[expert][rows], floats[expert][rows]),
        (weight[start:stop], floats[start:stop]),
    ):
        assert taken.shape == tuple(wanted.shape)
        assert torch.equal(taken.unpack(torch.float32), wanted)
    inner = weight[expert]
    assert all(inner.tensors()[n].data_ptr() == t[expert].data_ptr() for n, t in weight.tensors().items()), "a view"


@pytest.mark.parametrize("name", LAYOUTS)
def test_byte_counts_and_devices_are_reported(name: str) -> None:
    weight = LAYOUTS[name]((3, 4, 64), 0)
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors().values())
    assert weight.device == torch.device("cpu")
    moved = weight.to(torch.device("meta"))
    assert (moved.device.type, moved.shape, moved.nbytes) == ("meta", weight.shape, weight.nbytes)
    assert type(moved) is type(weight)


def test_bits_a_value_of_every_layout() -> None:
    """Bits a value, scales included, of the sizes of the published model."""
    bits = {name: make((2, 64, 1408), 0).nbytes * 8 / (2 * 64 * 1408) for name, make in LAYOUTS.items()}
    assert bits["nvfp4"] == pytest.approx(4.5, abs=0.03)
    assert bits["mxfp4"] == pytest.approx(4.25)
    assert bits["int4 groups"] == pytest.approx(4.5)
    assert bits["fp8"] == pytest.approx(8, abs=0.03)


@settings(max_examples=20)
@given(columns=st.integers(1, 9), seed=SEEDS)
def test_eight_bit_floats_unpack_at_any_width(columns: int, seed: int) -> None:
    weight = fp8((3, columns), seed)
    assert torch.equal(weight.unpack(torch.float32), defined(weight).float())


def test_every_code_is_unpacked() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    floats = every[(every & 0x7F) != 0x7F].view(E4M3).view(2, 127)
    codes = Codes(codes=floats, scale=torch.ones(2, 1), group=127)
    assert torch.equal(codes.unpack(torch.float32), floats.float())
    nibbles = Nibbles(packed=every.view(2, 128), scale=torch.ones(2, 1), group=256)
    assert torch.equal(nibbles.unpack(torch.bfloat16).double(), defined(nibbles))
    fours = Float4(packed=every.view(1, 256), scale=torch.full((1, 32), 0x38, dtype=torch.uint8), kind="e4m3", group=16)
    assert torch.equal(fours.unpack(torch.bfloat16).double(), defined(fours)), "0x38 is the e4m3 code of 1"


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpu_gives_the_same_values(name: str) -> None:
    weight = LAYOUTS[name]((3, 5, 96), 1)
    there = weight.to(torch.device("cuda"))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(there.unpack(dtype).cpu(), weight.unpack(dtype))
