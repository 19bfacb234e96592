"""Masks against their definition, one query and one key at a time."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpress.model.masks import canvas_mask, causal_mask, draw_mask

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=4)
WINDOW = st.none() | st.integers(1, 12)


@given(LENGTHS, st.integers(0, 3), st.integers(1, 7), WINDOW)
def test_the_causal_mask_is_the_drawing(lengths: list[int], spare: int, own: int, window: int | None):
    width = max(lengths) + spare
    mask = causal_mask(torch.tensor(lengths), width, own, window)
    assert mask.shape == (len(lengths), own, width + own)
    for row, length in enumerate(lengths):
        # Places of the keys in the row; a cached key behind the row's length is padding.
        keys = [key if key < length else None for key in range(width)] + [length + i for i in range(own)]
        for query in range(own):
            at = length + query
            seen = [key is not None and key <= at and (window is None or key > at - window) for key in keys]
            assert mask[row, query].tolist() == seen


@given(LENGTHS, st.integers(0, 3), st.integers(1, 7), WINDOW, st.data())
def test_the_causal_mask_with_pictures_is_the_drawing(
    lengths: list[int], spare: int, own: int, window: int | None, data: st.DataObject
):
    """Beside what it sees anyway, a token sees exactly the tokens of its own picture."""
    width = max(lengths) + spare
    numbers = [data.draw(st.lists(st.integers(-1, 2), min_size=own, max_size=own)) for _ in lengths]
    without = causal_mask(torch.tensor(lengths), width, own, window)
    mask = causal_mask(torch.tensor(lengths), width, own, window, torch.tensor(numbers))
    for row, runs in enumerate(numbers):
        for query in range(own):
            alike = [False] * width + [runs[query] >= 0 and runs[query] == other for other in runs]
            assert mask[row, query].tolist() == [
                a or b for a, b in zip(without[row, query].tolist(), alike, strict=True)
            ]


@given(LENGTHS, st.integers(0, 3), st.integers(1, 7), WINDOW, st.integers(0, 5))
def test_the_canvas_mask_is_the_drawing(lengths: list[int], spare: int, canvas: int, window: int | None, start: int):
    start = min(start, max(lengths))
    width = max(lengths) + spare - start
    mask = canvas_mask(torch.tensor(lengths), width, canvas, window, start)
    assert mask.shape == (len(lengths), canvas, width + canvas)
    for row, length in enumerate(lengths):
        visible = range(length)[max(0, length - (window - 1)) :] if window is not None else range(length)
        seen = [key in visible for key in range(start, start + width)] + [True] * canvas
        assert mask[row].tolist() == [seen] * canvas


@given(LENGTHS, st.integers(1, 7), WINDOW)
def test_no_query_is_masked_entirely(lengths: list[int], own: int, window: int | None):
    for mask in (causal_mask, canvas_mask):
        assert mask(torch.tensor(lengths), max(lengths), own, window).any(-1).all()


def test_the_drawing_shows_the_first_row():
    mask = canvas_mask(torch.tensor([1, 3]), 3, 2, None)
    assert draw_mask(mask, 3) == "1.. | 11\n1.. | 11"
