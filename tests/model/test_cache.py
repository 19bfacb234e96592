"""The cache against lists: every row is a list of numbers, and every key or value repeats its number."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.model import Cache

SHAPES = [(2, 3), (1, 4)]
Rows = list[list[int]]


def empty(batch: int) -> Cache:
    return Cache.empty(SHAPES, batch, torch.float32, torch.device("cpu"))


def filled(numbers: Tensor, layer: int, what: int) -> Tensor:
    """[batch, heads, keys, dim] that tells number, layer, and key from value."""
    heads, dim = SHAPES[layer]
    return (numbers * 10 + layer * 2 + what)[:, None, :, None].float().expand(-1, heads, -1, dim)


def append(cache: Cache, fresh: Rows) -> Cache:
    own = max(map(len, fresh))
    numbers = torch.tensor([row + [-7] * (own - len(row)) for row in fresh]).view(len(fresh), own)
    pairs = [(filled(numbers, layer, 0), filled(numbers, layer, 1)) for layer in range(len(SHAPES))]
    return cache.append(pairs, torch.tensor([len(row) for row in fresh]))


def check(cache: Cache, rows: Rows) -> None:
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert cache.width == max(map(len, rows))
    for layer, pair in enumerate(cache.layers):
        for what, kept in enumerate(pair):
            for row, numbers in enumerate(rows):
                wanted = filled(torch.tensor([numbers]).view(1, -1), layer, what)[0]
                assert torch.equal(kept[row, :, : len(numbers)], wanted)
                assert not kept[row, :, len(numbers) :].any()


@given(st.integers(1, 4), st.data())
def test_append_and_select_do_what_lists_do(batch: int, data: st.DataObject):
    rows: Rows = [[] for _ in range(batch)]
    cache, past = empty(batch), []
    counter = iter(range(1, 10_000))
    for _ in range(data.draw(st.integers(1, 6))):
        past.append((cache, rows))
        if data.draw(st.booleans()):
            counts = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)).filter(any))
            fresh = [[next(counter) for _ in range(count)] for count in counts]
            cache, rows = append(cache, fresh), [row + more for row, more in zip(rows, fresh, strict=True)]
        else:
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            cache, rows = cache.select(torch.tensor(chosen)), [rows[place] for place in chosen]
        check(cache, rows)
    for old, as_it_was in past:
        check(old, as_it_was)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.none() | st.integers(1, 12))
def test_recent_keeps_exactly_what_a_row_can_see(lengths: list[int], window: int | None):
    rows = [[100 * row + i for i in range(length)] for row, length in enumerate(lengths)]
    cache = append(empty(len(rows)), rows)
    for layer in range(len(SHAPES)):
        pair, start = cache.recent(layer, window)
        firsts = [0 if window is None else max(0, length - (window - 1)) for length in lengths]
        assert start == min(firsts)
        assert all(torch.equal(x, whole[:, :, start:]) for x, whole in zip(pair, cache.layers[layer], strict=True))


def test_an_empty_cache_has_no_width():
    cache = empty(3)
    assert (cache.width, cache.lengths.tolist()) == (0, [0, 0, 0])
    assert [key.shape for key, _ in cache.layers] == [(3, 2, 0, 3), (3, 1, 0, 4)]
