"""The types of a call's values: as the tool's schema says where it is known, and as JSON has them where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.chat.tool_calls import QUOTE, MalformedToolCall, ToolCall, read_call, write_call
from tests.conftest import num_examples

from .test_tool_calls import arguments, is_same, quoted


def read(text: str, schema: Any, **more: Any) -> Any:
    """The value that the text has as an argument of this schema."""
    parameters = {"type": "object", "properties": {"a": schema}, **more}
    call = read_call(f"call:f{{a:{text}}}".split(QUOTE), {"f": parameters})
    assert isinstance(call, ToolCall), call
    return call.arguments["a"]


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


@pytest.mark.parametrize(
    ("text", "schema", "wanted"),
    [
        # A bare word is text where only text may be.
        ("12345", STRING, "12345"),
        ("00501", STRING, "00501"),
        ("1e3", STRING, "1e3"),
        ("true", STRING, "true"),
        ("null", STRING, "null"),
        ("NaN", STRING, "NaN"),
        ("108.", STRING, "108."),
        ("", STRING, ""),
        ("x", {"type": "STRING"}, "x"),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", {"const": "7"}, "7"),
        # Of several types, the one that it has in JSON.
        ("42", {"type": ["string", "integer"]}, 42),
        ("007", {"type": ["integer", "string"]}, "007"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string", "nullable": True}, None),
        ("7", {"anyOf": [STRING, {"type": "null"}]}, "7"),
        ("7", {"oneOf": [INTEGER, {"type": "null"}]}, 7),
        ("7", {"allOf": [STRING]}, "7"),
        ("7", {"$ref": "#/$defs/code"}, "7"),
        ("7", {"anyOf": [STRING, {}]}, 7),
        # A number or a truth value in another form.
        ("007", INTEGER, 7),
        ("3.0", INTEGER, 3),
        ("5", NUMBER, 5),
        ("5.0", NUMBER, 5.0),
        ("+5", NUMBER, 5),
        ("True", {"type": "boolean"}, True),
        ("FALSE", {"type": "boolean"}, False),
        ("0", {"type": "boolean"}, False),
        ("None", {"type": ["integer", "null"]}, None),
        ("", {"type": ["integer", "null"]}, None),
        ('<|"|>5<|"|>', INTEGER, 5),
        ('<|"|>2.5<|"|>', NUMBER, 2.5),
        ('<|"|>true<|"|>', {"type": "boolean"}, True),
        ('<|"|>{"k": [1]}<|"|>', {"type": "object"}, {"k": [1]}),
        # What the schema does not allow stays as it is.
        ("x", INTEGER, "x"),
        ("2.5", INTEGER, 2.5),
        ("true", INTEGER, True),
        ('<|"|>x<|"|>', INTEGER, "x"),
        ('<|"|>[1]<|"|>', {"type": "object"}, "[1]"),
        ('<|"|>' + "[" * 100_000 + '<|"|>', {"type": "array"}, "[" * 100_000),
        ('<|"|>5<|"|>', STRING, "5"),
        ("9" * 5000, INTEGER, "9" * 5000),
        # Inside objects and arrays.
        ("{zip:501,n:1}", {"properties": {"zip": STRING}}, {"zip": "501", "n": 1}),
        ("{x:1,y:2}", {"additionalProperties": STRING}, {"x": "1", "y": "2"}),
        ("[1,2]", {"type": "array", "items": STRING}, ["1", "2"]),
        ("[1,2,3]", {"prefixItems": [STRING], "items": NUMBER}, ["1", 2, 3]),
        ("[[{k:1}]]", {"items": {"items": {"properties": {"k": STRING}}}}, [[{"k": "1"}]]),
        ("{k:1}", {"anyOf": [{"type": "null"}, {"properties": {"k": STRING}}]}, {"k": "1"}),
        # Schemas that say nothing.
        ("7", {}, 7),
        ("7", True, 7),
        ("7", {"type": 3}, 7),
        ("7", {"$ref": "#/$defs/nowhere"}, 7),
        ("7", {"$ref": "#/$defs/loop"}, 7),
        ("7", {"$ref": "elsewhere.json"}, 7),
        ("7", {"anyOf": "x", "properties": 1, "items": 2}, 7),
    ],
)
def test_a_value_is_read_by_its_schema(text: str, schema: Any, wanted: Any):
    found = read(text, schema, **{"$defs": {"code": STRING, "loop": {"$ref": "#/$defs/loop"}}})
    assert json.dumps(found) == json.dumps(wanted)


@pytest.mark.parametrize(
    ("text", "schema", "fault"), [("NaN", NUMBER, "NaN"), ("", INTEGER, "missing")], ids=["NaN", "nothing"]
)
def test_an_invalid_value_makes_the_call_malformed(text: str, schema: Any, fault: str):
    call = read_call([f"call:f{{a:{text}}}"], {"f": {"properties": {"a": schema}}})
    assert isinstance(call, MalformedToolCall) and fault in call.fault


@pytest.mark.parametrize(
    ("text", "schema", "mended"), [("7", STRING, True), ("7", INTEGER, False), ('<|"|>7<|"|>', STRING, False)]
)
def test_values_are_converted_to_the_type_of_the_schema(text: str, schema: Any, mended: bool):
    call = read_call(f"call:f{{a:{text}}}".split(QUOTE), {"f": {"properties": {"a": schema}}})
    assert isinstance(call, ToolCall) and call.mended is mended


def test_another_tool_s_schema_is_ignored():
    assert read_call(["call:f{a:7}"], {"g": {"properties": {"a": STRING}}}) == ToolCall(name="f", arguments={"a": 7})


def schema_of(value: Any) -> dict[str, Any]:
    """The narrowest schema that this value fits."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: schema_of(entry) for key, entry in value.items()}}
    if isinstance(value, list):
        return {"type": "array", "prefixItems": [schema_of(entry) for entry in value]}
    return {"type": kinds[type(value)]}


@settings(max_examples=num_examples(50))
@given(arguments.filter(lambda value: not quoted(value)))
def test_a_schema_that_fits_changes_nothing(given: dict[str, Any]):
    call = read_call(write_call("f", given).split(QUOTE), {"f": schema_of(given)})
    assert is_same(call, given)
    assert isinstance(call, ToolCall) and not call.mended


schemas = st.recursive(
    st.none() | st.sampled_from([STRING, INTEGER, {"enum": [1, "x"]}, {"$ref": "#"}, {"type": ["null", "array"]}]),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            name: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner) | inner
            for name in ("properties", "items", "anyOf", "allOf", "additionalProperties", "prefixItems", "type", "enum")
        },
    ),
    max_leaves=6,
)


@settings(max_examples=num_examples(50))
@given(schemas, st.text('ab:{}[],1."N '))
def test_no_schema_makes_reading_raise(schema: Any, text: str):
    """Whatever a tool declares, reading raises nothing."""
    tools = {"f": schema if isinstance(schema, dict) else {}}
    assert isinstance(read_call(["call:f{a:" + text, "b", "}"], tools), ToolCall | MalformedToolCall)
