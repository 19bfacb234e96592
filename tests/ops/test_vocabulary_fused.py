"""The pass over the vocabulary in tiles (`ops/native/head.h`): what a version that holds a row's products cannot get
wrong. `test_vocabulary_step.py` runs it beside the others."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from blockpress.ops import vocabulary
from blockpress.ops.packed import HalfFloats
from blockpress.ops.vocabulary import fused, native, step
from tests.ops import layouts
from tests.ops.draws import threads
from tests.ops.test_vocabulary_step import Case, case, full, same, truth

TILE, PARTS = 256, 32
LARGE = PARTS * 4 * TILE + 2 * TILE + 77
"""More tiles than are in as many parts of the least size, and a tile that is not whole."""
ROWS = 301
"""More than are multiplied at a time."""


def readable(dtype: torch.dtype) -> bool:
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(fused, "FUSED", 0)
        return fused.readable(torch.empty(1, 8, dtype=dtype), torch.empty(9, 8, dtype=dtype)) is not None


TILED = readable(torch.bfloat16)
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not TILED, reason="no matrix tiles here")),
]


@pytest.fixture(autouse=True)
def every_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FUSED", 0)
    if not readable(torch.float32):
        pytest.skip("no C++ compiler, or a level at which torch multiplies")


def rows_of(c: Case, rows: slice | Tensor) -> Case:
    """Some of the positions, in memory of their own."""
    banned = None if c.banned is None else (c.banned[0], c.banned[1][rows].clone())
    own = {name: getattr(c, name)[rows].clone() for name in ("hidden", "temperature", "uniform")}
    return replace(c, **own, banned=banned)


def equal(got: vocabulary.SampleStats, want: vocabulary.SampleStats) -> None:
    for field in fields(got):
        assert torch.equal(getattr(got, field.name), getattr(want, field.name)), field.name


def logits(rising: Tensor, rows: int = 3, dtype: torch.dtype = torch.float32, **given: object) -> Case:
    """Rows whose logits are these, times 1, 2 and so on."""
    c = case(len(rising), rows, dtype)
    hidden, weight = torch.zeros_like(c.hidden), torch.zeros_like(c.weight)
    hidden[:, 0], weight[:, 0] = torch.arange(1.0, rows + 1), rising
    weight[:, 1:] = c.weight[:, 1:]
    return replace(c, hidden=hidden, weight=weight, **given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [30.0, None])
def test_many_parts_and_blocks_of_rows_equal_full_logits(cap: float | None, dtype: torch.dtype) -> None:
    c = case(LARGE, ROWS, dtype, cap=cap, spread=2.0)
    few = torch.tensor([0, 1, 130, 287, 288, ROWS - 1])
    got = c.see("fused")
    picked = vocabulary.SampleStats(*(getattr(got, field.name)[few] for field in fields(got)))
    same(rows_of(c, few), picked, truth(rows_of(c, few)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(dtype: torch.dtype) -> None:
    c = case(LARGE, ROWS, dtype)
    ids = torch.randperm(LARGE, generator=torch.Generator().manual_seed(1))[:40]
    c = replace(c, banned=(ids, torch.rand(ROWS, 40, generator=torch.Generator().manual_seed(2)) < 0.5))
    whole = c.see("fused")
    for some in (slice(0, 1), slice(286, 291), slice(100, ROWS)):
        part = vocabulary.SampleStats(*(getattr(whole, field.name)[some] for field in fields(whole)))
        equal(rows_of(c, some).see("fused"), part)
    for count in (1, 2, 3):
        with threads(count):
            equal(c.see("fused"), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["rising", "falling", "a peak amid", "flat"])
@pytest.mark.parametrize("cap", [30.0, None])
@pytest.mark.parametrize("height", [0.5, 12.0, 40.0])
def test_the_largest_logit_may_lie_in_any_tile(
    shape: str, cap: float | None, height: float, dtype: torch.dtype
) -> None:
    """A tile that raises it scales down what was summed before, in its part and among the parts."""
    vocab = native.TABLED + TILE + 9
    line = torch.linspace(-1, 1, vocab)
    shapes = {"rising": line, "falling": -line, "a peak amid": 1 - 2 * line.abs(), "flat": torch.ones(vocab)}
    c = logits(shapes[shape] * height, cap=cap, dtype=dtype)
    want = truth(c)
    if dtype == torch.float32:
        want = replace(want, signal=(torch.softmax(full(c).double(), -1) @ c.weight.double() * c.scale).float())
    same(c, c.see("fused"), want, near=1e-5)


def test_small_entropies_keep_their_digits_over_tiles() -> None:
    for place in (0, 5 * TILE + 3, 9 * TILE):
        for gap in (6.0, 12.0, 20.0):
            values = torch.zeros(9 * TILE + 1)
            values[place] = gap
            c = logits(values, 1, cap=None, temperature=torch.ones(1))
            log_p = torch.log_softmax(full(c).double(), -1)
            got = c.see("fused").entropy.double()
            torch.testing.assert_close(got, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-12)


@pytest.mark.skipif(not TILED, reason="no matrix tiles here")
@pytest.mark.parametrize("temperature", [0.4, 1.0])
@pytest.mark.parametrize("vocab", [12 * TILE + 5, native.TABLED + 5])
def test_entropies_in_bfloat16_are_those_of_the_logits(vocab: int, temperature: float) -> None:
    """Computed and from tables, of rows from nearly uniform to certain: whether a tile holds the maximum, one just
    below it, or neither."""
    places = torch.tensor([3, 5 * TILE + 1, 11 * TILE + 2])
    for gap in (0.05, 1.0, 6.0, 25.0):
        values = torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * 0.1
        values[places] = torch.tensor([gap, gap * 0.99, gap])
        c = logits(values, 2, cap=30.0, dtype=torch.bfloat16, temperature=torch.full((2,), temperature))
        got, want = c.see("fused"), truth(c)
        log_p = torch.log_softmax(full(c).double(), -1)
        torch.testing.assert_close(got.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=2e-6, atol=2e-6)
        same(c, got, want)


@pytest.mark.skipif(not TILED, reason="no matrix tiles here")
@pytest.mark.parametrize("largest", [76.0, 79.9, 80.1, 83.5])
def test_sums_near_the_largest_logits_of_a_table_stay_finite(largest: float) -> None:
    """Nearly all logits are just below a maximum that is among the largest that tables hold, or a little larger."""
    values = torch.full((native.TABLED + 5,), 120.0)
    values[2 * 4 * TILE + 3] = 2000.0  # in the first tile of a part: the others of it are below
    c = logits(values, 1, cap=30.0, dtype=torch.bfloat16, temperature=torch.full((1,), 30.0 / largest))
    log_p = torch.log_softmax(full(c).double(), -1)
    got = c.see("fused").entropy.double()
    torch.testing.assert_close(got, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_maxima_of_several_tiles_and_parts(dtype: torch.dtype) -> None:
    values = torch.zeros(9 * TILE)
    values[[TILE + 7, TILE + 8, 2 * TILE + 9, 3 * TILE, 8 * TILE + 1]] = 11.0
    c = logits(values, dtype=dtype)
    got = c.see("fused")
    assert got.argmax.tolist() == [TILE + 7] * 3
    same(c, got, truth(c))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tiles_and_parts_may_be_banned(dtype: torch.dtype) -> None:
    vocab = native.TABLED + TILE + 5
    for first, last in ((0, 5 * TILE), (4 * TILE, vocab), (TILE, 2 * TILE), (1, vocab)):
        ids = torch.arange(first, last).flip(0)  # in any order
        c = replace(case(vocab, 3, dtype), banned=(ids, torch.tensor([[True], [False], [True]]).expand(3, len(ids))))
        got = c.see("fused")
        same(c, got, truth(c))
        assert not any(first <= token < last for token in got.sample[[0, 2]].tolist())


def test_every_token_can_be_drawn() -> None:
    """u in the middle of a token's interval draws that token, also one in a tile that has next to no probability."""
    vocab = 6 * TILE + 3
    values = torch.linspace(0, -60, vocab)
    tokens = torch.tensor([0, 1, 63, 64, 250, TILE - 1, TILE, TILE + 63, TILE + 64])
    probability = torch.softmax(values.double(), -1)
    middle = probability.cumsum(-1)[tokens] - probability[tokens] / 2
    c = logits(values, 1, cap=None)
    c = replace(
        c, hidden=c.hidden.expand(len(tokens), -1), temperature=torch.ones(len(tokens)), uniform=middle, cap=None
    )
    assert c.see("fused").sample.tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [30.0, None])
def test_what_is_not_finite_is_told_by_its_first_token(cap: float | None, dtype: torch.dtype) -> None:
    c = case(9 * TILE, 2, dtype, cap=cap)
    for changes, first in (
        ({3 * TILE: math.nan}, 3 * TILE),
        ({5: math.inf, 8 * TILE: math.inf}, 5),
        ({5: math.inf, 8 * TILE: math.nan}, 8 * TILE),
    ):
        weight = c.weight.clone()
        for token, value in changes.items():
            weight[token] = 0.0
            weight[token, 0] = value
        odd = replace(c, weight=weight, hidden=c.hidden.abs())
        got = odd.see("fused")
        assert got.argmax.tolist() == [first, first] == odd.see("native").argmax.tolist()
        assert got.entropy.isnan().all() and got.signal is not None and got.signal.isnan().all()
        assert got.sample.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["int8", "nvfp4", "bfloat16", "float16"])
def test_a_weight_is_read_as_it_is_stored(kind: str) -> None:
    shape = (5 * TILE + 16, 64)
    if kind in ("int8", "nvfp4"):
        packed = layouts.int8(shape, 1, group=32, asymmetric=True) if kind == "int8" else layouts.nvfp4(shape, 1)
    else:
        packed = HalfFloats(
            values=torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(getattr(torch, kind))
        )
    c = case(shape[0], 7)
    floats = packed.unpack(torch.float32)
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(4)) * 8 / floats.norm(dim=1).mean()
    c = replace(c, hidden=hidden, weight=floats)
    equal(c.see("fused", weight=packed), c.see("fused"))


def test_which_steps_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 of a large vocabulary; not where all logits of a row are needed at once."""
    taken = []
    whole = fused.sample_from_hidden
    monkeypatch.setattr(fused, "FUSED", 500)
    monkeypatch.setattr(step.fused, "sample_from_hidden", lambda *a, **k: taken.append(1) or whole(*a, **k))
    for c, signal, version, expected in (
        (case(500), "exact", "native", 1),
        (case(500), None, "native", 1),
        (case(499), "exact", "native", 0),
        (case(500), "sparse", "native", 0),
        (case(500), "exact", "torch", 0),
        (case(500, dtype=torch.bfloat16), "exact", "native", int(TILED)),
        (case(500, dtype=torch.bfloat16), "sparse", "native", 0),
    ):
        taken.clear()
        c.see(version, signal)  # type: ignore[arg-type]
        assert len(taken) == expected, (signal, version)
