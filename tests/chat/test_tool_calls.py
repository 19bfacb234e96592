"""The grammar of tool calls: what is written is read back, and what is no call comes back whole with the reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpress.chat.tool_calls import MAX_DEPTH, QUOTE, MalformedToolCall, ToolCall, read_call, write_call

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
arguments = st.dictionaries(st.text(), values, max_size=5)


def pieces(text: str) -> list[str]:
    return text.split(QUOTE)


def quoted(value: object) -> bool:
    """Whether the quote's own text is in a string: then the pieces cannot be had from the joined text."""
    if isinstance(value, dict):
        return any(quoted(key) or quoted(entry) for key, entry in value.items())
    return any(map(quoted, value)) if isinstance(value, list) else QUOTE in str(value)


@given(arguments.filter(lambda value: not quoted(value)))
def test_what_is_written_is_read_back(given: dict[str, object]):
    call = read_call(pieces(write_call("tool.name-1", given)))
    assert isinstance(call, ToolCall) and call.name == "tool.name-1"
    assert json.dumps(call.arguments, sort_keys=True) == json.dumps(given, sort_keys=True)


@pytest.mark.parametrize(
    ("name", "given", "written"),
    [
        ("now", {}, "call:now{}"),
        ("ls", {"path": "."}, 'call:ls{path:<|"|>.<|"|>}'),
        ("f", {"b": 1, "A": 2, "c": -0.5}, "call:f{A:2,b:1,c:-0.5}"),
        ("f", {"x": [True, None, ["y"], {}]}, 'call:f{x:[true,null,[<|"|>y<|"|>],{}]}'),
        ("f", {"a:b": 1, "": 2, " c": 3}, 'call:f{<|"|><|"|>:2,<|"|> c<|"|>:3,<|"|>a:b<|"|>:1}'),
        ("f", {"größe": "„ü“\n"}, 'call:f{größe:<|"|>„ü“\n<|"|>}'),
    ],
)
def test_how_a_call_is_written(name: str, given: dict[str, object], written: str):
    assert write_call(name, given) == written


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('  call : ls { path : <|"|>.<|"|> , n : 3 }\n', {"path": ".", "n": 3}),
        ('call:ls{"path":"a\\"b\\n","n":"{"}', {"path": 'a"b\n', "n": "{"}),
        ("call:ls{when:12:30,city:New York}", {"when": "12:30", "city": "New York"}),
        (
            "call:ls{a:1e400,b:01,c:1.,d:True,e:nan,f:-}",
            {"a": "1e400", "b": "01", "c": "1.", "d": "True", "e": "nan", "f": "-"},
        ),
        ("call:ls{a:" + "9" * 5000 + "}", {"a": "9" * 5000}),
        ('call:ls{<|"|>a b<|"|>:[ ],c d:[1 ,2]}', {"a b": [], "c d": [1, 2]}),
    ],
    ids=["blanks", "json quotes", "bare words", "no numbers", "too many digits", "keys"],
)
def test_what_models_write_besides_is_read_too(text: str, wanted: dict[str, object]):
    assert read_call(pieces(text)) == ToolCall(name="ls", arguments=wanted)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "'call:'"),
        ("cal:ls{}", "'call:'"),
        ('<|"|>call<|"|>:ls{}', "quoted string"),
        ("call:{}", "no name"),
        ("call:ls", "no '{'"),
        ('call:ls(path="x")', "no '{'"),
        ("call:ls{", "inside an object"),
        ("call:ls{a:[1,2", "inside an array"),
        ("call:ls{a:1", "inside an object"),
        ("call:ls{a:}", "missing"),
        ("call:ls{a:1,}", "a key"),
        ("call:ls{,}", "a key"),
        ("call:ls{a}", "no ':'"),
        ("call:ls{a:1,a:2}", "twice"),
        ("call:ls{a:[1}", "','"),
        ("call:ls{a:1]}", "','"),
        ("call:ls{a:1}}", "behind the call"),
        ("call:ls{}call:ls{}", "behind the call"),
        ('call:ls{a:<|"|>x}', "not closed"),
        ('call:ls{a:<|"|>x<|"|><|"|>y<|"|>}', "','"),
        ('call:ls{a:x<|"|>y<|"|>}', "behind text"),
        ('call:ls{a:"x}', "not closed"),
        ('call:ls{a:"\\q"}', "JSON string"),
        ("call:ls{a:" + "[" * (MAX_DEPTH + 1), "deeper"),
        ("call:ls{a:" + "[" * 100_000, "deeper"),
    ],
)
def test_what_is_no_call_comes_back_whole_with_the_reason(text: str, fault: str):
    call = read_call(pieces(text))
    assert isinstance(call, MalformedToolCall)
    assert call.raw == text
    assert fault in call.fault


def test_the_deepest_that_is_allowed():
    inner: object = []
    for _ in range(MAX_DEPTH - 2):
        inner = [inner]
    assert read_call(pieces(write_call("f", {"a": inner}))) == ToolCall(name="f", arguments={"a": inner})


@given(st.lists(st.text(alphabet='call:f{}[],"x1 \n\\'), min_size=1, max_size=5))
def test_any_text_is_a_call_or_broken(texts: list[str]):
    call = read_call(texts)
    if isinstance(call, MalformedToolCall):
        assert call.raw == QUOTE.join(texts) and call.fault
    else:
        assert read_call(pieces(write_call(call.name, call.arguments))) == call
