"""JSON schemas: every text of the automaton is valid by `jsonschema`; what cannot be enforced is refused by name."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.alternatives import KEYWORDS
from blockpress.constrain.automaton import Automaton, _NothingMatches
from blockpress.constrain.formats import FORMATS
from blockpress.constrain.schema import schema_automaton
from blockpress.errors import RequestError
from tests.conftest import num_examples
from tests.constrain.walks import random_text

NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
KEYED = {"type": "object", "required": ["k"]}
SCHEMAS: dict[str, Any] = {
    "a person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "a list": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "a tree": {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "k": {"enum": ["a", 1]}},
    },
    "a union": {"anyOf": [{"type": "string", "format": "date"}, {"type": "number", "exclusiveMinimum": 0.5}]},
    "a nullable pattern": {"type": ["string", "null"], "maxLength": 4, "pattern": '^[a-z"\\\\]+$'},
    "a tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"const": "x"}],
        "items": {"type": "boolean"},
        "minItems": 3,
    },
    "a tuple of draft 7": {"type": "array", "items": [{"type": "null"}], "additionalItems": False},
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "patterns of keys": {
        "type": "object",
        "patternProperties": {"^x_": {"type": "integer"}, "_y$": {"type": "string"}},
        "properties": {"a": {"type": "null"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "names of keys": {
        "type": "object",
        "propertyNames": {"pattern": "^[A-Z]{2}$"},
        "additionalProperties": {"type": "integer"},
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 3, "minimum": -3}, "b": {"type": "string"}}},
        ]
    },
    "one of": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
                "required": ["kind"],
            },
            {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]},
        ]
    },
    "unicode keys": {
        "type": "object",
        "properties": {"größe 日本": {"type": "integer"}, 'a"b\n': {}},
        "required": ["größe 日本", 'a"b\n'],
    },
    "anything": {},
    "any object": {"type": "object"},
    "any array": {"type": "array", "minItems": 2},
    "listed values": {"enum": [1, 1.5, "ü", [], {"a": None}]},
    "listed values of a type": {"type": ["string", "array"], "enum": [1, "ü", "long", [1]], "maxLength": 2},
    "a count of keys": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "c": {"type": "integer"}},
        "minProperties": 2,
        "maxProperties": 2,
    },
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": -50, "maximum": 50},
    "a whole number as a number": {
        "allOf": [{"type": "number", "maximum": 9.5}, {"type": "integer"}, {"multipleOf": 2}]
    },
    "a required key without a schema": {"type": "object", "required": ["id"], "properties": {"x": {"type": "null"}}},
    "an annotation": {"title": "t", "description": "d", "default": 1, "type": "boolean", "examples": [True]},
    "a declared key that a pattern matches": {
        "type": "object",
        "properties": {"fa": {"type": "integer"}},
        "patternProperties": {"^f": {"minimum": 5}},
        "required": ["fa"],
        "additionalProperties": False,
    },
    "a required key that only a pattern matches": {
        "type": "object",
        "patternProperties": {"^f": {"type": "integer"}},
        "required": ["fa"],
        "additionalProperties": False,
    },
    "listed values beyond what is written freely": {
        "type": ["integer", "array"],
        "enum": [10**20, 1.0, [[[[[1]]]]], "no"],
    },
    "large numbers": {"type": "number", "minimum": 1700000000000, "exclusiveMaximum": 1700000000001},
    "numbers beside a fine bound": {"type": "number", "minimum": 1e-8, "exclusiveMaximum": 1000},
    "a bound looser than what is written": {"type": "number", "minimum": -(10**30) - 1, "maximum": 1e300},
    "a reference with an escaped name": {"$defs": {"P<int>": {"type": "integer"}}, "$ref": "#/$defs/P%3Cint%3E"},
    "a decimal as pydantic writes it": {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
    "patterns that are anchored each": {"type": "string", "pattern": "^$|^a+$|^b$"},
    "a definition used twice": {
        "definitions": {"p": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
        "type": "object",
        "properties": {"a": {"$ref": "#/definitions/p"}, "b": {"$ref": "#/definitions/p"}},
        "required": ["a", "b"],
    },
}


def compiled(schema: Any) -> Automaton:
    return schema_automaton(schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_is_a_value_that_the_schema_allows(name: str) -> None:
    automaton, validator = compiled(SCHEMAS[name]), jsonschema.Draft202012Validator(SCHEMAS[name])
    if name == "a tuple of draft 7":
        validator = jsonschema.Draft7Validator(SCHEMAS[name])
    for seed in range(30):
        assert validator.is_valid(json.loads(random_text(automaton, random.Random(seed))))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a person", {"name": 'A "b" \\ ü\n', "age": 130, "tags": ["x", ""]}),
        ("a person", {"name": "A", "age": 0}),
        ("a list", {"v": 1, "next": {"v": 2, "next": {"v": 3, "next": None}}}),
        ("a tree", {"left": {"right": {"k": "a"}}, "k": 1}),
        ("a union", "2024-02-28"),
        ("a union", 0.51),
        ("a tuple", [1, "x", True, False]),
        ("a map", {"a": 1, 'a"b': -2}),
        ("patterns of keys", {"a": None, "x_": 3}),
        ("all of", {"a": -3, "b": ""}),
        ("one of", {"kind": "cat", "lives": 9}),
        ("anything", {"a": [1, {}]}),
        ("a count of keys", {"a": 1, "c": 2}),
        ("a whole number as a number", 8),
        ("a required key without a schema", {"x": None, "id": [1]}),
        ("a required key that only a pattern matches", {"fa": 3, "fb": 4}),
        ("listed values beyond what is written freely", 10**20),
        ("listed values beyond what is written freely", 1.0),
        ("listed values beyond what is written freely", [[[[[1]]]]]),
        ("large numbers", 1700000000000.25),
        ("numbers beside a fine bound", 0.001),
        ("numbers beside a fine bound", 999.5),
        ("patterns that are anchored each", ""),
        ("a decimal as pydantic writes it", "-0.5"),
        ("patterns that are anchored each", "aa"),
    ],
)
def test_usual_values_can_be_written_with_and_without_spaces(name: str, value: Any) -> None:
    automaton = compiled(SCHEMAS[name])
    for separators in ((",", ":"), (", ", ": ")):
        assert automaton.matches(json.dumps(value, ensure_ascii=False, separators=separators))


SCALARS = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-99, 99),
        st.integers(0, 300),
    ),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.sampled_from([-2.5, 0, 0.125])),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": [1, "a"]},
            {"enum": ["a", "b", None]},
            {"type": "string", "pattern": "[0-9]b?"},
        ]
    ),
)
KEYS = st.sampled_from(["a", "b", "ü", "x y"])


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(KEYS, inner, max_size=3)
    return st.one_of(
        st.builds(
            lambda props, needed, closed: {
                "type": "object",
                "properties": props,
                "required": sorted(needed),
                **({"additionalProperties": False} if closed else {}),
            },
            properties,
            st.sets(KEYS, max_size=2),
            st.booleans(),
        ),
        st.builds(
            lambda item, low, size: {"type": "array", "items": item, "minItems": low, "maxItems": low + size},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(
            lambda items: {"type": "array", "prefixItems": items, "items": False},
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda parts: {"allOf": parts}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda value: {"type": "object", "additionalProperties": value, "maxProperties": 2}, inner),
    )


@settings(max_examples=num_examples(40))
@given(schema=st.recursive(SCALARS, nested, max_leaves=6), seed=st.integers(0, 99))
def test_random_schemas_give_valid_values_alone_or_have_none(schema: Any, seed: int) -> None:
    try:
        automaton = compiled(schema)
    except _NothingMatches:
        return
    text = random_text(automaton, random.Random(seed), 200)
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "strin"}, "#/type"),
        ({"minimum": "3"}, "#/minimum"),
        ({"properties": {"a/b": {"minLength": -1}}}, "#/properties/a~1b/minLength"),
        ({"required": "a"}, "#/required"),
        ({"items": 3}, "#/items"),
        ({"properties": {"a": {"pattern": "("}}}, "#/properties/a/pattern"),
        ({"pattern": r"(a+)\1"}, "back reference"),
        ({"pattern": r"\p{Wrong}"}, "#/pattern"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "#/properties/a/$ref"),
        ({"$ref": "https://example.org/s.json"}, "https://example.org"),
        ({"$ref": "#nowhere"}, "#/$ref"),
        ({"$ref": 3}, "#/$ref"),
        (
            {
                "$defs": {"a": {"$dynamicAnchor": "n"}, "b": {"$dynamicAnchor": "n", "type": "null"}},
                "$dynamicRef": "#n",
            },
            "#/$dynamicRef",
        ),
        ({"anyOf": {}}, "#/anyOf"),
        ({"dependentRequired": []}, "#/dependentRequired"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "format": "uri"}]}, "#/oneOf"),
        (
            {"type": "array", "items": {"type": "object"}, "uniqueItems": True, "minItems": 2},
            "#/uniqueItems",
        ),
        ({"type": "number", "minimum": 10**400}, "#/minimum"),
        ({"type": "number", "minimum": 0, "maximum": 1e-30}, "#/m"),
        ({"type": "string", "minLength": 10**9}, "#/minLength"),
        ({"properties": {"b": {"minItems": 19_000, "items": {"type": "string"}}}, "required": ["b"]}, "#/properties/b"),
        ({"properties": {1: {}}}, "#/properties"),
        ({"patternProperties": {"(": {}}}, "#/patternProperties/("),
        ({"$ref": "#"}, "endless depth"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "endless depth"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "#/$schema"),
        ('{"type": "integer"}', "the text"),
        (7, "schema # is 7"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_keyword_and_place(schema: Any, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(schema)
    assert named in caught.value.message


def test_definitions_within_each_other_are_written_out_once_for_each_depth() -> None:
    names = ["a", "b", "c", "d"]
    parts = {"type": "object", "properties": {name: {"$ref": f"#/$defs/{name}"} for name in names}}
    schema = {"$defs": dict.fromkeys(names, parts), "$ref": "#/$defs/a"}
    assert compiled(schema).matches('{"a":{},"b":{"a":{}}}')


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
        {"enum": []},
        {"type": []},
        {"allOf": [{"type": "string", "maxLength": 0}, {"minLength": 1}]},
        {"type": "string", "enum": [1]},
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "string", "pattern": "^a$", "minLength": 2},
        {"type": "array", "items": False, "minItems": 1},
    ],
)
def test_a_schema_that_allows_no_value_is_told_apart(schema: Any) -> None:
    with pytest.raises(_NothingMatches):
        compiled(schema)


def test_the_page_lists_the_keywords_and_formats_that_are_enforced() -> None:
    page = (Path(__file__).parents[2] / "docs" / "constraints.md").read_text(encoding="utf-8")
    enforced, formats = (
        set(re.findall(r"`([^` ]+)`", re.search(rf"^\| {name} \|(.*)$", page, re.M)[1]))  # type: ignore[index]
        for name in ("enforced", "formats")
    )
    assert (enforced, formats) == (KEYWORDS, set(FORMATS))
