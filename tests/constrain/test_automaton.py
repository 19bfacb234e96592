"""Automata: minimal, byte-exact for UTF-8, closed under intersection and difference."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.automaton import (
    ANY_CHAR,
    DEAD,
    EMPTY_TEXT,
    Automaton,
    Bytes,
    Chars,
    Concat,
    Expression,
    Graph,
    Repeat,
    Union,
    _NothingMatches,
    difference,
    intersection,
    literal,
    optional,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.nondeterministic import Work
from blockpress.errors import RequestError
from tests.conftest import num_examples

WORDS = st.lists(st.text("abé", max_size=3), min_size=1, max_size=6)


def words(texts: list[str]) -> Automaton:
    return compile_expression(Union(tuple(literal(text) for text in texts)))


@settings(max_examples=num_examples(40))
@given(low=st.integers(0, 0x10FFFF), size=st.integers(0, 5000), points=st.lists(st.integers(0, 0x10FFFF), max_size=20))
def test_a_range_of_characters_allows_just_their_bytes(low: int, size: int, points: list[int]) -> None:
    high = min(low + size, 0x10FFFF)
    try:
        automaton = compile_expression(Chars(((low, high),)))
    except _NothingMatches:
        assert low >= 0xD800 and high <= 0xDFFF
        return
    for point in (low - 1, low, high, high + 1, *points):
        if 0 <= point <= 0x10FFFF:
            is_surrogate = 0xD800 <= point <= 0xDFFF
            assert automaton.matches(chr(point)) == (low <= point <= high and not is_surrogate)


def test_any_character_is_well_formed_utf_8() -> None:
    automaton = compile_expression(ANY_CHAR)
    for text in (b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xe2\x82", b"\xff"):
        assert not automaton.matches(text)


@settings(max_examples=num_examples(40))
@given(first=WORDS, second=WORDS)
def test_intersection_and_difference_are_those_of_the_sets(first: list[str], second: list[str]) -> None:
    for operation, expected in ((intersection, {*first} & {*second}), (difference, {*first} - {*second})):
        try:
            automaton = operation(words(first), words(second))
        except _NothingMatches:
            assert not expected
            continue
        assert {text for text in {*first, *second} if automaton.matches(text)} == expected


@settings(max_examples=num_examples(40))
@given(texts=WORDS)
def test_no_two_states_accept_the_same_and_every_state_ends(texts: list[str]) -> None:
    automaton = words(texts)

    def after(state: int) -> frozenset[bytes]:
        found = {b""} if automaton.accepting[state] else set()
        for byte, target in enumerate(automaton.table[state].tolist()):
            if target != DEAD:
                found |= {bytes([byte]) + rest for rest in after(target)}
        return frozenset(found)

    languages = [after(state) for state in range(len(automaton))]
    assert len(set(languages)) == len(languages)
    assert all(languages) and languages[0] == {text.encode() for text in texts}


@pytest.mark.parametrize(
    ("expression", "allowed", "refused"),
    [
        (Repeat(literal("ab"), 2, 3), ["abab", "ababab"], ["ab", "abababab", ""]),
        (Repeat(literal("a"), 0, 0), [""], ["a"]),
        (Repeat(literal("a"), 2, None), ["aa", "a" * 9], ["a"]),
        (Repeat(Repeat(literal("a"), 0, None), 0, None), ["", "aaa"], ["b"]),
        (Concat((optional(literal("a")), EMPTY_TEXT, literal("b"))), ["b", "ab"], ["a", ""]),
        (Graph(((0, literal("a"), 2), (2, literal(","), 0), (2, EMPTY_TEXT, 1))), ["a", "a,a"], ["", "a,"]),
        (Bytes(65, 66), ["A", "B"], ["C", "AB"]),
        (Union((literal("a"), Concat((literal("a"), literal("b"))))), ["a", "ab"], ["b"]),
    ],
)
def test_an_expression_allows_its_texts(expression: Expression, allowed: list[str], refused: list[str]) -> None:
    automaton = compile_expression(expression)
    assert [text for text in (*allowed, *refused) if automaton.matches(text)] == allowed


@pytest.mark.parametrize("expression", [Union(()), Chars(()), Concat((literal("a"), Union(()))), Graph(())])
def test_an_expression_without_texts_is_told_apart(expression: Expression) -> None:
    with pytest.raises(_NothingMatches):
        compile_expression(expression)


def test_too_many_states_are_refused() -> None:
    with pytest.raises(RequestError, match="states"):
        compile_expression(Repeat(literal("ab"), 15_000, None))


def test_more_work_than_is_left_is_told_by_counting_it() -> None:
    with pytest.raises(RequestError, match="work"):
        compile_expression(Repeat(literal("ab"), 50, None), Work(99))
    assert len(compile_expression(Repeat(literal("ab"), 50, None), Work(300))) == 101
