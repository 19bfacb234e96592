"""The automaton over tokens: an edge for each token whose bytes lead from state to state, and no other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.automaton import DEAD
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import FAR, Moves, TokenAutomaton, TokenBytes, lift
from blockpress.errors import RequestError
from tests.conftest import num_examples

PIECES = st.lists(
    st.one_of(st.none(), st.binary(max_size=4), st.text("abcé", min_size=1, max_size=4).map(str.encode)), max_size=30
)
PATTERNS = st.sampled_from(["[abc]*", "(ab|ba)+c?", "a{2,4}", "é+|b", "[^a]{1,3}", "abc"])


def edges(automaton: TokenAutomaton) -> set[tuple[int, int, int]]:
    """(source, token, target), token by token."""
    return {
        (source, token, target)
        for token in range(len(automaton.class_of))
        for source in range(len(automaton.accepting))
        if (target := automaton.step(source, token)) != DEAD
    }


@settings(max_examples=num_examples(40))
@given(pattern=PATTERNS, pieces=PIECES)
def test_an_edge_exists_for_the_tokens_whose_bytes_lead_there(pattern: str, pieces: list[bytes | None]) -> None:
    automaton = compile_expression(parse_regex(pattern))
    lifted = lift(automaton, TokenBytes(pieces))
    expected = {
        (state, token, target)
        for token, piece in enumerate(pieces)
        if piece
        for state in range(len(automaton))
        if (target := automaton.run(piece, state)) != DEAD
    }
    ends = {state for state in range(len(automaton)) if lifted.distance[state] < FAR}
    assert edges(lifted) == {(a, token, b) for a, token, b in expected if a in ends and b in ends}


@settings(max_examples=num_examples(40))
@given(pattern=PATTERNS, pieces=PIECES)
def test_the_distance_is_the_fewest_tokens_to_an_end(pattern: str, pieces: list[bytes | None]) -> None:
    lifted = lift(compile_expression(parse_regex(pattern)), TokenBytes(pieces))
    ways = edges(lifted)
    reached = {state for state in range(len(lifted.accepting)) if lifted.accepting[state]}
    for count in range(len(lifted.accepting) + 1):
        assert {state for state in range(len(lifted.accepting)) if lifted.distance[state] <= count} == reached
        reached |= {a for a, _, b in ways if b in reached}


@settings(max_examples=num_examples(40))
@given(pattern=PATTERNS, pieces=PIECES)
def test_tokens_of_one_class_have_the_same_edges_and_others_do_not(pattern: str, pieces: list[bytes | None]) -> None:
    lifted = lift(compile_expression(parse_regex(pattern)), TokenBytes(pieces))
    by_token: dict[int, frozenset[tuple[int, int]]] = {}
    for token in range(len(pieces)):
        by_token[token] = frozenset((a, b) for a, other, b in edges(lifted) if other == token)
    assert {token for token, ways in by_token.items() if ways} == {*np.nonzero(lifted.class_of != DEAD)[0].tolist()}
    alive = [token for token, ways in by_token.items() if ways]
    assert len({by_token[token] for token in alive}) == len({int(lifted.class_of[token]) for token in alive})
    assert len({(by_token[token], int(lifted.class_of[token])) for token in alive}) == lifted.num_classes


@settings(max_examples=num_examples(40))
@given(pattern=PATTERNS, pieces=PIECES, block=st.sampled_from([1, 2, 1 << 30]))
def test_moves_are_the_edges_joined(pattern: str, pieces: list[bytes | None], block: int) -> None:
    lifted = lift(compile_expression(parse_regex(pattern)), TokenBytes(pieces)).with_stops([])
    edges = lifted.source, lifted.label, lifted.target
    moves = Moves.of(*edges, len(lifted.accepting), lifted.num_classes, block)
    ways = zip(moves.graph.source.tolist(), moves.graph.target.tolist(), moves.graph.label, strict=True)
    joined = [
        (source, int(moves.member[at]), target)
        for source, target, label in ways
        for at in np.nonzero(moves.label == label)[0]
    ]
    assert sorted(joined) == sorted(zip(*(each.tolist() for each in edges), strict=True))
    blocks = {(source, target, each // block) for source, each, target in joined}
    assert len(blocks) == len(moves.graph.source)


def test_stop_ids_end_a_text_and_only_more_of_them_follow() -> None:
    lifted = lift(compile_expression(parse_regex("ab?")), TokenBytes([None, b"a", b"b", None])).with_stops([0, 3])
    after_a = lifted.step(0, 1)
    last = lifted.step(after_a, 0)
    assert lifted.step(0, 0) == DEAD and last != DEAD and lifted.accepting[last]
    assert {lifted.step(last, token) for token in (0, 3)} == {last}
    assert lifted.step(last, 1) == lifted.step(last, 2) == DEAD


def test_a_vocabulary_that_cannot_write_a_text_is_far_from_its_end() -> None:
    assert lift(compile_expression(parse_regex("x")), TokenBytes([b"a", b"b"])).distance[0] == FAR
    assert lift(compile_expression(parse_regex("x")), TokenBytes([])).distance[0] == FAR


def test_a_shape_of_too_many_edges_is_refused_before_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    automaton, vocabulary = compile_expression(parse_regex("[ab]{9}")), TokenBytes([b"a", b"b", b"ab"])
    lift(automaton, vocabulary)
    monkeypatch.setattr("blockpress.constrain.tokens.MAX_EDGES", 10)
    with pytest.raises(RequestError, match="more than 10 edges over tokens"):
        lift(automaton, vocabulary)
