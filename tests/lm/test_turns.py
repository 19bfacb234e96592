"""Constraints in chats: after thoughts, as calls of tools and beside them, with random weights and scripted ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from lark import Lark

from blockpress.config import AutoregressiveSampling, GenerationConfig, ModelConfig, Sampling
from blockpress.decoding import Committed, Done, ReasoningDelta, Reply, Text, ToolCallEvent
from blockpress.errors import RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Network
from blockpress.text import Tokenizer
from tests.chat.published import SOURCE as PUBLISHED
from tests.chat.test_conversation import HI, model
from tests.chat_tokenizer import TOKENIZER, VOCABULARY, ids

RandomNetwork = Callable[..., Network]
SAMPLINGS = [Sampling(steps=3), AutoregressiveSampling(temperature=1.0)]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}, "s": {"type": "string", "maxLength": 5}},
    "required": ["n"],
}


def tool(name: str, parameters: Any = SCHEMA, **others: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **others}}


TOOLS = [tool("f"), tool("g", {"type": "object", "properties": {"flag": {"type": "boolean"}}})]
PARAMETERS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}


@pytest.fixture(scope="module", params=["own", "published"])
def lm(request: pytest.FixtureRequest, tiny: ModelConfig, random_network: RandomNetwork) -> LM:
    """Random weights that read chats, a token for each character, by our template and by the published one."""
    network = random_network(replace(tiny, vocab_size=len(VOCABULARY), canvas_length=16, context_length=1024))
    source = {"own": TOKENIZER.chat_template, "published": PUBLISHED}[request.param]
    tokenizer = Tokenizer(TOKENIZER.backend, config={"bos_token": "<bos>"}, chat_template=source)
    return LM(path=Path(), network=network, generation=GenerationConfig(stop_ids=(1,)), tokenizer=tokenizer)


def scripted(turn: str) -> LM:
    """Writes this turn and the ids that end it, place by place, whatever stands before."""
    padded = ids(turn + "<turn|>" * 200)

    def script(behind: str, attempt: int) -> str:
        said = ids(behind.removeprefix("<|channel>thought\n<channel|>"))
        return TOKENIZER.decode(padded[len(said) :], skip_special=False)

    return model(script)


def mode_of(sampling: Any) -> str:
    return "diffusion" if isinstance(sampling, Sampling) else "autoregressive"


def asked(lm: LM, sampling: Any = SAMPLINGS[0], **options: Any) -> list[Reply]:
    """Replies of several seeds, each of which has no part that breaks its constraint."""
    given = {"max_tokens": 60, "seed": [0, 1], "mode": mode_of(sampling), **options}
    replies = lm.chat(HI, sampling=sampling, **given)
    for reply in replies:
        assert reply.invalid is None and not reply.broken_calls, reply
    return replies


# ----------------------------------------------------------------------------------------------------------- thoughts


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=mode_of)
@pytest.mark.parametrize("thinking", [{}, {"thinking": True}, {"thinking": True, "thinking_budget": 7}], ids=str)
def test_an_answer_is_valid_with_and_without_a_thought_before_it(
    lm: LM, sampling: Any, thinking: dict[str, Any]
) -> None:
    for reply in asked(lm, sampling, schema=SCHEMA, **thinking):
        jsonschema.validate(json.loads(reply.text or ""), SCHEMA)
        assert reply.usage.reasoning_tokens <= thinking.get("thinking_budget", 60)
        assert bool(thinking) or not reply.thinking
        assert TOKENIZER.decode(reply.tokens, skip_special=False).startswith("<|channel>") or not thinking


GRAMMAR = 'start: item ("," item)*\nitem: NAME "(" [start] ")"\nNAME: /[a-c]+/'


@pytest.mark.parametrize(
    "options", [{"thinking": True}, {"tools": TOOLS}, {"mode": "verified"}], ids=["thought", "tools", "verified"]
)
def test_a_grammar_holds_after_a_thought_beside_tools_and_when_verified(lm: LM, options: dict[str, Any]) -> None:
    for reply in asked(lm, grammar=GRAMMAR, max_tokens=40, **options):
        assert reply.tool_calls or Lark(GRAMMAR).parse(reply.text or "")


def test_a_stop_text_is_none_in_a_thought_or_in_a_call() -> None:
    lm = scripted("<|channel>thought\n4 and 2<channel|>42")
    options: dict[str, Any] = {"thinking": True, "max_tokens": 60, "sampling": Sampling(stop=("2",))}
    reply = lm.chat(HI, regex="42|17", **options)
    assert (reply.text, reply.thinking) == ("4", "4 and 2") and reply.invalid is not None
    lm = scripted("<|channel>thought\n4 and 2<channel|><|tool_call>call:f{n:2}<tool_call|>")
    assert lm.chat(HI, tools=TOOLS, tool_choice="required", **options).invalid is None


def test_the_thought_is_the_model_s_own_and_the_answer_is_held() -> None:
    turn = "<|channel>thought\nSix times seven is forty-two.\n<channel|>It is 42.<turn|>"
    reply = scripted(turn).chat(HI, thinking=True, regex="[0-9]{2}", max_tokens=80)
    assert reply.thinking == "Six times seven is forty-two."
    assert reply.invalid is None and re.fullmatch("[0-9]{2}", reply.text or "")


@pytest.mark.parametrize("budget", [1, 5, 12, 13])
def test_a_thought_that_its_budget_closes_is_followed_by_a_valid_answer(budget: int) -> None:
    turn = "<|channel>thought\nI think and think and think of it.<channel|>42<turn|>"
    reply = scripted(turn).chat(HI, thinking=True, thinking_budget=budget, regex="42|17", max_tokens=80)
    assert reply.text in ("42", "17")  # alike to this network, which would go on with its thought
    assert (reply.invalid, reply.usage.reasoning_tokens, reply.usage.thought_cut) == (None, budget, True)


def test_a_thought_that_the_prompt_leaves_open_is_ended_before_the_answer(lm: LM) -> None:
    """The published template opens one behind a tool's result."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    talk = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "ok"}]
    requests = lm.build_chat_requests([talk, HI], thinking=True, regex="1|2", max_tokens=40, sampling=SAMPLINGS[0])
    replies = [event.reply for event in lm.answer(lm.network, requests, None) if isinstance(event, Done)]
    assert all(reply.text in ("1", "2") and reply.invalid is None for reply in replies)
    opened = lm.tokenizer is not None and lm.tokenizer.chat_template == PUBLISHED
    first = next(reply for reply in replies if reply.usage.prompt_tokens == len(requests[0].row.prompt))
    assert (ids("<|channel>")[0] in first.tokens) != opened


def test_a_model_that_opens_a_channel_though_it_is_not_asked_to_think_may_do_so_without_a_thought() -> None:
    lm = scripted("<|channel>thought\n<channel|>42<turn|>")
    lm.tokenizer = Tokenizer(TOKENIZER.backend, config={"bos_token": "<bos>"}, chat_template=PUBLISHED)
    plain = LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=lm.tokenizer, answer=run_reference)
    reply = plain.chat(HI, regex="42|17", max_tokens=40)
    assert (reply.text, reply.thinking, reply.invalid) == ("42", None, None)
    assert reply.tokens[: len(ids("<|channel>thought\n<channel|>"))] == ids("<|channel>thought\n<channel|>")


# -------------------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=mode_of)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_needed_call_follows_the_schema_of_its_tool(lm: LM, sampling: Any, thinking: bool) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "thinking": thinking, "parallel_tool_calls": False, "max_tokens": 80}
    for choice, names in (("required", {"f", "g"}), ({"type": "function", "function": {"name": "g"}}, {"g"})):
        for reply in asked(lm, sampling, tool_choice=choice, **options):
            (call,) = reply.tool_calls
            assert call.name in names and not call.mended and not reply.text
            jsonschema.validate(call.arguments, PARAMETERS[call.name])
            assert reply.finish_reason == "tool_calls" or len(reply.tokens) == 80


def test_several_calls_are_written_only_where_they_may_be() -> None:
    call = "<|tool_call>call:g{flag:true}<tool_call|>"
    lm = scripted(call + call + "<|tool_response>")
    options: dict[str, Any] = {"tools": TOOLS, "max_tokens": 120}
    for choice in ("required", None):
        assert len(lm.chat(HI, tool_choice=choice, **options).tool_calls) == 2
        once = lm.chat(HI, tool_choice=choice, parallel_tool_calls=False, **options)
        assert len(once.tool_calls) == 1 and once.invalid is None


def test_no_call_is_written_where_none_may_be() -> None:
    lm = scripted("So:<|tool_call>call:g{flag:true}<tool_call|>\ncall:g{}<turn|>")
    options: dict[str, Any] = {"tools": TOOLS, "max_tokens": 60}
    assert lm.chat(HI, **options).tool_calls
    reply = lm.chat(HI, tool_choice="none", **options)
    assert not reply.tool_calls and not reply.broken_calls and reply.text is not None and "call:g{}" in reply.text


def test_the_calls_of_strict_tools_follow_their_schema_where_others_are_the_model_s_own() -> None:
    lm = scripted('Look:<|tool_call>call:f{n:"1000"}<tool_call|> Done.<turn|>')
    options: dict[str, Any] = {"max_tokens": 120}
    assert lm.chat(HI, tools=TOOLS, **options).tool_calls[0].arguments == {"n": 1000}
    reply = lm.chat(HI, tools=[tool("f", strict=True), TOOLS[1]], **options)
    assert reply.text is not None and reply.text.startswith("Look:") and reply.invalid is None
    jsonschema.validate(reply.tool_calls[0].arguments, SCHEMA)


def test_an_answer_with_tools_and_a_shape_is_a_call_or_has_the_shape(lm: LM) -> None:
    for reply in asked(lm, tools=TOOLS, schema=SCHEMA, seed=list(range(4)), max_tokens=80):
        if reply.tool_calls:
            assert not reply.text
            for call in reply.tool_calls:
                jsonschema.validate(call.arguments, PARAMETERS[call.name])
        else:
            jsonschema.validate(json.loads(reply.text or ""), SCHEMA)


def test_keys_that_come_twice_in_a_held_call_count_once() -> None:
    """No automaton says that keys differ, and the call is valid with either value."""
    free = tool("h", {"type": "object", "additionalProperties": {"type": "integer"}})
    lm = scripted("<|tool_call>call:h{a:1,a:2}<tool_call|><turn|>")
    assert lm.chat(HI, tools=[free], max_tokens=60).broken_calls
    reply = lm.chat(HI, tools=[free], tool_choice="required", max_tokens=60)
    assert reply.tool_calls[0].arguments == {"a": 2} and reply.invalid is None


def test_a_held_turn_is_streamed_as_it_is_replied(lm: LM) -> None:
    for options in ({"schema": SCHEMA, "thinking": True}, {"tools": TOOLS, "tool_choice": "required"}):
        events = list(lm.chat_stream(HI, sampling=SAMPLINGS[0], max_tokens=90, seed=4, **options))  # type: ignore[arg-type]
        (reply,) = (event.reply for event in events if isinstance(event, Done))
        assert "".join(event.text for event in events if isinstance(event, Text)) == reply.text
        assert ("".join(event.text for event in events if isinstance(event, ReasoningDelta)) or None) == reply.thinking
        assert tuple(event.call for event in events if isinstance(event, ToolCallEvent)) == reply.tool_calls
        assert sum((event.tokens for event in events if isinstance(event, Committed)), []) == reply.tokens


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tool_choice": "always"}, "tool_choice is 'always'"),
        ({"tool_choice": "required", "tools": None}, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice names 'h'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice is"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}, "allowed_tools"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls is 1"),
        ({"tool_choice": "required", "schema": {}}, "schema is given, and tool_choice"),
        ({"tool_choice": "required", "max_tokens": 9}, "the call that tool_choice asks for needs"),
        (
            {"tools": [tool("f", {"properties": {"a": {"type": "odd"}}}, strict=True)]},
            r"tools\[0\].function.parameters.*properties.a",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(lm: LM, options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        lm.build_chat_requests(HI, **{"tools": TOOLS, **options})


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "name": "g"}]}},
        {"type": "function", "name": "g"},
    ],
)
def test_other_forms_of_a_choice_are_read_too(lm: LM, choice: dict[str, Any]) -> None:
    assert {
        call.name for reply in asked(lm, tools=TOOLS, tool_choice=choice, seed=[0]) for call in reply.tool_calls
    } == {"g"}


@pytest.fixture(scope="module")
def large(gemma: Tokenizer, tiny: ModelConfig, random_network: RandomNetwork) -> LM:
    """Random weights over the published vocabulary, which read chats by the published template."""
    network = random_network(replace(tiny, vocab_size=262_144, canvas_length=16, context_length=1024))
    tokenizer = Tokenizer(gemma.backend, config={"bos_token": "<bos>"}, chat_template=PUBLISHED)
    return LM(path=Path(), network=network, generation=GenerationConfig(stop_ids=(1, 106)), tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(steps=2), AutoregressiveSampling()], ids=mode_of)
def test_random_weights_think_call_and_answer_over_the_published_vocabulary(large: LM, sampling: Any) -> None:
    options: dict[str, Any] = {"sampling": sampling, "mode": mode_of(sampling), "max_tokens": 60, "thinking": True}
    reply = large.chat(HI, schema=SCHEMA, thinking_budget=9, **options)
    assert reply.invalid is None and reply.usage.reasoning_tokens <= 9
    jsonschema.validate(json.loads(reply.text or ""), SCHEMA)
    reply = large.chat(HI, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, thinking_budget=9, **options)
    (call,) = reply.tool_calls
    assert reply.invalid is None and not call.mended
    jsonschema.validate(call.arguments, PARAMETERS[call.name])
