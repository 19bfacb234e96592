"""Constrained answers through `LM`: valid or cut and told, the same in any batch and by the reference loop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lark import Lark

import blockpress
from blockpress import sudoku
from blockpress.config import AutoregressiveSampling, GenerationConfig, ModelConfig, Sampling
from blockpress.errors import RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Network
from blockpress.text import Tokenizer
from tests.conftest import num_examples

RandomNetwork = Callable[..., Network]
GRID = r"([1-9]{9}\n){8}[1-9]{9}"
NESTED = 'start: "1" start "2" start "3" | "45"*'
PUZZLE = sudoku.layout("530070000600195000098000060800060003400803001700020006060000280000419005000080079")


def nested(around: Callable[[Any], Any], times: int) -> Any:
    value: Any = {}
    for _ in range(times):
        value = around(value)
    return value


@pytest.fixture(scope="module")
def lm() -> LM:
    """With a third of its steps: what it is sure of needs fewer."""
    loaded = blockpress.load("sudoku-nano")
    loaded.generation = replace(loaded.generation, sampling=Sampling(steps=16))
    return loaded


@pytest.fixture(scope="module")
def reference(lm: LM) -> LM:
    """The same model, answering by the reference loop."""
    return LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=lm.tokenizer, answer=run_reference)


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize(
    "options",
    [
        {"regex": GRID},
        {"regex": "(12|34)*5"},
        {"choice": ["12", "7", "999"]},
        {"schema": {"type": "integer", "minimum": 10}},
        {"grammar": NESTED},
    ],
    ids=["grid", "pairs", "choice", "schema", "grammar"],
)
def test_an_answer_satisfies_its_constraint(lm: LM, mode: str, options: dict[str, Any]) -> None:
    sampling = lm.generation.sampling.with_(steps=6) if mode == "diffusion" else lm.generation.autoregressive
    reply = lm.generate(PUZZLE, 89 if GRID in options.values() else 30, sampling=sampling, mode=mode, **options)
    assert reply.invalid is None
    assert reply.text is not None
    if "regex" in options:
        assert re.fullmatch(options["regex"], reply.text)
    elif "choice" in options:
        assert reply.text in options["choice"]
    elif "grammar" in options:
        Lark(NESTED).parse(reply.text)
    else:
        assert json.loads(reply.text) >= 10


def test_a_form_that_the_model_keeps_anyway_leaves_its_answer(lm: LM) -> None:
    assert lm.generate(PUZZLE, 90, regex=GRID).text == lm.generate(PUZZLE, 90).text


@settings(max_examples=num_examples(10))
@given(
    pattern=st.sampled_from(["[1-9]+", "(1|22)*3", r"(\d\n)*", "1{5,9}2", r"[^1]{3,}"]),
    most=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_an_answer_closes_in_time_or_says_that_it_did_not(lm: LM, pattern: str, most: int, seed: int) -> None:
    least = {"[1-9]+": 1, "(1|22)*3": 1, r"(\d\n)*": 1, "1{5,9}2": 6, "[^1]{3,}": 3}[pattern]
    if most < least:
        with pytest.raises(RequestError, match=f"needs {least} tokens"):
            lm.generate("12", most, seed, Sampling(steps=2), regex=pattern)
        return
    reply = lm.generate("12", most, seed, Sampling(steps=2), regex=pattern)
    assert reply.invalid is None and re.fullmatch(pattern, reply.text or "")
    assert len(reply.tokens) <= most


@pytest.fixture(scope="module")
def small(tiny: ModelConfig, random_network: RandomNetwork, digits: Tokenizer) -> LM:
    """Random weights with a canvas of 8."""
    network = random_network(replace(tiny, vocab_size=16, canvas_length=8, context_length=96))
    return LM(path=Path(), network=network, generation=GenerationConfig(stop_ids=(1,)), tokenizer=digits)


@pytest.fixture(scope="module")
def large(gemma: Tokenizer, tiny: ModelConfig, random_network: RandomNetwork) -> LM:
    """Random weights over the published vocabulary."""
    network = random_network(replace(tiny, vocab_size=262_144, canvas_length=16, context_length=512))
    return LM(path=Path(), network=network, generation=GenerationConfig(stop_ids=(1, 106)), tokenizer=gemma)


def in_reference(model: LM) -> LM:
    return LM(
        path=model.path,
        network=model.network,
        generation=model.generation,
        tokenizer=model.tokenizer,
        answer=run_reference,
    )


@settings(max_examples=num_examples(5))
@given(
    options=st.sampled_from([{"regex": r"(12){3,9}3"}, {"regex": r"[3-9\n]+1?"}, {"choice": ["12", "7", "99999"]}]),
    most=st.integers(7, 18),
    seed=st.integers(0, 99),
)
def test_a_canvas_in_full_agreement_is_the_greedy_answer_under_the_same_constraint(
    small: LM, options: dict[str, Any], most: int, seed: int
) -> None:
    """So no token that the causal pass puts in is forbidden."""
    sampling = Sampling(steps=2, max_verifications=8)
    checked = small.generate("12", most, seed, sampling, mode="verified", **options)
    assert checked.invalid is None and checked.usage.verifications
    assert checked.tokens == small.generate("12", most, mode="autoregressive", **options).tokens


def test_verified_answers_and_log_probabilities_under_a_constraint_are_those_of_the_reference_loop(small: LM) -> None:
    sampling = Sampling(steps=3, max_verifications=2)
    options: dict[str, Any] = {"regex": r"[3-9\n]+1?", "logprobs": 2}
    prompts = ["1", "123\n4"]
    ours = small.generate(prompts, 20, [1, 2], sampling, mode="verified", **options)
    assert sum(reply.usage.redos for reply in ours)
    theirs = in_reference(small).generate(prompts, 20, [1, 2], sampling, mode="verified", **options)
    assert [(reply.tokens, reply.usage) for reply in ours] == [(reply.tokens, reply.usage) for reply in theirs]
    alone = small.generate(prompts[1], 20, 2, sampling, mode="verified", **options)
    assert alone == ours[1]


@pytest.mark.parametrize("mode", ["diffusion", "verified", "autoregressive"])
def test_log_probabilities_are_those_among_the_tokens_that_may_stand_there(small: LM, mode: str) -> None:
    prompt = small.encode("1")
    request = small.build_requests(prompt, 12, regex="(12|3)*4", mode=mode, logprobs=16)[0]
    state = request.row.constraint
    assert state is not None
    (reply,) = (
        event.reply for event in small.answer(small.network, [request], None) if isinstance(event, blockpress.Done)
    )
    logits = small.next_token_logits([*prompt, *reply.tokens])
    assert reply.logprobs is not None and len(reply.logprobs) == len(reply.tokens)
    at = 0
    for place, scored in enumerate(reply.logprobs):
        automaton = state.constraint.automaton
        left = 12 - place - 1
        targets = [automaton.step(at, token) for token in range(16)]
        allowed = [token for token, target in enumerate(targets) if target >= 0 and automaton.distance[target] <= left]
        shares = logits[len(prompt) - 1 + place][allowed].log_softmax(-1).tolist()
        wanted = dict(zip(allowed, shares, strict=True))
        assert scored.logprob == pytest.approx(wanted[scored.token], abs=1e-4)
        assert dict(scored.top) == pytest.approx(wanted, abs=1e-4)
        at = automaton.step(at, scored.token)


def test_a_constraint_is_carried_from_canvas_to_canvas(small: LM) -> None:
    for seed in range(4):
        reply = small.generate("1", 50, seed, Sampling(steps=3), regex=r"(12){8,20}3")
        assert reply.invalid is None and reply.usage.canvases > 2
        assert re.fullmatch(r"(12){8,20}3", reply.text or "")


@pytest.mark.parametrize(
    "options", [{"regex": GRID}, {"choice": ["12", "7", "999"]}, {"grammar": NESTED}], ids=["grid", "choice", "grammar"]
)
def test_the_reference_loop_gives_the_same_answer(lm: LM, reference: LM, options: dict[str, Any]) -> None:
    prompts, sampling = [PUZZLE, "12"], Sampling(steps=6)
    assert lm.generate(prompts, 90, 4, sampling, **options) == reference.generate(prompts, 90, 4, sampling, **options)


def test_constrained_and_free_requests_share_a_batch_and_change_nothing(lm: LM) -> None:
    sampling = Sampling(steps=6)
    free, held = (
        lm.build_requests(PUZZLE, 90, 5, sampling),
        lm.build_requests("12", 90, 5, sampling, choice=["12", "7"]),
    )
    alone = [lm.generate(PUZZLE, 90, 5, sampling), lm.generate("12", 90, 5, sampling, choice=["12", "7"])]
    replies = [e.reply for e in lm.answer(lm.network, [*free, *held], None) if isinstance(e, blockpress.Done)]
    assert sorted(replies, key=lambda reply: reply.usage.prompt_tokens, reverse=True) == alone


def test_log_probabilities_are_reported_under_a_constraint(lm: LM) -> None:
    reply = lm.generate("12", 20, logprobs=1, choice=["12", "7"])
    assert reply.logprobs is not None and len(reply.logprobs) == len(reply.tokens)


@pytest.mark.parametrize("mode", ["diffusion", "verified", "autoregressive"])
def test_a_stop_text_cuts_a_constrained_answer_and_is_told(small: LM, mode: str) -> None:
    kind = AutoregressiveSampling if mode == "autoregressive" else Sampling
    options: dict[str, Any] = {"mode": mode, "logprobs": 0, "regex": "45(67){3}"}
    reply = small.generate("1", 20, sampling=kind(stop=("76",)), **options)
    assert (
        (reply.text, reply.finish_reason) == ("456", "stop") and reply.invalid is not None and "'76'" in reply.invalid
    )
    reply = small.generate("1", 20, sampling=kind(stop=("8",)), **options)
    assert (reply.text, reply.finish_reason, reply.invalid) == ("45676767", "stop", None)


def test_a_cancelled_answer_says_what_is_missing(lm: LM) -> None:
    class AtOnce:
        def is_set(self) -> bool:
            return True

    reply = lm.generate(PUZZLE, 90, cancel=AtOnce(), regex=GRID)
    assert reply.finish_reason == "cancelled" and reply.invalid is not None and "89 more tokens" in reply.invalid


def test_a_constraint_is_compiled_once(lm: LM) -> None:
    first, second = (lm.build_requests("1", 40, regex="12*3")[0].row.constraint for _ in range(2))
    assert first is not None and second is not None
    assert first is not second and first.constraint is second.constraint


@pytest.mark.parametrize("name", ["steps", "stop_ids", "plain", "options"])
def test_an_option_of_another_name_is_refused_as_python_refuses_it(lm: LM, name: str) -> None:
    """And is not taken for a schema, as everything was that is neither a pattern nor a choice."""
    for call in (lm.generate, lm.stream, lm.build_requests):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call([4], **{name: None})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "a"}, "vocabulary cannot write"),
        ({"regex": "["}, "not a regular expression"),
        ({"regex": 5}, "regex is 5"),
        ({"regex": "1(?!.*)"}, "allows no text"),
        ({"regex": "1", "choice": ["1"]}, "regex and choice"),
        ({"choice": []}, "choice is empty"),
        ({"choice": "12"}, "choice is '12'"),
        ({"choice": ["1", "1"]}, "'1' twice"),
        ({"choice": ["1", ""]}, "empty text"),
        ({"choice": [1]}, r"choice is \[1\]"),
        ({"schema": {"type": "string"}}, "vocabulary cannot write"),
        ({"schema": {"const": {1, 2}}}, "not JSON"),
        ({"schema": {"not": {}}}, "allows no text"),
        ({"schema": {"const": float("nan")}}, "JSON"),
        ({"schema": {"const": nested(lambda inner: [inner], 100_000)}}, "schema nests too deeply"),
        ({"schema": nested(lambda inner: {"items": inner}, 900)}, "schema nests too deeply"),
        ({"regex": "(?:" * 300 + "1" + "|2)*" * 300}, "regex nests too deeply"),
        ({"regex": "1{99}"}, "needs 99 tokens"),
        ({"grammar": "start: x"}, "grammar is not one that lark reads: Rule 'x'"),
        ({"grammar": ["start"]}, r"grammar is \['start'\]"),
        ({"grammar": 'start: "1"~99'}, "needs 99 tokens"),
        ({"grammar": 'start: "a"'}, "vocabulary cannot write"),
        ({"grammar": 'start: "1" /(?!1)1/'}, "allows no text"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before_any_forward(lm: LM, options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        lm.build_requests("12", 40, **options)


def test_an_argument_that_generate_does_not_know_is_no_constraint(lm: LM) -> None:
    for options in ({"steps": 3}, {"regex": "1", "schemas": {"type": "integer"}}):
        with pytest.raises(TypeError, match="unexpected keyword argument 's"):
            lm.generate("12", 40, **options)  # type: ignore[call-arg, arg-type]


def test_an_engine_with_too_little_memory_refuses_what_it_could_not_finish() -> None:
    with blockpress.load("sudoku-nano", memory=2_200_000) as small:
        with pytest.raises(RequestError, match=r"needs 100 tokens.*memory"):
            small.generate("12", 120, regex="[1-9]{100}")
        assert small.generate("12", 60, sampling=Sampling(steps=2), regex="[1-9]{50}").invalid is None


def test_a_model_without_a_tokenizer_says_that_it_needs_one(tiny: ModelConfig, random_network: RandomNetwork) -> None:
    model = LM(path=Path(), network=random_network(tiny), generation=GenerationConfig(), tokenizer=None)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        model.build_requests([1, 2], 10, regex="a")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [Sampling(steps=2), AutoregressiveSampling(temperature=1.0)], ids=["diffusion", "autoregressive"]
)
def test_random_weights_write_valid_json_over_the_published_vocabulary(large: LM, sampling: Any) -> None:
    mode = "autoregressive" if isinstance(sampling, AutoregressiveSampling) else None
    reply = large.generate("hi", 48, 1, sampling, mode=mode, schema=SCHEMA)
    assert reply.invalid is None
    jsonschema.validate(json.loads(reply.text or ""), SCHEMA)


@pytest.mark.parametrize(("stop_ids", "message"), [("", "no stop ids"), ("1", "cannot write")])
def test_a_shape_that_stop_ids_leave_no_way_to_write_or_end_is_refused(lm: LM, stop_ids: str, message: str) -> None:
    assert lm.tokenizer is not None
    generation = replace(lm.generation, stop_ids=tuple(lm.tokenizer.encode(stop_ids)) if stop_ids else ())
    other = LM(path=lm.path, network=lm.network, generation=generation, tokenizer=lm.tokenizer)
    with pytest.raises(RequestError, match=message):
        other.generate("12", 10, regex="1{3}")
