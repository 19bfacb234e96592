"""Automata of canvases with a hole: they allow exactly the texts that are meant, however these are cut into tokens."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.automaton import DEAD
from blockpress.constrain.filling import ANY_TEXT, End, filling, region
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import TokenBytes

from ..conftest import num_examples

PIECES = [b"a", b"b", b"ab", b"ba", b"c", None, None]
STOP, CONTROL = 5, 6
VOCABULARY = TokenBytes(PIECES)


def text(tokens: list[int]) -> bytes:
    return b"".join(PIECES[token] or b"" for token in tokens)


@pytest.mark.parametrize("end", ["stop", "cut", "free"])
@pytest.mark.parametrize("hole", [None, "(ab)*"])
@settings(max_examples=num_examples(10))
@given(
    before=st.lists(st.integers(0, 4), max_size=2),
    heal=st.text("abc", max_size=1),
    seam=st.text("abc", max_size=2),
    after=st.lists(st.integers(0, 4), max_size=2),
)
def test_allowed_canvases_are_all_texts_between_what_is_given(
    end: End, hole: str | None, before: list[int], heal: str, seam: str, after: list[int]
) -> None:
    if end == "cut" and not after:
        return
    middle = region(heal.encode(), ANY_TEXT if hole is None else parse_regex(hole), seam.encode(), VOCABULARY)
    made = filling(middle, 0, before, after, end, [STOP], least=len(after))
    for length in range(4):
        for tail in product(range(7), repeat=length):
            tokens = [*before, *tail]
            state = made.start
            for token in tokens:
                state = made.automaton.step(state, token) if state != DEAD else DEAD
            if state == DEAD or not made.automaton.accepting[state]:
                continue
            inside, states = made.split(tokens)
            body = tokens[len(before) + len(inside) :]
            between = text(inside).decode().removeprefix(heal)
            assert text(inside).startswith(heal.encode()) and between.endswith(seam)
            assert hole is None or parse_hole(between.removesuffix(seam))
            assert body[: len(after)] == after
            rest = body[len(after) :]
            assert rest == [] if end == "cut" else True
            assert set(rest) <= {STOP} if end == "stop" else True
            assert len(states) == len(inside) + 1


def parse_hole(hole: str) -> bool:
    return hole == "ab" * (len(hole) // 2)


@given(
    hole=st.lists(st.integers(0, 4), max_size=3),
    before=st.lists(st.integers(0, 4), max_size=2),
    after=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_any_hole_is_allowed_where_stops_end_the_text(hole: list[int], before: list[int], after: list[int]) -> None:
    seam, rest = after[:1], after[1:]
    middle = region(b"", ANY_TEXT, text(seam), VOCABULARY)
    made = filling(middle, 0, before, rest, "stop", [STOP])
    tokens, state = [*before, *hole, *after, STOP, STOP], made.start
    for token in tokens:
        state = made.automaton.step(state, token)
        if state == DEAD:  # the hole goes on as the text after it does: it ends there
            assert rest and rest[0] in hole + seam
            return
    assert made.automaton.accepting[state] and text(made.split(tokens)[0]).endswith(text(seam))
