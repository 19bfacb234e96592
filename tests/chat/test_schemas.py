"""Schemas of tools: what no template can show becomes what it can, and the rest stays as it is."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.chat import encode_chat
from blockpress.chat.schemas import plain_schema
from blockpress.errors import RequestError
from tests.chat_tokenizer import TOKENIZER
from tests.conftest import num_examples

from .published import PUBLISHED

STRING, INTEGER, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}
Q = '<|"|>'

UNIT = {"Unit": {"title": "Unit", "type": "string", "enum": ["C", "F"]}}
NODE = {
    "type": "object",
    "description": "A node",
    "properties": {
        "value": INTEGER,
        "next": {"$ref": "#/$defs/Node"},
        "all": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
    },
}
CIRCLE = {
    "type": "object",
    "properties": {"kind": {"const": "circle"}, "r": {"type": "number"}},
    "required": ["kind", "r"],
}
SQUARE = {"type": "object", "properties": {"kind": {"const": "square"}}, "required": ["kind"]}

TABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a type or null": ({"type": ["string", "null"]}, {}, f"nullable:true,type:{Q}STRING{Q}"),
    "a list of one type": ({"type": ["integer"]}, {}, f"type:{Q}INTEGER{Q}"),
    "several types": ({"type": ["string", "boolean"]}, {}, f"type:{Q}STRING|BOOLEAN{Q}"),
    "numbers are integers too": ({"type": ["integer", "number"]}, {}, f"type:{Q}NUMBER{Q}"),
    "nothing but null": ({"type": ["null"]}, {}, f"type:{Q}NULL{Q}"),
    "null among the values": (
        {"type": ["string", "null"], "enum": ["a", None]},
        {},
        f"enum:[{Q}a{Q}],nullable:true,type:{Q}STRING{Q}",
    ),
    "an alternative or null": (
        {"anyOf": [STRING, NULL], "default": None, "description": "x", "title": "X"},
        {},
        f"description:{Q}x{Q},nullable:true,type:{Q}STRING{Q}",
    ),
    "alternatives of several types": (
        {"oneOf": [STRING, {"type": "boolean", "title": "T"}]},
        {},
        f"type:{Q}STRING|BOOLEAN{Q}",
    ),
    "alternatives of several types, with details": (
        {
            "description": "Who.",
            "anyOf": [{"enum": ["all"]}, {"type": "array", "items": {"anyOf": [STRING, INTEGER]}}, NULL],
        },
        {},
        f'description:{Q}Who. One of: {{"enum": ["all"], "type": "string"}}; '
        '{"type": "array", "items": {"type": "string|integer", "anyOf": [{"type": "string"}, {"type": "integer"}]}}'
        f"{Q},nullable:true,type:{Q}STRING|ARRAY{Q}",
    ),
    "alternatives of one type": (
        {"anyOf": [{"const": "a"}, {"enum": ["b", "c"]}, {"enum": ["a"]}]},
        {},
        f"enum:[{Q}a{Q},{Q}b{Q},{Q}c{Q}],type:{Q}STRING{Q}",
    ),
    "alternatives that are described": (
        {"oneOf": [{"const": "a", "description": "slow"}, {"const": "b", "description": "fast"}]},
        {},
        f"description:{Q}slow; fast{Q},enum:[{Q}a{Q},{Q}b{Q}],type:{Q}STRING{Q}",
    ),
    "alternatives that are objects": (
        {"oneOf": [CIRCLE, SQUARE]},
        {},
        f"properties:{{kind:{{enum:[{Q}circle{Q},{Q}square{Q}],type:{Q}STRING{Q}}},r:{{type:{Q}NUMBER{Q}}}}},"
        f"required:[{Q}kind{Q}],type:{Q}OBJECT{Q}",
    ),
    "a reference": ({"$ref": "#/$defs/Unit"}, UNIT, f"enum:[{Q}C{Q},{Q}F{Q}],type:{Q}STRING{Q}"),
    "a reference with words of its own": (
        {"$ref": "#/$defs/Unit", "description": "of it"},
        UNIT,
        f"description:{Q}of it{Q},enum:[{Q}C{Q},{Q}F{Q}],type:{Q}STRING{Q}",
    ),
    "a reference as Pydantic 1 writes it": (
        {"allOf": [{"$ref": "#/$defs/Unit"}], "default": "C"},
        UNIT,
        f"enum:[{Q}C{Q},{Q}F{Q}],type:{Q}STRING{Q}",
    ),
    "a reference or null": (
        {"anyOf": [{"$ref": "#/$defs/Unit"}, NULL]},
        UNIT,
        f"enum:[{Q}C{Q},{Q}F{Q}],nullable:true,type:{Q}STRING{Q}",
    ),
    "a reference to a property, escaped": (
        {"$ref": "#/$defs/a~1b/properties/%25"},
        {"a/b": {"properties": {"%": INTEGER}}},
        f"type:{Q}INTEGER{Q}",
    ),
    "a reference to itself": (
        {"$ref": "#/$defs/Node"},
        {"Node": NODE},
        f"description:{Q}A node{Q},properties:{{"
        f"all:{{items:{{description:{Q}A node{Q},type:{Q}OBJECT{Q}}},type:{Q}ARRAY{Q}}},"
        f"next:{{description:{Q}A node{Q},properties:{{}},type:{Q}OBJECT{Q}}},value:{{type:{Q}INTEGER{Q}}}}},type:{Q}OBJECT{Q}",
    ),
    "a constant": ({"const": "on"}, {}, f"enum:[{Q}on{Q}],type:{Q}STRING{Q}"),
    "a constant that is no text": ({"const": True}, {}, f"type:{Q}BOOLEAN{Q}"),
    "values without a type": ({"enum": ["a", "b"]}, {}, f"enum:[{Q}a{Q},{Q}b{Q}],type:{Q}STRING{Q}"),
    "no values": ({"enum": []}, {}, f"type:{Q}ANY{Q}"),
    "values of several types": ({"enum": ["auto", 1, None]}, {}, f"nullable:true,type:{Q}STRING|INTEGER{Q}"),
    "nullable, as OpenAPI says it": ({"type": "string", "nullable": True}, {}, f"nullable:true,type:{Q}STRING{Q}"),
    "arrays in arrays": (
        {"type": "array", "items": {"type": "array", "items": {"$ref": "#/$defs/Unit"}}},
        UNIT,
        f"items:{{items:{{{Q}enum{Q}:[{Q}C{Q},{Q}F{Q}],{Q}title{Q}:{Q}Unit{Q},{Q}type{Q}:{Q}string{Q}}},type:{Q}ARRAY{Q}}},"
        f"type:{Q}ARRAY{Q}",
    ),
    "items of a type or null": (
        {"type": "array", "items": {"type": ["string", "null"]}},
        {},
        f"items:{{nullable:true,type:{Q}STRING{Q}}},type:{Q}ARRAY{Q}",
    ),
    "a tuple": ({"prefixItems": [STRING, STRING]}, {}, f"items:{{type:{Q}STRING{Q}}},type:{Q}ARRAY{Q}"),
    "a tuple up to draft 7": (
        {"type": "array", "items": [STRING, STRING]},
        {},
        f"items:{{type:{Q}STRING{Q}}},type:{Q}ARRAY{Q}",
    ),
    "a type that only keywords tell": ({"minLength": 1}, {}, f"type:{Q}STRING{Q}"),
    "properties without a type": (
        {"properties": {"a": INTEGER}},
        {},
        f"properties:{{a:{{type:{Q}INTEGER{Q}}}}},type:{Q}OBJECT{Q}",
    ),
    "anything": ({}, {}, f"type:{Q}ANY{Q}"),
    "anything, as true": (True, {}, f"type:{Q}ANY{Q}"),
    "keywords of an object are no properties": (
        {"type": "object", "title": "T", "additionalProperties": False},
        {},
        f"properties:{{}},type:{Q}OBJECT{Q}",
    ),
    "a map": (
        {"type": "object", "title": "T", "additionalProperties": {"anyOf": [INTEGER, NULL]}},
        {},
        f"properties:{{additionalProperties:{{nullable:true,type:{Q}INTEGER{Q}}}}},type:{Q}OBJECT{Q}",
    ),
    "alternatives that only ask for keys": (
        {"type": "object", "properties": {"a": INTEGER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {},
        f"properties:{{a:{{type:{Q}INTEGER{Q}}}}},type:{Q}OBJECT{Q}",
    ),
}


def prompt(schema: Any, defs: dict[str, Any]) -> str:
    parameters = {"type": "object", "properties": {"x": schema}, **({"$defs": defs} if defs else {})}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    ids = encode_chat(TOKENIZER, PUBLISHED, [{"role": "user", "content": "?"}], tools=[tool]).ids
    return TOKENIZER.decode(ids, skip_special=False)


@pytest.mark.parametrize("name", TABLE)
def test_the_prompt_shows_real_types(name: str):
    schema, defs, shown = TABLE[name]
    assert f"properties:{{x:{{{shown}}}}},type:{Q}OBJECT{Q}" in prompt(schema, defs)


PLAIN = [
    {"type": "STRING", "enum": ["a"], "description": "d"},
    {"type": "string", "nullable": False, "format": "date"},
    {"type": "integer", "enum": [1, 2], "minimum": 0},
    {
        "type": "array",
        "items": {"type": "object", "properties": {"a": STRING}, "required": ["a"], "additionalProperties": False},
    },
    {"type": "array"},
    {"type": "array", "items": {}},
    {"type": "object", "properties": {"a": {"type": "boolean", "default": None}}, "required": []},
    {"type": "float"},
]


@pytest.mark.parametrize("schema", PLAIN, ids=range(len(PLAIN)))
def test_what_templates_can_show_is_left_as_it_is(schema: dict[str, Any]):
    root = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    assert plain_schema(root, "p") == root


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ("string", "properties.x is 'string'"),
        ({"type": 3}, "properties.x.type is 3"),
        ({"type": []}, "properties.x.type is []"),
        ({"type": ""}, "properties.x.type is ''"),
        ({"description": ["a", "b"]}, 'properties.x.description is ["a", "b"]'),
        ({"anyOf": [STRING, {"description": 3}]}, "properties.x.anyOf[1].description is 3"),
        ({"type": ["string", 3]}, "properties.x.type is"),
        ({"properties": []}, "properties.x.properties is []"),
        ({"properties": {"y": "z"}}, "properties.x.properties.y is 'z'"),
        ({"type": "object", "required": "y"}, "properties.x.required is 'y'"),
        ({"anyOf": STRING}, "properties.x.anyOf is"),
        ({"anyOf": [STRING, 3]}, "properties.x.anyOf[1] is 3"),
        ({"allOf": [False]}, "properties.x.allOf[0] is False"),
        ({"type": "array", "items": 3}, "properties.x.items is 3"),
        ({"enum": "a"}, "properties.x.enum is 'a'"),
        ({"$ref": "#/$defs/none"}, "properties.x.$ref is '#/$defs/none'"),
        ({"$ref": "#anchor"}, "properties.x.$ref is '#anchor'"),
        ({"$ref": "https://example.com/x"}, "properties.x.$ref is 'https://example.com/x'"),
        ({"$ref": 3}, "properties.x.$ref is 3"),
    ],
)
def test_every_fault_of_a_schema_is_named(schema: Any, field: str):
    with pytest.raises(RequestError) as caught:
        prompt(schema, {})
    assert f"tools[0].function.parameters.{field}" in caught.value.message
    assert caught.value.hint


def test_references_that_double_are_refused_soon():
    defs: dict[str, Any] = {
        f"d{n}": {"properties": {k: {"$ref": f"#/$defs/d{n + 1}"} for k in "ab"}} for n in range(40)
    }
    begin = time.process_time()
    with pytest.raises(RequestError, match="more than 10000 parts"):
        prompt({"$ref": "#/$defs/d0"}, {**defs, "d40": STRING})
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("ref", ["#", "#/$defs/a", "#/properties/x"])
def test_a_reference_to_itself_alone_ends(ref: str):
    assert f"type:{Q}" in prompt({"$ref": ref}, {"a": {"$ref": "#/$defs/a"}})


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            STRING,
            INTEGER,
            NULL,
            {},
            True,
            {"const": 1},
            {"enum": ["a", None]},
            {"type": ["string", "null"]},
            {"$ref": "#"},
        ]
    )
    | st.sampled_from([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]),
    lambda inner: st.one_of(
        st.builds(
            lambda word, parts: {word: parts},
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(
            lambda parts: {"type": "object", "properties": parts},
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        ),
        st.builds(lambda part: {"type": "array", "items": part}, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=num_examples(50))
@given(SCHEMAS, SCHEMAS, SCHEMAS)
def test_no_schema_reaches_the_prompt_without_a_type(schema: Any, a: Any, b: Any):
    text = prompt(schema, {"a": a, "b": b})
    assert f"type:{Q}{Q}" not in text and "$ref" not in text
    plain = json.dumps(plain_schema({"properties": {"x": schema}, "$defs": {"a": a, "b": b}}, "p"))
    assert not any(word in plain for word in ("$ref", "allOf", "const", '"type": ['))
