"""Pins and drafts through `LM`: what is given stands in the answer, in every mode and batch, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockpress
from blockpress import sudoku
from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.decoding import Denoised, Given
from blockpress.errors import RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Network
from blockpress.text import Tokenizer

from ..conftest import num_examples

RandomNetwork = Callable[..., Network]
SHORT = Sampling(steps=3)
PUZZLE = sudoku.layout("530070000600195000098000060800060003400803001700020006060000280000419005000080079")
DIGITS = st.integers(4, 12)


@pytest.fixture(scope="module")
def lm() -> LM:
    return blockpress.load("sudoku-nano")


@pytest.fixture(scope="module")
def short(tiny: ModelConfig, random_network: RandomNetwork, digits: Tokenizer) -> LM:
    """Random weights, canvases of eight tokens."""
    config = replace(tiny, vocab_size=16, canvas_length=8, context_length=96)
    return LM(path=Path(), network=random_network(config), generation=GenerationConfig(stop_ids=(1,)), tokenizer=digits)


def reference(lm: LM) -> LM:
    """The same model, answering by the reference loop."""
    return LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=lm.tokenizer, answer=run_reference)


@settings(max_examples=num_examples(10))
@given(
    pins=st.dictionaries(st.integers(0, 23), DIGITS, min_size=1, max_size=8),
    seed=st.integers(0, 99),
    mode=st.sampled_from(["diffusion", "verified"]),
)
def test_pins_stand_in_the_answer_over_all_of_its_canvases(
    short: LM, pins: dict[int, int], seed: int, mode: Any
) -> None:
    reply = short.generate("12", 24, seed, SHORT, mode=mode, pins=pins)
    assert {place: reply.tokens[place] for place in pins} == pins


def test_pins_stand_in_every_step_and_are_certain(lm: LM) -> None:
    pins = {0: 8, 44: 5, 88: 12}
    steps = [e for e in lm.stream(PUZZLE, 90, pins=pins) if isinstance(e, Denoised)]
    for step in steps:
        assert {place: int(step.argmax[place]) for place in pins} == pins
        assert all(step.accepted[place] and step.entropy[place] == 0 for place in pins)


@settings(max_examples=num_examples(6))
@given(
    pins=st.dictionaries(st.integers(0, 20), DIGITS, max_size=4),
    draft=st.lists(DIGITS, max_size=20),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_reference_loop_and_any_batch_give_the_same_answer(
    short: LM, pins: dict[int, int], draft: list[int], noise: float, seed: int
) -> None:
    options: dict[str, Any] = {"pins": pins, **({"draft": draft, "noise": noise} if draft else {})}
    alone = short.generate("12", 24, seed, SHORT, **options)
    assert reference(short).generate("12", 24, seed, SHORT, **options) == alone
    beside = [
        *short.build_requests("12", 24, seed, SHORT, **options),
        *short.build_requests("3", 24, 1, SHORT),
        *short.build_requests("4", 24, 2, SHORT, draft=[5] * 8, noise=0.5),
    ]
    events = list(short.answer(short.network, beside, None))
    assert alone in [event.reply for event in events if isinstance(event, blockpress.Done)]


def test_rows_of_the_reference_loop_that_start_at_different_noise_levels_are_as_alone(lm: LM) -> None:
    options: list[dict[str, Any]] = [{"draft": [5] * 89, "noise": 0.3}, {}]
    requests = [lm.build_requests(PUZZLE, 90, **each)[0] for each in options]
    assert [request.row.skipped_steps(48) for request in requests] == [33, 0]
    events = reference(lm).answer(lm.network, requests, None)
    replies = [event.reply for event in events if isinstance(event, blockpress.Done)]
    alone = [lm.generate(PUZZLE, 90, **each) for each in options]
    assert sorted(replies, key=lambda reply: reply.usage.steps) == sorted(alone, key=lambda reply: reply.usage.steps)


@settings(max_examples=num_examples(8))
@given(
    places=st.sets(st.integers(0, 22), max_size=6),
    seed=st.integers(0, 99),
)
def test_pins_and_a_constraint_hold_together(short: LM, places: set[int], seed: int) -> None:
    ids = [6, 7, 6, 7, 6, 7, 8, 9, 8, 9, 6, 7, 8, 9, 8, 9, 10, 11]  # 121212343412343456
    pins = {place: ids[place] for place in places if place < len(ids)}
    reply = short.generate("1", 24, seed, SHORT, regex="(12|34)*56", pins=pins)
    assert reply.invalid is None and re.fullmatch("(12|34)*56", reply.text or "")
    assert {place: reply.tokens[place] for place in pins} == pins


def test_a_stop_id_ends_no_answer_before_its_last_pin(short: LM) -> None:
    seeds = list(range(8))
    assert all(len(reply.tokens) > 20 for reply in short.generate("12", 24, seeds, SHORT, pins={20: 5}))
    assert any(len(reply.tokens) < 20 for reply in short.generate("12", 24, seeds, SHORT))


def test_a_draft_without_noise_begins_as_it_is_and_with_all_of_it_as_a_free_canvas(short: LM) -> None:
    row = short.build_requests("12", 24, 7, draft=[5] * 24, noise=0.0)[0].row
    assert row.start == dict.fromkeys(range(8), 5)
    assert short.build_requests("12", 24, 7, draft=[5] * 24, noise=1.0)[0].row.start == {}
    free, noisy = short.generate("12", 24, 7, SHORT), short.generate("12", 24, 7, SHORT, draft=[5] * 24, noise=1.0)
    assert free == noisy


def test_a_draft_keeps_as_many_tokens_as_its_noise_leaves() -> None:
    drafted = Given(draft=dict.fromkeys(range(4000), 5), noise=dict.fromkeys(range(4000), 0.3))
    assert 0.65 < len(drafted.start_on(0, 4000, seed=1, canvas=0)) / 4000 < 0.75
    assert drafted.start_on(0, 4000, seed=1, canvas=0) != drafted.start_on(0, 4000, seed=2, canvas=0)


def test_a_draft_that_is_right_is_returned_in_fewer_steps(lm: LM) -> None:
    free = lm.generate(PUZZLE, 90)
    drafted = lm.generate(PUZZLE, 90, draft=free.text, noise=0.3)
    assert drafted.text == free.text and drafted.usage.steps < free.usage.steps


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pins": {90: 5}}, "pins has position 90, and the answer has room for 90"),
        ({"pins": {0: 16}}, "pins has 16 at position 0"),
        ({"pins": {0: "5"}}, "pins has '5' at position 0"),
        ({"pins": {-1: 5}}, "pins has position -1"),
        ({"pins": {True: 5}}, "pins has position True"),
        ({"pins": [(0, 5)]}, r"pins is \[\(0, 5\)\]"),
        ({"pins": {3: 1, 5: 4}}, "stop id 1 at position 3 and text at 5"),
        ({"pins": {0: 4}, "mode": "autoregressive"}, "mode 'autoregressive', which has no canvas"),
        ({"draft": "12", "mode": "autoregressive"}, "draft is given in the mode 'autoregressive'"),
        ({"pins": {0: 4}, "regex": "99*"}, "contradict regex '99\\*'"),
        ({"pins": {89: 4}, "regex": "99*"}, "contradict"),
        ({"draft": "x"}, "no token for 'x'"),
        ({"draft": ""}, "draft is empty"),
        ({"draft": [1, 99]}, "draft holds id 99 at position 1"),
        ({"draft": [5] * 91}, "draft has 91 tokens, and the answer has room for 90"),
        ({"draft": "12", "noise": 1.5}, "noise is 1.5"),
        ({"draft": "12", "noise": "half"}, "noise is 'half'"),
        ({"noise": 0.5}, "noise is 0.5 without a draft"),
    ],
)
def test_what_cannot_stand_in_the_answer_is_refused_by_name(lm: LM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(blockpress.BlockpressError, match=words):
        lm.build_requests(PUZZLE, 90, **options)


def test_an_engine_with_too_little_memory_refuses_pins_that_do_not_fit(short: LM) -> None:
    (request,) = short.build_requests("12", 40, pins={30: 5})
    with pytest.raises(RequestError, match="pins has position 30, and the answer has room for 16"):
        request.row.limit(16)
