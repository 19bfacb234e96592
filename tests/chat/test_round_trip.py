"""Own output as input: whatever the model writes, the message that it gives is one that the next chat takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockpress.chat import ChatTemplate, MalformedToolCall, SpecialTokens, TextDelta, ToolCall, TurnParser, encode_chat
from blockpress.chat.tool_calls import QUOTE, read_call
from blockpress.decoding import Reply, Usage
from tests.chat_tokenizer import TOKENIZER, ids

from .published import PUBLISHED

USAGE = Usage(prompt_tokens=1, completion_tokens=1, canvases=1, steps=1, forwards=1, tokens_per_forward=1.0)
TOOLS = {
    "f": {
        "properties": {
            "o": {"type": "object"},
            "a": {"type": "array"},
            "n": {"type": "number"},
            "s": {"type": "string"},
        }
    },
    "google:search": {},
}
QUESTION = {"role": "user", "content": "?"}


def reply_to(written: str) -> Reply:
    """The reply of a turn in which the model wrote this, control tokens and all."""
    parser = TurnParser(TOKENIZER, SpecialTokens.of(TOKENIZER), tools=TOOLS)
    pieces = [*parser.feed(ids(written)), *parser.finish()]
    texts = {
        kind: "".join(p.text for p in pieces if isinstance(p, TextDelta) and p.kind == kind)
        for kind in ("answer", "thought")
    }
    return Reply(
        texts["answer"],
        ids(written),
        "stop",
        USAGE,
        thinking=texts["thought"] or None,
        tool_calls=tuple(piece for piece in pieces if isinstance(piece, ToolCall)),
        broken_calls=tuple(piece for piece in pieces if isinstance(piece, MalformedToolCall)),
    )


def said_again(reply: Reply, template: ChatTemplate) -> str:
    """The prompt of the next chat: the reply, a result for each of its calls, and another question."""
    results = [{"role": "tool", "name": call.name, "content": None} for call in reply.tool_calls]
    prompt = encode_chat(TOKENIZER, template, [QUESTION, reply.message, *results, QUESTION])
    return TOKENIZER.decode(prompt.ids, skip_special=False)


SIGNS = [
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    QUOTE,
    "<|tool_response>",
    "thought\n",
    "call:",
    "\n",
]
BITS = [
    "f",
    "google:search",
    "get weather",
    "{",
    "}",
    "o",
    "a",
    "n",
    "s",
    ":",
    ",",
    "[",
    "]",
    "1",
    "1e999",
    "'",
    '"',
    "x",
    " ",
]
WRITTEN = st.lists(
    st.sampled_from(SIGNS + BITS) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=3)
)
NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="{"), min_size=1).filter(
    str.strip
)


@pytest.mark.parametrize("template", [PUBLISHED, ChatTemplate.own()], ids=["published", "own"])
@given(WRITTEN.map("".join))
@example("<|tool_call>call:google:search{q:1}<tool_call|>")
@example(f"<|tool_call>call:f{{o:{QUOTE}" + '{"x":' * 70 + "1" + "}" * 70 + f"{QUOTE}}}<tool_call|>")
@example(f'<|tool_call>call:f{{o:{QUOTE}{{"x":1e999}}{QUOTE}}}<tool_call|>')
@example("<|tool_call>call:f{s:'\\ud800'}<tool_call|>")
def test_whatever_the_model_wrote_the_next_chat_takes(template: ChatTemplate, written: str):
    reply = reply_to(written)
    prompt = said_again(reply, template)
    for call in reply.tool_calls:
        assert f"<|tool_call>call:{call.name}{{" in prompt and f"response:{call.name}{{" in prompt
    assert (reply.text or "").strip() in prompt


@given(NAMES)
@example("google:search")
@example("get weather")
@example("x" * 200)
def test_every_name_that_is_read_is_taken_back(name: str):
    call = read_call([f"call:{name}{{}}"])
    assert isinstance(call, ToolCall) and call.name == name.strip()
    reply = Reply("", [], "tool_calls", USAGE, tool_calls=(call, call))
    assert said_again(reply, PUBLISHED).count(f"<|tool_call>call:{call.name}{{}}<tool_call|>") == 2


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (json.dumps([[]] * 2).replace("[]", "[" * 70 + "]" * 70, 1), "it is nested deeper than 64"),
        ('["\\ud800"]', "a string holds half of a character"),
    ],
)
def test_arguments_that_no_chat_can_say_again_are_a_broken_call(text: str, fault: str):
    call: Any = read_call(["call:f{a:", text, "}"], TOOLS)
    assert (call.fault, call.raw) == (fault, f"call:f{{a:{QUOTE}{text}{QUOTE}}}")


def test_a_number_beyond_all_numbers_in_a_string_stays_text():
    call: Any = read_call(["call:f{a:", "[1e999]", "}"], TOOLS)
    assert call.arguments == {"a": "[1e999]"}
