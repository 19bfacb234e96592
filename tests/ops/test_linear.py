"""Products, lookups and mixtures of packed weights against those of their unpacked floats, whole and in tiles."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import experts, linear
from tests.ops.layouts import LAYOUTS

NAMES = st.sampled_from(sorted(LAYOUTS))
SEEDS = st.integers(0, 2**32 - 1)
# Values of a tile: a row at a time, an uneven number of rows, all at once.
TILES = st.sampled_from([1, 200, 1 << 22])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, wanted: Tensor, share: float = 1e-5) -> bool:
    """Within a share of the largest; bfloat16 scales of a row make factors differ from values by their rounding."""
    return float((got - wanted).abs().max()) <= share * float(wanted.abs().max()) + 1e-12


@given(name=NAMES, rows=st.integers(1, 7), outputs=st.integers(1, 9), seed=SEEDS, tile=TILES)
def test_packed_linear_equals_its_floats(name: str, rows: int, outputs: int, seed: int, tile: int) -> None:
    weight = LAYOUTS[name]((outputs, 64), seed)
    x = normal(2, rows, 64, seed=seed)
    with mock.patch.object(linear, "TILE", tile):
        got = linear.linear(x, weight)
    assert got.shape == (2, rows, outputs)
    assert close(got, F.linear(x, weight.unpack(torch.float32)))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_linear_in_narrow_types_equals_its_floats(name: str, dtype: torch.dtype) -> None:
    weight, x = LAYOUTS[name]((48, 96), 1), normal(5, 96).to(dtype)
    got = linear.linear(x, weight)
    assert got.dtype == dtype
    exact = x.double() @ weight.unpack(torch.float32).double().T
    # A product is rounded to the type, and so is each value where groups have scales of their own.
    assert close(got.double(), exact, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", LAYOUTS)
def test_float16_results_fit_where_the_values_do(name: str) -> None:
    """A product that fits the type, although the sum of the codes' products does not."""
    weight = LAYOUTS[name]((48, 96), 1)
    floats = weight.unpack(torch.float32)
    x = floats[:3] * (20_000 / float((floats[:3] @ floats.T).abs().max()))
    got, exact = linear.linear(x.half(), weight), x.half().double() @ floats.double().T
    assert close(got.double(), exact, 4 * torch.finfo(torch.float16).eps)


@given(name=NAMES, seed=SEEDS, tile=TILES, data=st.data())
def test_packed_lookup_and_combine_equal_their_floats(name: str, seed: int, tile: int, data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 9))
    weight = LAYOUTS[name]((vocabulary, 64), seed)
    floats = weight.unpack(torch.float32)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=4, max_size=4))).view(2, 2)
    assert torch.equal(linear.lookup(ids, weight, torch.float32), floats[ids])
    share = torch.softmax(normal(2, 3, vocabulary, seed=seed), dim=-1)
    with mock.patch.object(linear, "TILE", tile):
        got = linear.combine(share, weight)
    assert close(got, share @ floats)


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_experts_equal_their_floats(name: str) -> None:
    gate_up, down = LAYOUTS[name]((5, 2 * 32, 64), 0), LAYOUTS[name]((5, 64, 32), 1)
    x = normal(9, 64) / 8
    weights, chosen = experts.route(normal(9, 5, seed=2), 2, torch.ones(5))
    floats = gate_up.unpack(torch.float32), down.unpack(torch.float32)
    # A row of `down` has one group of 32, whose bfloat16 scale factors leave unrounded.
    share = 2**-8 if name == "int4 groups" else 1e-5
    assert close(
        experts.moe_forward(x, weights, chosen, gate_up, down), experts.moe_loop(x, weights, chosen, *floats), share
    )


def test_tiles_cover_every_row_once() -> None:
    weight = LAYOUTS["nvfp4"]((10, 64), 0)
    with mock.patch.object(linear, "TILE", 200):
        parts = list(linear.tiles(weight, torch.bfloat16))
        wide = list(linear.tiles(weight, torch.float32))
    assert [(start, tile.shape[0]) for start, tile in parts] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert [start for start, _ in wide] == list(range(10)), "float32 takes twice the bytes"
    assert torch.equal(torch.cat([t.unpack(torch.float32) for _, t in parts]), weight.unpack(torch.float32))


@pytest.mark.parametrize("shape", [(7,), (1, 9), (2, 3, 5), (1,)])
@torch.inference_mode()
def test_onednn_is_true_float32(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(3)
    x, weight = torch.randn(*shape, 300, generator=draw), torch.randn(40, 300, generator=draw)
    in_torch = mock.patch.object(linear.bridge, "for_product", return_value=None)
    with in_torch, mock.patch.object(linear, "float32_way", return_value="onednn"):
        with mock.patch.object(linear, "_onednn", wraps=linear._onednn) as taken:
            got = linear.linear(x, weight)
        assert taken.called, "one row has the bits that it has among others"
        assert torch.equal(linear.linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
    wanted = F.linear(x.double(), weight.double())
    assert (got - wanted).norm() <= 5e-7 * wanted.norm()
