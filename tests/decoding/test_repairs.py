"""Repairs: only places that the causal pass finds unlikely change, others are held, within a budget, in any batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.config import Sampling
from blockpress.constrain import Constraint, ConstraintState
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import TokenBytes
from blockpress.decoding import Committed, Denoised, Event, Given, SequenceState
from blockpress.decoding.generate import generate
from blockpress.decoding.verified import generate_verified
from blockpress.errors import RequestError
from blockpress.model import Network
from tests.conftest import make_random_network

from .test_scoring import CANVAS, CONFIG, LOOSE, PROMPTS, VOCAB, replies, truth

pytestmark = pytest.mark.end_to_end

BELOW = 0.05
REPAIRED = LOOSE.with_(max_repairs=3, repair_below=BELOW)


@pytest.fixture(scope="module")
def network() -> Network:
    return make_random_network(CONFIG, seed=3).requires_grad_(False)


def rows(prompts: Sequence[list[int]] = PROMPTS, **changes: Any) -> list[SequenceState]:
    given = {"stop_ids": (), "canvas_length": CANVAS, "room": 60, "max_tokens": 2 * CANVAS} | changes
    return [SequenceState(index, prompt, index, **given) for index, prompt in enumerate(prompts)]


def canvases(events: Sequence[Event], row: int) -> list[list[list[int]]]:
    """Of each canvas of a row, its tokens when it settled first and after each repair."""
    found: dict[int, dict[int, list[int]]] = {}
    for event in events:
        if isinstance(event, Denoised) and event.row == row:
            found.setdefault(event.canvas, {})[event.repairs] = event.argmax.tolist()
    return [[rounds[number] for number in sorted(rounds)] for _, rounds in sorted(found.items())]


def test_only_unlikely_places_change_and_what_no_repair_has_tried_is_likely_in_the_end(network: Network) -> None:
    given = rows()
    events = list(generate_verified(network, given, REPAIRED))
    repairs = 0
    for row in given:
        before = list(row.prompt)
        for rounds in canvases(events, row.index):
            tried: set[tuple[int, int]] = set()
            for earlier, later in pairwise(rounds):
                unlikely = {
                    place
                    for place, scored in enumerate(truth(network, before, earlier, 0))
                    if scored.logprob < math.log(BELOW) and (place, earlier[place]) not in tried
                }
                assert unlikely and all(earlier[i] == later[i] for i in range(CANVAS) if i not in unlikely)
                tried |= {(place, earlier[place]) for place in unlikely}
                repairs += 1
            if len(rounds) <= REPAIRED.max_repairs:
                scored = truth(network, before, rounds[-1], 0)
                assert all(s.logprob >= math.log(BELOW) or (i, s.token) in tried for i, s in enumerate(scored))
            before += rounds[-1]
    assert repairs == sum(reply.usage.repairs for reply in replies(events)) > 0


def test_a_repaired_canvas_is_committed_only_afterwards_and_its_forwards_are_counted(network: Network) -> None:
    events = list(generate_verified(network, rows(), REPAIRED))
    for row, reply in enumerate(replies(events)):
        own = [event for event in events if isinstance(event, Denoised | Committed) and event.row == row]
        committed = [place for place, event in enumerate(own) if isinstance(event, Committed)]
        for place in committed:
            assert not any(isinstance(event, Denoised) and event.canvas == own[place].canvas for event in own[place:])
        steps = len(own) - len(committed)
        passes = reply.usage.repairs + sum(
            isinstance(event, Committed) and rounds <= REPAIRED.max_repairs
            for event, rounds in zip(
                [own[place] for place in committed], [len(each) for each in canvases(events, row)], strict=True
            )
        )
        unread = sum(len(each) > REPAIRED.max_repairs for each in canvases(events, row)[:-1])
        assert (reply.usage.steps, reply.usage.forwards) == (steps, steps + passes + unread)
        assert reply.usage.redos == reply.usage.verifications == 0


def test_where_nothing_is_unlikely_it_is_generate_with_a_causal_pass_more(network: Network) -> None:
    sampling = LOOSE.with_(max_repairs=5, repair_below=1e-30)
    ours, theirs = (
        replies(list(generate_verified(network, rows(), sampling))),
        replies(list(generate(network, rows(), LOOSE))),
    )
    assert [reply.tokens for reply in ours] == [reply.tokens for reply in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.usage.repairs, one.usage.forwards) == (0, other.usage.forwards + 1)


def test_a_repair_ends_though_its_budget_would_allow_more(network: Network) -> None:
    """The same token at the same place is tried once."""
    found = replies(
        list(generate_verified(network, rows(max_tokens=CANVAS), LOOSE.with_(max_repairs=1000, repair_below=0.9)))
    )
    assert all(0 < reply.usage.repairs <= CANVAS * VOCAB for reply in found)


@given(
    repairs=st.integers(1, 3),
    chosen=st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True),
    stop=st.integers(0, VOCAB - 1),
)
@settings(max_examples=4)
def test_a_row_of_a_batch_is_the_row_alone(repairs: int, chosen: list[int], stop: int) -> None:
    net = make_random_network(CONFIG, seed=3).requires_grad_(False)
    sampling = REPAIRED.with_(max_repairs=repairs, repair_below=0.2)

    def one(index: int, place: int) -> SequenceState:
        [row] = rows([PROMPTS[index]], stop_ids=(stop,))
        row.index, row.seed = place, index
        return row

    together = replies(list(generate_verified(net, [one(index, i) for i, index in enumerate(chosen)], sampling)))
    alone = [replies(list(generate_verified(net, [one(index, 0)], sampling)))[0] for index in chosen]
    assert [(reply.tokens, reply.usage) for reply in together] == [(reply.tokens, reply.usage) for reply in alone]


def test_an_answer_whose_end_is_repaired_may_go_on_and_ends_again(network: Network) -> None:
    free = replies(list(generate(network, rows(), LOOSE)))
    stop_ids = {reply.tokens[2] for reply in free}
    found = replies(list(generate_verified(network, rows(stop_ids=stop_ids), REPAIRED.with_(repair_below=0.3))))
    plain = replies(list(generate(network, rows(stop_ids=stop_ids), LOOSE)))
    assert [reply.tokens for reply in found] != [reply.tokens for reply in plain]
    for reply in found:
        assert not stop_ids & set(reply.tokens[:-1])
        assert (reply.finish_reason == "stop") == (reply.tokens[-1] in stop_ids)


def test_repairs_keep_a_constraint(network: Network) -> None:
    pieces = TokenBytes([None, *(chr(96 + i).encode() for i in range(1, VOCAB))])
    constraint = Constraint.of(parse_regex("([a-d]{3}|[e-o]{2})*a"), pieces, (0,), "the pattern")
    given = [
        SequenceState(
            i,
            [5, 6],
            i,
            stop_ids=(0,),
            canvas_length=CANVAS,
            room=60,
            max_tokens=11,
            constraint=ConstraintState(constraint),
        )
        for i in range(4)
    ]
    found = replies(list(generate_verified(network, given, REPAIRED.with_(repair_below=0.3))))
    assert all(reply.invalid is None for reply in found) and sum(reply.usage.repairs for reply in found)


SMALL = replace(CONFIG, hidden_size=VOCAB)
QUOTE, WORD, PLAIN, END = 3, 7, 8, 9


class Neighbours(Network):
    """From noise it is sure of a quote and of a word without one, each as if the other were not there; a word that it
    writes beside the quote has one. Its causal pass never saw a quote before a word without one."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed_tokens.weight.copy_(torch.eye(VOCAB))
        self.requires_grad_(False)

    def denoise(self, canvas: torch.Tensor, cache: Any, signal: Any) -> torch.Tensor:
        best = torch.full_like(canvas, END)
        best[:, 0] = QUOTE
        best[:, 1] = torch.where((canvas[:, 0] == QUOTE) & (canvas[:, 1] != PLAIN), WORD, PLAIN)
        return torch.nn.functional.one_hot(best, VOCAB).float() * 100

    def read(self, tokens: torch.Tensor, cache: Any, counts: Any = None, images: Any = None) -> Any:
        _, grown = super().read(tokens, cache, counts)
        expected = torch.where(tokens == QUOTE, WORD, torch.where((tokens == WORD) | (tokens == END), END, QUOTE))
        return torch.nn.functional.one_hot(expected, VOCAB).float() * 4, grown


def test_neighbours_that_do_not_fit_are_made_to_fit() -> None:
    """Which no threshold of confidence does: both are certain when the canvas settles."""

    def written(sampling: Sampling) -> Any:
        [row] = rows([[1, 2]], max_tokens=CANVAS)
        [reply] = replies(list(generate_verified(Neighbours(), [row], sampling)))
        return reply

    sampling = Sampling(steps=8)
    plain = written(sampling)
    assert plain.tokens[:2] == [QUOTE, PLAIN] and plain.usage.steps < 8
    mended = written(sampling.with_(max_repairs=4, repair_below=0.1))
    assert mended.tokens == [QUOTE, WORD, *plain.tokens[2:]]
    assert mended.usage.repairs == 1 and mended.usage.forwards < 2 * plain.usage.forwards + 3


def test_what_was_given_is_never_repaired(network: Network) -> None:
    pins = {1: 3, CANVAS + 2: 4}
    given = rows(given=Given(pins=pins, draft={0: 5}))
    found = replies(list(generate_verified(network, given, REPAIRED.with_(repair_below=0.9))))
    assert all(reply.tokens[place] == token for reply in found for place, token in pins.items())
    assert all(reply.usage.repairs for reply in found)


# --------------------------------------------------------------------------------------------------------------- spans


def everywhere(tokens: Sequence[int]) -> list[tuple[int, int]]:
    return [(0, len(tokens))]


@pytest.mark.parametrize("sampling", [REPAIRED, LOOSE.with_(max_verifications=3)], ids=["repaired", "verified"])
def test_spans_choose_what_is_checked(network: Network, sampling: Sampling) -> None:
    def found(spans: Any, which: Sampling = sampling) -> list[list[int]]:
        some = which.with_(checked_spans=spans)
        return [reply.tokens for reply in replies(list(generate_verified(network, rows(), some)))]

    checked, unchecked = found(None), found(None, LOOSE)
    assert found(everywhere) == checked
    assert found(lambda tokens: []) == unchecked != checked
    assert found(lambda tokens: [(1, 3), (-5, 0), (CANVAS + 2, 10**9)]) not in (checked, unchecked)


def test_nothing_outside_of_the_spans_is_repaired(network: Network) -> None:
    sampling = REPAIRED.with_(checked_spans=lambda tokens: [(2, 4), (CANVAS + 1, CANVAS + 2)], repair_below=0.5)
    events = list(generate_verified(network, rows(), sampling))
    allowed, changed = [{2, 3}, {1}], 0
    for row in range(len(PROMPTS)):
        for number, rounds in enumerate(canvases(events, row)):
            for earlier, later in pairwise(rounds):
                places = {i for i in range(CANVAS) if earlier[i] != later[i]}
                assert places <= allowed[number]
                changed += len(places)
    assert changed


@pytest.mark.parametrize("spans", [lambda tokens: 5, lambda tokens: [1, 2], lambda tokens: [("a", "b")]])
def test_a_rule_that_gives_no_spans_is_named(network: Network, spans: Any) -> None:
    with pytest.raises(RequestError, match="checked_spans gave"):
        list(generate_verified(network, rows(), REPAIRED.with_(checked_spans=spans)))
