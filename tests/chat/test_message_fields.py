"""docs/messages.md: every field does what its row says, and every field of OpenAI's has a row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from blockpress.errors import RequestError

from .published import ours

PAGE = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(.+?) \| (honoured|no meaning|refused) \|", PAGE, re.MULTILINE))
ROWS = {name.replace("`", ""): status for name, status in ROWS.items()}

USER = {"role": "user", "content": "Hi"}
Messages = list[dict[str, Any]]


def user(content: Any, **more: Any) -> Messages:
    return [{"role": "user", "content": content, **more}]


def part(**fields: Any) -> Messages:
    return user([{"type": "text", "text": "x"}, fields])


def said(**fields: Any) -> Messages:
    return [USER, {"role": "assistant", "content": "x", **fields}, USER]


def called(*, result: Any = None, **fields: Any) -> Messages:
    """Two calls and their results; `fields` of the first call, `result`: of the first result."""
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": {}}} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in "ab"]
    first = {**calls[0], **fields}
    return [USER, {"role": "assistant", "tool_calls": [first, calls[1]]}, {**results[0], **(result or {})}, results[1]]


def function(**fields: Any) -> dict[str, Any]:
    return {"function": {"name": "a", "arguments": {}, **fields}}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "description": "d", **fields}}]}


URL = {"url": "data:,"}
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
BY_NAME = {"tool_call_id": None}

EXAMPLES: dict[str, tuple[Any, Any]] = {
    "role": ([{"role": "developer", "content": "x"}], user("x")),
    "role: function": ([USER, {"role": "function", "name": "f", "content": "x"}], [USER]),
    "content of text": (user("x"), user("y")),
    "content of parts": (part(type="text", text="y"), user("x")),
    "name of a participant": (user("x", name="Ann"), user("x")),
    "content[].text": (part(type="text", text="y"), part(type="text", text="z")),
    "content[].image_url.url": (part(type="image_url", image_url=URL), part(type="text", text="")),
    "content[].image_url.detail: auto": (
        part(type="image_url", image_url={**URL, "detail": "auto"}),
        part(type="image_url", image_url=URL),
    ),
    "content[].image_url.detail: low": (part(type="image_url", image_url={**URL, "detail": "low"}), None),
    "content[].image": (part(type="image", image=b"x"), part(type="text", text="")),
    "content[].video": (part(type="video", video="x"), part(type="text", text="")),
    "content[].input_audio": (part(type="input_audio", input_audio={"data": "", "format": "wav"}), None),
    "content[].file": (part(type="file", file={"file_id": "x"}), None),
    "content[].refusal": (said(content=[{"type": "refusal", "refusal": "no"}]), None),
    "content[].prompt_cache_breakpoint": (
        part(type="text", text="y", prompt_cache_breakpoint={"mode": "explicit"}),
        part(type="text", text="y"),
    ),
    "refusal": (said(refusal="no"), None),
    "annotations": (said(annotations=[{"type": "url_citation"}]), said()),
    "audio": (said(audio={"id": "x"}), None),
    "function_call": (said(function_call={"name": "f", "arguments": "{}"}), None),
    "parsed": (said(parsed={"x": 1}), said()),
    "thinking": ([USER, {"role": "assistant", "content": "x", "thinking": "hm"}], [USER, said()[1]]),
    "tool_calls[].id": (called(), called(id="c", result=BY_NAME | {"name": "b"})),
    "tool_calls[].index": (called(index=0), called()),
    "tool_calls[].type: function": (called(type="function"), called(type="other")),
    "tool_calls[].custom": (called(type="custom", custom={"name": "a", "input": "x"}), None),
    "tool_calls[].function.name": (called(**function(name="google:search")), called()),
    "tool_calls[].function.arguments": (called(**function(arguments='{"q": 1}')), called(**function(arguments=None))),
    "tool_calls[].function.parsed_arguments": (called(**function(parsed_arguments={})), called()),
    "tool_call_id": ([*called()[:2], *called()[:1:-1]], called()),
    "name of a tool": (called(result=BY_NAME | {"name": "a"}), called(result=BY_NAME | {"name": "c"})),
    "content of a tool": (called(result={"content": {"x": None}}), called(result={"content": None})),
    "tool_responses": (said(tool_responses=[{"name": "a", "response": {}}]), None),
    "tools[].type: function": (tool(), {"tools": [{**tool()["tools"][0], "type": "other"}]}),
    "tools[].custom": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, None),
    "tools[].function.name": (tool(name="g"), tool()),
    "tools[].function.description": (tool(description="e"), tool()),
    "tools[].function.parameters": (tool(parameters=SCHEMA), tool()),
    "tools[].function.strict": (tool(strict=True), tool()),
}

ANSWERS = {"tools[].function.strict"}
"""Fields that say nothing in the prompt and something of the answer (tests/lm/test_turns.py)."""

# The fields of the types ChatCompletion*Param, ChatCompletionMessage, ParsedChatCompletionMessage and FunctionDefinition
# of OpenAI's Python library 3.57.0, without `type` and `role`, which say what the others are.
OPENAI = [
    "content",
    "name",
    "refusal",
    "audio",
    "function_call",
    "tool_calls",
    "tool_call_id",
    "annotations",
    "parsed",
    "text",
    "image_url",
    "url",
    "detail",
    "input_audio",
    "file",
    "prompt_cache_breakpoint",
    "id",
    "function",
    "custom",
    "arguments",
    "parsed_arguments",
    "description",
    "parameters",
    "strict",
]


def outcome(example: Any) -> str | RequestError:
    """The prompt, or the refusal."""
    given = {"messages": example} if isinstance(example, list) else example
    try:
        return ours({"messages": [USER], "tools": None, "thinking": False, **given})
    except RequestError as error:
        return error


@pytest.mark.parametrize("field", ROWS)
def test_a_field_does_what_its_row_says(field: str):
    with_it = outcome(EXAMPLES[field][0])
    if ROWS[field] == "refused":
        assert isinstance(with_it, RequestError) and with_it.hint
        assert re.split(r"[.\]]", re.split(":| of ", field)[0])[-1] in with_it.message
    else:
        assert isinstance(with_it, str)
        assert (with_it == outcome(EXAMPLES[field][1])) is (ROWS[field] == "no meaning" or field in ANSWERS)


def test_every_example_has_a_row():
    assert list(EXAMPLES) == list(ROWS)


def test_every_field_of_openai_s_has_a_row():
    words = {word for field in ROWS for word in re.findall(r"\w+", field)}
    assert set(OPENAI) <= words


@pytest.mark.parametrize("detail", ["low", "high", "original"])
def test_another_detail_is_refused_with_what_to_do(detail: str):
    with pytest.raises(RequestError, match=r"messages\[0\].content\[1\].image_url.detail.*soft_tokens"):
        ours({"messages": part(type="image_url", image_url={**URL, "detail": detail}), "tools": [], "thinking": False})
