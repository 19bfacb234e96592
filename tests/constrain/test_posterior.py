"""The posterior of a canvas equals that of all its texts, counted one by one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain import CanvasConstraint
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import TokenAutomaton, TokenBytes, lift
from blockpress.ops import chain, compiled
from tests.conftest import num_examples

PIECES: list[bytes | None] = [None, b"a", b"b", b"ab", b"ba", b"c"]
STOP = 0


def automaton_of(pattern: str) -> TokenAutomaton:
    return lift(compile_expression(parse_regex(pattern)), TokenBytes(PIECES)).with_stops([STOP])


def is_allowed(pattern: str, tokens: tuple[int, ...], left: int) -> bool:
    """Whether these tokens are an allowed text, stops behind it, or `left` more can complete one."""
    text, end = b"", len(tokens)
    if STOP in tokens:
        end = tokens.index(STOP)
        if any(token != STOP for token in tokens[end:]):
            return False
    for token in tokens[:end]:
        text += PIECES[token] or b""
    texts = {text}
    for _ in range(left + 1 if end == len(tokens) else 1):
        if any(re.fullmatch(pattern.encode(), each) for each in texts):
            return True
        texts = {each + piece for each in texts for piece in PIECES if piece}
    return False


@pytest.fixture(params=["C++", "numpy"], autouse=True, scope="module")
def version(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(chain, "_library", lambda: None)
        elif compiled.library("chain") is None:
            pytest.skip("no C++ compiler")
        yield


@settings(max_examples=num_examples(40))
@given(
    pattern=st.sampled_from(["(ab)*c?", "a{2,3}b|c", "[abc]*", "(a|ba)+", "abcab"]),
    length=st.integers(1, 4),
    left=st.integers(0, 3),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
)
def test_probabilities_and_the_best_canvas_are_those_of_all_allowed_texts(
    pattern: str, length: int, left: int, seed: int, spread: float
) -> None:
    automaton = automaton_of(pattern)
    if automaton.distance[0] > length + left:
        return
    logits = np.random.default_rng(seed).normal(size=(length, len(PIECES))) * spread
    allowed = [t for t in itertools.product(range(len(PIECES)), repeat=length) if is_allowed(pattern, t, left)]
    weights = np.array([sum(logits[i, token] for i, token in enumerate(tokens)) for tokens in allowed])
    shares = np.exp(weights - weights.max())
    expected = np.zeros_like(logits)
    for tokens, share in zip(allowed, shares / shares.sum(), strict=True):
        expected[np.arange(length), list(tokens)] += share
    constraint = CanvasConstraint(automaton, 0, length, left)
    biased, argmax = constraint(torch.tensor(logits, dtype=torch.float32))
    np.testing.assert_allclose(biased.double().softmax(-1).numpy(), expected, atol=2e-5)
    best = tuple(argmax.tolist())
    assert best in allowed
    assert weights[allowed.index(best)] >= weights.max() - 1e-3


@pytest.mark.parametrize("kept", [1, 3])
def test_positions_that_the_answer_drops_stay_as_they_are(kept: int) -> None:
    logits = torch.randn(4, len(PIECES), generator=torch.Generator().manual_seed(0))
    biased, argmax = CanvasConstraint(automaton_of("a*"), 0, kept, 0)(logits)
    assert torch.equal(biased[kept:], logits[kept:])
    assert torch.equal(argmax[kept:], logits[kept:].argmax(-1))


def test_a_token_without_any_probability_is_never_chosen() -> None:
    logits = torch.zeros(2, len(PIECES))
    logits[:, 1] = float("-inf")  # "a"
    biased, argmax = CanvasConstraint(automaton_of("a?b?"), 0, 2, 0)(logits)
    assert 1 not in argmax.tolist()
    assert biased.softmax(-1)[:, 1].tolist() == [0.0, 0.0]


def test_a_canvas_that_no_allowed_text_can_fill_has_no_probabilities() -> None:
    logits = torch.zeros(3, len(PIECES))
    logits[:, [2, 3, 4]] = float("-inf")  # all that write "b"
    biased, argmax = CanvasConstraint(automaton_of("[bc]b"), 0, 3, 0)(logits)
    assert biased.softmax(-1).isnan().all()
    assert all(0 <= token < len(PIECES) for token in argmax.tolist())
