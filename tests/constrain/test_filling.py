"""Automata of canvases with a hole: they allow exactly the texts that are meant, however these are cut into tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from operator import mul

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.automaton import DEAD, Expression
from blockpress.constrain.filling import ANY_TEXT, End, Filling, filling, region
from blockpress.constrain.posterior import posterior
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import Moves, TokenAutomaton, TokenBytes

from ..conftest import num_examples

PIECES = [b"a", b"b", b"ab", None, None]
STOP, TOKENS = 3, range(5)
VOCABULARY = TokenBytes(PIECES)
HOLES: dict[str, Expression] = {"[ab]*": ANY_TEXT, "(ab)*": parse_regex("(ab)*"), "a{0,2}b?": parse_regex("a{0,2}b?")}
PERIODIC = st.builds(mul, st.lists(st.integers(0, 2), min_size=1, max_size=2), st.integers(0, 2))
AFTER = st.one_of(st.lists(st.integers(0, 2), max_size=3), PERIODIC)
Tokens = tuple[int, ...]


def text(tokens: Tokens) -> str:
    return b"".join(PIECES[token] or b"" for token in tokens).decode()


def allowed(made: Filling, length: int) -> set[Tokens]:
    """All texts of at most `length` tokens that the automaton allows."""
    automaton, found = made.automaton, set[Tokens]()
    stack: list[tuple[int, Tokens]] = [(made.start, ())]
    while stack:
        state, tokens = stack.pop()
        if automaton.accepting[state]:
            found.add(tokens)
        for token in TOKENS:
            after = automaton.step(state, token)
            if after != DEAD and automaton.distance[after] < length - len(tokens):
                stack.append((after, (*tokens, token)))
    return found


def meant(regions: set[Tokens], after: Tokens, end: End, least: int, length: int) -> set[Tokens]:
    """The same by trying all regions, but for the canvases that end inside of one."""
    found = {one + after[:count] for one in regions for count in range(least, len(after) + 1)}
    for one in regions:
        for count in range(1, length - len(one + after) + 1):
            rests = [(STOP,) * count] if end == "stop" else product(TOKENS, repeat=count)
            found |= {one + after + rest for rest in rests}
    return {tokens for tokens in found if len(tokens) <= length}


def size(tokens: Tokens, regions: set[Tokens], after: Tokens, end: End) -> int:
    """Where the region ends: before the text after it that ends the whole, or that stands first."""
    wholes = [at for at in range(len(tokens) + 1) if tokens[:at] in regions and tokens[at:][: len(after)] == after]
    if end == "free" and wholes:
        return wholes[0]
    if tokens[-1:] == (STOP,):
        return wholes[-1]
    return min(
        at for at in range(len(tokens) + 1) if tokens[:at] in regions and tokens[at:] == after[: len(tokens) - at]
    )


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("end", ["stop", "free"])
@settings(max_examples=num_examples(8))
@given(
    before=st.lists(st.integers(0, 2), max_size=2),
    heal=st.text("ab", max_size=1),
    seam=st.text("ab", max_size=2),
    after=AFTER,
    least=st.none() | st.integers(0, 3),
    more=st.none() | st.integers(0, 1),
)
def test_a_canvas_is_allowed_exactly_if_it_is_a_hole_and_what_follows_and_is_split_there(
    end: End, hole: str, before: list[int], heal: str, seam: str, after: list[int], least: int | None, more: int | None
) -> None:
    middle = region(heal.encode(), HOLES[hole], seam.encode(), VOCABULARY)
    least = None if least is None else min(least, len(after))
    made = filling(middle, 0, before, after, end, [STOP], least, more)
    length = len(after) + 2
    texts = [each for count in range(length + (more or 0) + 1) for each in product(range(3), repeat=count)]
    regions = {each for each in texts if re.fullmatch(heal + hole + seam, text(each))}
    ends = {each[:stop] for each in regions for stop in range(max(0, len(each) - (more or 0)), len(each) + 1)}
    inside = set() if more is None else {each for each in ends if len(each) <= length}
    expected = inside | meant(regions, tuple(after), end, len(after) if least is None else least, length)
    assert allowed(made, len(before) + length) == {(*before, *tokens) for tokens in expected}
    for tokens in expected:
        whole = end == "free" and any(
            tokens[:at] in regions and tokens[at:][: len(after)] == tuple(after) for at in range(len(tokens) + 1)
        )
        within = more is not None and run(middle, tokens) != DEAD and not whole
        stop = len(tokens) if within else size(tokens, regions, tuple(after), end)
        states = [run(middle, tokens[:at]) for at in range(stop + 1)]
        assert made.split([*before, *tokens]) == (list(tokens[:stop]), states)


def run(automaton: TokenAutomaton, tokens: Tokens) -> int:
    state = 0
    for token in tokens:
        state = automaton.step(state, token) if state != DEAD else DEAD
    return state


@settings(max_examples=num_examples(10))
@given(seam=st.text("ab", max_size=1), after=AFTER.filter(len), end=st.sampled_from(["stop", "free"]))
def test_where_readings_are_too_many_a_hole_ends_where_the_text_after_it_may_begin(
    seam: str, after: list[int], end: End
) -> None:
    middle, length = region(b"", ANY_TEXT, seam.encode(), VOCABULARY), len(after) + 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockpress.constrain.filling.MOST", 0)
        made = filling(middle, 0, [], after, end, [STOP])
    texts = [each for count in range(4) for each in product(range(3), repeat=count)]
    regions = {each for each in texts if text(each).endswith(seam)}
    once = {
        each for each in regions if not any(each[:at] in regions and each[at] == after[0] for at in range(len(each)))
    }
    assert allowed(made, length) == meant(once, tuple(after), end, len(after), length)


@pytest.mark.parametrize("end", ["stop", "free"])
@pytest.mark.parametrize("unit", [[0], [0, 1], [0, 0, 1], [2, 0, 2, 1]], ids=str)
def test_states_are_as_many_as_the_tokens_after_the_hole_however_these_repeat(end: End, unit: list[int]) -> None:
    after = unit * (200 // len(unit))
    for seam in (b"", b"ab"):
        middle = region(b"", ANY_TEXT, seam, VOCABULARY)
        made = filling(middle, 0, [], after, end, [STOP], 60)
        assert len(made.places) <= 2 * len(middle.accepting) + len(after)
        assert made.split([*unit, 2, *after])[0] == [*unit, 2]


def test_sets_of_classes_that_differ_in_few_are_cut_into_blocks_which_the_posterior_does_not_see() -> None:
    letters = TokenBytes([*(bytes([letter]) for letter in range(32, 127)), None])
    made = filling(region(b"", ANY_TEXT, b"x", letters), 0, [], range(80), "stop", [95])
    automaton = made.automaton
    edges = automaton.source, automaton.label, automaton.target
    whole = replace(automaton)
    whole.__dict__["moves"] = Moves.of(*edges, len(automaton.accepting), automaton.num_classes)
    assert len(automaton.moves.member) < len(whole.moves.member) / 4
    mass = np.random.default_rng(0).normal(size=(90, automaton.num_classes))
    one, other = (posterior(each, made.start, 0, mass, mass) for each in (automaton, whole))
    assert (one.path == other.path).all() and np.allclose(one.bias, other.bias, atol=1e-9)
