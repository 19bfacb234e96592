"""Block layouts against the dequantiser of the `gguf` package, to the last bit, on any bytes at all."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import blocks, linear
from blockpress.ops.blocks import LAYOUTS, Blocks
from blockpress.ops.weight import Packed
from tests.conftest import num_examples

pytestmark = pytest.mark.parity

NAMES = sorted(LAYOUTS)


def random_bytes(name: str, *rows: int, blocks: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*rows, blocks * LAYOUTS[name].bytes), dtype=torch.uint8, generator=draw)


def sane(name: str, *rows: int, seed: int = 0) -> Blocks:
    """Blocks whose scales are 1/32 and 1/16, so that products of them stay small."""
    data = random_bytes(name, *rows, blocks=2, seed=seed).unflatten(-1, (2, LAYOUTS[name].bytes))
    places = {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(name, (0, 2))
    for place, scale in zip(places, (2**-5, 2**-4), strict=False):
        data[..., place : place + 2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    return Blocks(data.flatten(-2), LAYOUTS[name])


def truth(data: Tensor, name: str) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), Type[name]))


def test_sizes_are_those_of_the_format() -> None:
    assert {name: (x.values, x.bytes) for name, x in LAYOUTS.items()} == {
        name: gguf.GGML_QUANT_SIZES[Type[name]] for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=num_examples(25))
def test_values_equal_those_of_the_gguf_package(name: str, seed: int) -> None:
    """Infinite and not-a-number scales are among the bytes."""
    data = random_bytes(name, 7, seed=seed)
    ours, theirs = Blocks(data, LAYOUTS[name]).unpack(torch.float32), truth(data, name)
    known = ~theirs.isnan()
    assert torch.equal(ours.isnan(), ~known)
    assert torch.equal(ours[known].view(torch.int32), theirs[known].view(torch.int32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    weight = sane(name, 4)
    assert torch.equal(weight.unpack(dtype), weight.unpack(torch.float32).to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sane(name, 5, 3)
    whole = weight.unpack(torch.float32)
    monkeypatch.setattr(blocks, "CHUNK", 4 * LAYOUTS[name].values)
    assert torch.equal(weight.unpack(torch.float32), whole)


@pytest.mark.parametrize("name", NAMES)
def test_indexing_selects_the_values(name: str) -> None:
    weight = sane(name, 4, 6)
    values = weight.unpack(torch.float32)
    rows = torch.tensor([3, 0, 3])
    assert isinstance(weight, Packed)
    assert (weight.shape, weight.nbytes) == (tuple(values.shape), 4 * 6 * 2 * LAYOUTS[name].bytes)
    for index in (2, slice(1, 3), rows):
        assert torch.equal(weight[index].unpack(torch.float32), values[index])
        assert weight[index].shape == tuple(values[index].shape)
    assert torch.equal(weight[1][rows].unpack(torch.float32), values[1][rows])
    assert weight[1].data.data_ptr() == weight.data[1].data_ptr(), "an expert is a view"


@pytest.mark.parametrize("name", NAMES)
def test_products_equal_those_of_the_floats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "TILE", 3 * 2 * LAYOUTS[name].values)
    weight = sane(name, 8)
    values = weight.unpack(torch.float32)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(5, values.shape[1], generator=draw)
    share = torch.rand(5, 8, generator=draw).softmax(-1)
    ids = torch.tensor([[7, 0], [0, 3]])
    size = values.abs().max() * values.shape[1] ** 0.5
    torch.testing.assert_close(linear.linear(x, weight), x @ values.T, rtol=0, atol=1e-6 * size.item())
    torch.testing.assert_close(linear.combine(share, weight), share @ values, rtol=0, atol=1e-6 * size.item())
    assert torch.equal(linear.lookup(ids, weight, torch.float32), values[ids])
