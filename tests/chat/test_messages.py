"""Messages and tools: what is taken, and that every fault is named by its field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from blockpress.chat import ChatTemplate
from blockpress.chat.messages import Media, check_messages, check_tools
from blockpress.errors import RequestError

USER = {"role": "user", "content": "Hi"}


def call(name: str = "ls", arguments: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}, **more}


RESULT_A = {"role": "tool", "tool_call_id": "a", "content": "x"}
CALLER = {"role": "assistant", "content": None, "tool_calls": [call(id="a"), call("cat", id="b")]}


def test_messages_are_converted_to_the_form_that_templates_read():
    given = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "x"}]},
        USER,
        {"role": "model", "content": "ok", "thinking": "hm", "refusal": None},
        {"role": "assistant", "content": None, "tool_calls": [call(arguments='{"a": [1, null]}', id="a", index=0)]},
        {"role": "tool", "tool_call_id": "a", "content": "done"},
        {"role": "assistant", "content": [], "tool_calls": [call(), call("cat", "null", id="call_0"), call(id="")]},
        {"role": "tool", "name": "ls", "content": {"n": (1, 2.5, None, "ü")}},
        {"role": "tool", "name": "cat", "content": None},
        {"role": "tool", "name": "ls", "content": []},
    ]
    checked, media = check_messages(given)
    assert checked == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "x"}]},
        USER,
        {"role": "assistant", "content": "ok", "reasoning": "hm", "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "tool_calls": [call(arguments={"a": [1, None]}, id="a")]},
        {"role": "tool", "name": "ls", "content": "done", "tool_call_id": "a"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call(id="call_1"), call("cat", id="call_0"), call(id="call_2")],
        },
        {"role": "tool", "name": "ls", "content": '{"n": [1, 2.5, null, "ü"]}', "tool_call_id": "call_1"},
        {"role": "tool", "name": "cat", "content": None, "tool_call_id": "call_0"},
        {"role": "tool", "name": "ls", "content": "", "tool_call_id": "call_2"},
    ]
    assert media == []
    assert check_messages(checked)[0] == checked


def test_media_are_collected_in_order():
    parts = [
        {"type": "image", "image": b"png"},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": "data:x"}},
        {"type": "image_url", "image_url": "http://y"},
        {"type": "video", "video": "clip.mp4"},
    ]
    checked, media = check_messages([USER, {"role": "user", "content": parts}])
    assert checked[1]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "image"},
        {"type": "video"},
    ]
    assert media == [
        Media("image", b"png", "messages[1].content[0]"),
        Media("image", "data:x", "messages[1].content[2]"),
        Media("image", "http://y", "messages[1].content[3]"),
        Media("video", "clip.mp4", "messages[1].content[4]"),
    ]


def test_calls_of_the_last_message_may_wait_for_their_results():
    assert check_messages([USER, CALLER])[0][-1]["tool_calls"] == CALLER["tool_calls"]


def part(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [fields]}]


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth > 1 else {}


ROUND: dict[str, Any] = {}
ROUND["round"] = ROUND


def test_the_deepest_allowed_nesting_is_rendered():
    caller = {"role": "assistant", "tool_calls": [call(arguments=nested(64))]}
    checked, _ = check_messages([USER, caller, {"role": "tool", "content": "x"}])
    assert "{a:" * 63 + "{}" + "}" * 63 in ChatTemplate.own().render(checked)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages is None"),
        ([], "messages is []"),
        ("Hi", "messages is 'Hi'"),
        (USER, "messages is {"),
        (["Hi"], "messages[0] is 'Hi'"),
        ([{"content": "x"}], "messages[0].role is None"),
        ([USER, {"role": "boss", "content": "x"}], "messages[1].role is 'boss'"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role is ['user']"),
        ([{"role": "user"}], "messages[0].content is None"),
        ([{"role": "user", "content": 3}], "messages[0].content is 3"),
        ([{"role": "user", "content": []}], "messages[0].content is []"),
        ([{"role": "user", "content": "x", "name": "Ann"}], "messages[0].name is 'Ann'"),
        ([{"role": "user", "content": "x", "tool_calls": [call()]}], "messages[0].tool_calls is"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0] is 'x'"),
        (part(type="audio"), "messages[0].content[0].type is 'audio'"),
        (part(text="x"), "messages[0].content[0].type is None"),
        (part(type="text"), "messages[0].content[0].text is None"),
        (part(type="text", text="x", cache_control=1), "messages[0].content[0].cache_control is 1"),
        (part(type="image"), "messages[0].content[0].image is None"),
        (part(type="image_url", image_url={}), "messages[0].content[0].image_url is {}"),
        (
            part(type="image_url", image_url={"url": "x", "detail": "low"}),
            "messages[0].content[0].image_url.detail is 'low'",
        ),
        ([{"role": "system", "content": [{"type": "image", "image": 1}]}], "messages[0].content[0].type is 'image'"),
        ([{"role": "assistant", "content": None}], "messages[0].content is None"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls is {}"),
        ([{"role": "assistant", "tool_calls": [3]}], "messages[0].tool_calls[0] is 3"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom"}]}], "messages[0].tool_calls[0].type is 'custom'"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function is None"),
        ([{"role": "assistant", "tool_calls": [call("")]}], "messages[0].tool_calls[0].function.name is ''"),
        ([{"role": "assistant", "tool_calls": [call("a{b")]}], "messages[0].tool_calls[0].function.name is 'a{b'"),
        ([{"role": "assistant", "tool_calls": [call(id=3)]}], "messages[0].tool_calls[0].id is 3"),
        (
            [{"role": "assistant", "tool_calls": [call(arguments="{")]}],
            "messages[0].tool_calls[0].function.arguments is '{'",
        ),
        (
            [{"role": "assistant", "tool_calls": [call(arguments="[]")]}],
            "messages[0].tool_calls[0].function.arguments is []",
        ),
        ([{"role": "assistant", "tool_calls": [call(arguments={"a": [math.nan]})]}], "arguments.a[0] is nan"),
        ([{"role": "assistant", "tool_calls": [call(arguments={1: 2})]}], "arguments key is 1"),
        ([{"role": "assistant", "content": "x", "thinking": 3}], "messages[0].thinking is 3"),
        ([{"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}], "messages[0].reasoning is 'b'"),
        ([USER, {"role": "tool", "name": "ls", "content": "x"}], "messages[1].role is 'tool'"),
        ([CALLER, {"role": "tool", "content": "x"}], "messages[1].name is None"),
        ([CALLER, {"role": "tool", "name": "rm", "content": "x"}], "messages[1].name is 'rm'"),
        ([CALLER, {"role": "tool", "tool_call_id": "c", "content": "x"}], "messages[1].tool_call_id is 'c'"),
        ([CALLER, {"role": "tool", "tool_call_id": "b", "name": "ls", "content": "x"}], "messages[1].name is 'ls'"),
        ([CALLER, {"role": "tool", "tool_call_id": "b"}], "messages[1].content is None"),
        ([CALLER, {"role": "tool", "tool_call_id": "b", "content": 21.5}], "messages[1].content is 21.5"),
        ([CALLER, {"role": "tool", "tool_call_id": "b", "content": ["x"]}], "messages[1].content[0] is 'x'"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "messages[0].content[0].type is ['text']"),
        ([{"role": "assistant", "tool_calls": [call(arguments=nested(65))]}], "is nested deeper than 64"),
        ([{"role": "assistant", "tool_calls": [call(arguments=json.dumps(nested(65)))]}], "is nested deeper than 64"),
        ([{"role": "assistant", "tool_calls": [call(arguments="[" * 100_000)]}], "function.arguments is '[[["),
        ([CALLER, {"role": "tool", "tool_call_id": "b", "content": ROUND}], "is nested deeper than 64"),
        ([CALLER, RESULT_A], "messages[0].tool_calls[1] calls 'cat'"),
        ([CALLER, RESULT_A, USER], "messages[0].tool_calls[1] calls 'cat'"),
        ([CALLER, USER, RESULT_A], "messages[0].tool_calls[0] calls 'ls'"),
        ([CALLER, CALLER, RESULT_A], "messages[0].tool_calls[0] calls 'ls'"),
        ([CALLER, RESULT_A, RESULT_A], "messages[2].tool_call_id is 'a'"),
        ([CALLER, RESULT_A, {"role": "tool", "name": "ls", "content": "x"}], "messages[2].name is 'ls'"),
        ([CALLER, RESULT_A, {**RESULT_A, "tool_call_id": "b"}, RESULT_A], "messages[3].role is 'tool'"),
        ([{"role": "assistant", "content": "", "tool_calls": []}, RESULT_A], "messages[1].role is 'tool'"),
        ([CALLER, {"role": "tool", "tool_call_id": 3, "content": "x"}], "messages[1].tool_call_id is 3"),
        ([{"role": "assistant", "tool_calls": [call(id="a"), call(id="a")]}], "messages[0].tool_calls[0].id is 'a'"),
        ([CALLER, {**RESULT_A, "content": [{"type": "video"}]}], "messages[1].content[0].video is None"),
        ([CALLER, {**RESULT_A, "content": [{"title": "x"}]}], "messages[1].content[0].type is None"),
        ([CALLER, {**RESULT_A, "content": 5}], "messages[1].content is 5"),
        ([{"role": "assistant", "content": "x", "annotations": 3}], "messages[0].annotations is 3"),
        ([{"role": "assistant", "content": "x", "tool_responses": [1]}], "messages[0].tool_responses is [1]"),
    ],
)
def test_every_fault_of_a_message_is_named(messages: Any, field: str):
    with pytest.raises(RequestError) as caught:
        check_messages(messages)
    assert field in caught.value.message
    assert caught.value.hint


def tool(name: str = "ls", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def test_tools_are_converted_to_the_form_that_templates_read():
    assert check_tools(None) is check_tools([]) is None
    schema = {"properties": {"path": {"type": "string"}}, "required": ("path",)}
    given = [tool(description="List", parameters=schema, strict=True), tool("cat", parameters={})]
    assert check_tools(given) == [
        tool(
            description="List",
            parameters={"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        ),
        tool("cat", description=""),
    ]


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ({}, "tools is {}"),
        ("ls", "tools is 'ls'"),
        ([3], "tools[0] is 3"),
        ([{"name": "ls"}], "tools[0].name is 'ls'"),
        ([{"type": "web_search"}], "tools[0].type is 'web_search'"),
        ([{"type": "function"}], "tools[0].function is None"),
        ([tool("a b")], "tools[0].function.name is 'a b'"),
        ([tool(strict="yes")], "tools[0].function.strict is 'yes'"),
        ([tool(description=3)], "tools[0].function.description is 3"),
        ([tool(parameters=[])], "tools[0].function.parameters is []"),
        ([tool(parameters={"type": "array"})], "tools[0].function.parameters.type is 'array'"),
        ([tool(parameters={"default": object()})], "tools[0].function.parameters.default is <object"),
        ([tool(), tool()], "tools[1].function.name is 'ls'"),
        ([tool(parameters={"default": ROUND})], "is nested deeper than 64"),
    ],
)
def test_every_fault_of_a_tool_is_named(tools: Any, field: str):
    with pytest.raises(RequestError) as caught:
        check_tools(tools)
    assert field in caught.value.message
    assert caught.value.hint
