"""Schemas for tests: 150 written in the manner of public benchmarks, one a line of schemas.jsonl, and random ones.

They are like function calls, resources of Kubernetes, events, articles, configuration files and what `pydantic` writes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema import validators

SCHEMAS: list[Any] = [
    json.loads(line) for line in (Path(__file__).parent / "schemas.jsonl").read_text("utf-8").split("\n") if line
]
KEYS = ("a", "b", "c", "name", "größe", "x y")
SCALARS: tuple[dict[str, Any], ...] = (
    {"type": "string"},
    {"type": "string", "maxLength": 300, "minLength": 1},
    {"type": "string", "pattern": "^[a-c]{1,40}$"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "email"},
    {"type": ["string", "null"], "not": {"const": "no"}},
    {"type": "integer", "minimum": -3, "maximum": 999},
    {"type": "number", "exclusiveMinimum": 0.5},
    {"type": "number", "multipleOf": 0.25},
    {"type": "boolean"},
    {"enum": ["a", 1, None, [2], {"k": "ü"}]},
    {"const": "b"},
    {"oneOf": [{"type": "integer", "multipleOf": 2}, {"type": "integer", "minimum": 7}]},
    {"$ref": "#"},
    {},
)


def random_schema(rng: random.Random, depth: int = 3) -> Any:
    """Keywords of every kind, combined at random; recursion by "#"."""
    if not depth or rng.random() < 0.2:
        return rng.choice(SCALARS)
    keys = rng.sample(KEYS, rng.randint(1, 3))
    inner = {key: random_schema(rng, depth - 1) for key in keys}
    one, other = (rng.choice(list(inner.values())) for _ in range(2))
    whole: dict[str, Any] = {
        "type": "object",
        "properties": inner,
        "required": rng.sample(keys, rng.randint(0, len(keys))),
    }
    return rng.choice(
        [
            whole,
            {**whole, "additionalProperties": rng.choice([False, {"type": "integer"}])},
            {**whole, "patternProperties": {"^[a-b]": {"minimum": 2}}, "propertyNames": {"maxLength": 4}},
            {**whole, "if": {"required": keys[:1]}, "then": {"required": keys[-1:]}, "else": {"properties": {"b": False}}},
            {**whole, "dependentRequired": {keys[0]: ["name"]}, "unevaluatedProperties": False},
            {**whole, "not": {"required": keys}},
            {**whole, "anyOf": [{"required": [key]} for key in keys], "minProperties": 1},
            {"type": "array", "items": one, "maxItems": rng.randint(1, 9)},
            {"type": "array", "items": rng.choice(SCALARS), "uniqueItems": True},
            {"type": "array", "prefixItems": [one, other], "items": False, "minItems": 1},
            {"type": "array", "items": one, "contains": other, "maxItems": 3},
            {"anyOf": [one, other, {"type": "null"}]},
            {"oneOf": [one, {"type": "array", "maxItems": 2}]},
            {"allOf": [whole, {"properties": {keys[0]: {"type": ["integer", "string", "object"]}}}]},
        ]
    )  # fmt: skip


def validator(schema: Any) -> Any:
    """What `jsonschema` makes of a schema, by the draft that it names, formats checked."""
    kind = validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)
