"""Edited logits through `LM`: in every mode, beside constraints, pins, drafts and holes, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import blockpress
from blockpress import sudoku
from blockpress.config import AutoregressiveSampling, GenerationConfig, ModelConfig, Sampling
from blockpress.errors import RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Network
from blockpress.text import Tokenizer

RandomNetwork = Callable[..., Network]
SHORT = Sampling(steps=3, t_max=1.5)
PUZZLE = sudoku.layout("530070000600195000098000060800060003400803001700020006060000280000419005000080079")


@pytest.fixture(scope="module")
def short(tiny: ModelConfig, random_network: RandomNetwork, digits: Tokenizer) -> LM:
    """Random weights, canvases of eight tokens."""
    config = replace(tiny, vocab_size=16, canvas_length=8, context_length=96)
    return LM(path=Path(), network=random_network(config), generation=GenerationConfig(stop_ids=(1,)), tokenizer=digits)


@pytest.fixture(scope="module")
def lm() -> LM:
    """With a third of its steps: what it is sure of needs fewer."""
    loaded = blockpress.load("sudoku-nano")
    loaded.generation = replace(loaded.generation, sampling=Sampling(steps=16))
    return loaded


def reference(lm: LM) -> LM:
    """The same model, answering by the reference loop."""
    return LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=lm.tokenizer, answer=run_reference)


def ids(lm: LM, text: str) -> list[int]:
    assert lm.tokenizer is not None
    return lm.tokenizer.encode(text, add_special=False)


CASES: list[dict[str, Any]] = [
    {"mode": "diffusion"},
    {"mode": "verified"},
    {"mode": "diffusion", "logprobs": 2},
    {"mode": "diffusion", "pins": {3: 9, 12: 5}},
    {"mode": "diffusion", "draft": "123456", "noise": 0.3},
    {"mode": "diffusion", "regex": "[1-9]{5,12}"},
    {"mode": "verified", "choice": ["1234567", "22334455667788", "98"]},
    {"mode": "diffusion", "regex": "[1-9]*", "pins": {2: 9}, "logprobs": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_edits_go_with_all_else_that_is_asked_of_an_answer(short: LM, case: dict[str, Any]) -> None:
    """The engine and the reference loop write the same, and what is suppressed is not in it."""
    edited = SHORT.with_(
        logit_bias={6: 3.0, 1: -3.0}, suppress_tokens=[7], frequency_penalty=1.0, repetition_penalty=1.2, top_k=6
    )
    ours = short.generate("123", 20, 0, edited, **case)
    theirs = reference(short).generate("123", 20, 0, edited, **case)
    assert (ours.tokens, ours.usage, ours.invalid) == (theirs.tokens, theirs.usage, None)
    assert 7 not in ours.tokens or "choice" in case
    for place, token in (case.get("pins") or {}).items():
        assert ours.tokens[place : place + 1] in ([token], [])


def test_a_bias_chooses_among_what_a_constraint_allows(lm: LM) -> None:
    """Of two texts that a constraint allows, the one that the bias favours; and the constraint stays."""
    [five], [six] = ids(lm, "5"), ids(lm, "6")
    for favoured, text in ((five, "555"), (six, "666")):
        sampling = lm.generation.sampling.with_(logit_bias={favoured: 100}, steps=8)
        reply = lm.generate(PUZZLE, 20, sampling=sampling, choice=["555", "666", "777"])
        assert (reply.text, reply.invalid) == (text, None)
        assert lm.generate(PUZZLE, 9, sampling=sampling).text == text * 3


def test_what_must_stand_stands_though_it_is_banned(lm: LM) -> None:
    """Pins, and what a constraint leaves no choice about."""
    [five] = ids(lm, "5")
    sampling = lm.generation.sampling.with_(suppress_tokens=[five], steps=8)
    assert "5" not in (lm.generate(PUZZLE, 89, sampling=sampling).text or "5")
    assert lm.generate(PUZZLE, 20, sampling=sampling, choice=["515"]).text == "515"
    assert lm.generate(PUZZLE, 9, sampling=sampling, pins={4: five}).tokens[4] == five
    assert "5" not in (lm.generate(PUZZLE, 9, sampling=sampling, regex="[1-9]{9}").text or "5")


def test_only_a_row_with_edits_is_changed_by_them(lm: LM) -> None:
    """Requests of a call share a sampling; those of several calls run together and do not."""
    short = lm.generation.sampling.with_(steps=8)
    plain = lm.generate([PUZZLE, PUZZLE[:40]], 30, [1, 2], short)
    stream = lm.stream(PUZZLE, 30, 3, short.with_(logit_bias={ids(lm, "5")[0]: 100}))
    next(stream)
    again = lm.generate([PUZZLE, PUZZLE[:40]], 30, [1, 2], short)
    assert [reply.tokens for reply in again] == [reply.tokens for reply in plain]


def test_a_hole_is_filled_by_edited_logits_and_the_text_around_it_stays(lm: LM) -> None:
    solved = sudoku.layout("534678912672195348198342567859761423426853791713924856961537284287419635345286179")
    prefix, suffix = PUZZLE + solved[:30], solved[36:]
    free = lm.infill(prefix, suffix, 12)
    assert free.text == solved[30:36]
    banned = ids(lm, free.text[:1])
    edited = lm.infill(prefix, suffix, 12, sampling=lm.generation.sampling.with_(suppress_tokens=banned))
    assert free.text[0] not in edited.text and edited.whole == prefix + edited.text + suffix


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        (Sampling, "logit_bias", {16: 1.0}, "sampling.logit_bias has token id 16"),
        (AutoregressiveSampling, "allowed_token_ids", [3, 99], "sampling.allowed_token_ids has token id 99"),
        (Sampling, "suppress_tokens", [16], "sampling.suppress_tokens has token id 16"),
        (Sampling, "suppress_tokens", range(16), "bans the whole vocabulary"),
    ],
)
def test_ids_that_are_not_in_the_vocabulary_are_refused(
    short: LM, kind: Any, field: str, value: Any, said: str
) -> None:
    mode = "diffusion" if kind is Sampling else "autoregressive"
    with pytest.raises(RequestError, match=said):
        short.generate("1", sampling=kind(**{field: value}), mode=mode)
    if kind is Sampling:
        with pytest.raises(RequestError, match=said):
            short.infill("1", "2", sampling=kind(**{field: value}))
