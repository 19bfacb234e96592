"""A JSON schema's own keywords in one form, and two sets of them that a value must satisfy both as one.

    type        a list                      enum       also of const           pattern, format     tuples
    minimum     (number, excluded)          maximum    likewise                prefixItems  also of a list in items

Invariant: a value satisfies the merged keywords exactly if it satisfies both; None means that no value can.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from blockpress.errors import RequestError

ANNOTATIONS = frozenset(
    [
        "$anchor",
        "$comment",
        "$defs",
        "$id",
        "$schema",
        "contentEncoding",
        "contentMediaType",
        "default",
        "definitions",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "externalDocs",
        "readOnly",
        "title",
        "writeOnly",
        "xml",
    ]
)
"""Keywords that say nothing about which values are allowed."""
OF_TYPE = {
    "object": "properties required additionalProperties patternProperties propertyNames minProperties maxProperties",
    "array": "items prefixItems additionalItems minItems maxItems uniqueItems",
    "string": "minLength maxLength pattern format",
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
}
KEYWORDS = frozenset(" ".join(OF_TYPE.values()).split()) | {"type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf"}
"""Keywords that are enforced."""
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def normalize_keywords(schema: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """The keywords of a schema without combining ones, checked; None if no value satisfies them.

    Raises:
        RequestError: a keyword's value is not what it must be.
    """
    flat = dict(schema)

    def need(name: str, ok: bool, what: str) -> None:
        if not ok:
            raise RequestError(f"{path}.{name} is {schema[name]!r:.80}", hint=f"it must be {what}")

    if "type" in flat:
        given = flat["type"]
        kinds = [given] if isinstance(given, str) else given
        need("type", isinstance(kinds, list | tuple) and all(k in TYPES for k in kinds), f"of {', '.join(TYPES)}")
        flat["type"] = [kind for kind in dict.fromkeys(kinds) if not (kind == "integer" and "number" in kinds)]
    for name in ("properties", "patternProperties"):
        if name in flat:
            mapped = isinstance(flat[name], Mapping) and all(isinstance(key, str) for key in flat[name])
            need(name, mapped, "a mapping of schemas")
    _fold_patterns(flat, path)
    for name in ("enum", "required", "prefixItems"):
        if name in flat:
            need(name, isinstance(flat[name], list | tuple), "a list")
    if "required" in flat:
        need("required", all(isinstance(each, str) for each in flat["required"]), "a list of names")
        flat["required"] = list(dict.fromkeys(flat["required"]))
    for name in _COUNTS:
        if name in flat:
            need(name, _is_number(flat[name]) and flat[name] == int(flat[name]) >= 0, "a whole number of at least 0")
            flat[name] = int(flat[name])
    for name in ("pattern", "format"):
        if name in flat:
            need(name, isinstance(flat[name], str), "a text")
            flat[name] = (flat[name],)
    if "multipleOf" in flat:
        need("multipleOf", _is_number(flat["multipleOf"]) and flat["multipleOf"] > 0, "a number above 0")
    if isinstance(flat.get("items"), list | tuple):
        flat["prefixItems"] = flat.pop("items")
        if "additionalItems" in flat:
            flat["items"] = flat["additionalItems"]
    flat.pop("additionalItems", None)
    for side in ("minimum", "maximum"):
        bounds = []
        for name, excluded in ((side, False), (f"exclusive{side.capitalize()}", True)):
            if name in flat:
                need(name, _is_number(flat[name]), "a number")
                bounds.append((Decimal(repr(flat.pop(name))), excluded))
        if bounds:
            flat[side] = _tighter(side, bounds)
    if "const" in flat:
        listed = {"enum": [flat.pop("const")]}
        return merge_keywords(flat, listed, path)
    return None if flat.get("type") == [] else flat


def _fold_patterns(flat: dict[str, Any], path: str) -> None:
    """Asks of declared properties also what patterns that match their names do."""
    for pattern in flat.get("patternProperties", ()):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise RequestError(f"{path}.patternProperties has {pattern!r:.200}: {error}", hint="correct it") from None
    if "patternProperties" in flat and "properties" in flat:
        flat["properties"] = {
            name: _all_of(schema, property_schema({**flat, "properties": {}, "additionalProperties": True}, name))
            for name, schema in flat["properties"].items()
        }


def merge_keywords(left: dict[str, Any], right: dict[str, Any], path: str) -> dict[str, Any] | None:
    """Keywords that hold exactly where those of both sides do, all as `normalize_keywords` gives them; None: nowhere.

    Raises:
        RequestError: factors that have no common multiple among whole numbers.
    """
    both = {**right, **left}
    for name in left.keys() & right.keys():
        one, other = left[name], right[name]
        if name == "type":
            both[name] = _common_types(one, other)
        elif name == "enum":
            texts = [_canonical(value) for value in other]
            both[name] = [value for value in one if _canonical(value) in texts]
        elif name in ("minimum", "maximum"):
            both[name] = _tighter(name, [one, other])
        elif name in _COUNTS:
            both[name] = max(one, other) if name.startswith("min") else min(one, other)
        elif name in ("pattern", "format"):
            both[name] = (*one, *(each for each in other if each not in one))
        elif name == "required":
            both[name] = list(dict.fromkeys([*one, *other]))
        elif name == "uniqueItems":
            both[name] = one or other
        elif name == "multipleOf":
            if one != int(one) or other != int(other):
                raise RequestError(f"{path}.multipleOf is {one!r} and {other!r}", hint="give whole numbers")
            both[name] = math.lcm(int(one), int(other))
        elif name in ("items", "additionalProperties", "propertyNames"):
            both[name] = _all_of(one, other)
    if "properties" in both:
        names = dict.fromkeys([*left.get("properties", {}), *right.get("properties", {})])
        both["properties"] = {name: _all_of(*(property_schema(side, name) for side in (left, right))) for name in names}
    if "patternProperties" in both:
        patterns = dict.fromkeys([*left.get("patternProperties", {}), *right.get("patternProperties", {})])
        both["patternProperties"] = {
            pattern: _all_of(
                *(
                    side.get("patternProperties", {}).get(pattern, side.get("additionalProperties", True))
                    for side in (left, right)
                )
            )
            for pattern in patterns
        }
    if "prefixItems" in left and "prefixItems" in right:
        longest = max(len(left["prefixItems"]), len(right["prefixItems"]))
        both["prefixItems"] = [_all_of(*(_item(side, place) for side in (left, right))) for place in range(longest)]
    elif "prefixItems" in both:
        side, other = (left, right) if "prefixItems" in left else (right, left)
        both["prefixItems"] = [_all_of(item, other.get("items", True)) for item in side["prefixItems"]]
    return None if both.get("type") == [] or both.get("enum") == [] else both


def overlap(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether one value may satisfy both; False only where that is certain."""
    both = merge_keywords(left, right, "")
    if both is None or both.get("enum") == []:
        return False
    for name in set(both.get("required", ())) if both.get("type") == ["object"] else ():
        parts = [property_schema(side, name) for side in (left, right)]
        one, other = (_values(part) for part in parts)
        if one is not None and other is not None and not {*map(_canonical, one)} & {*map(_canonical, other)}:
            return False
        if False in parts:
            return False
    return True


def _values(schema: Any) -> list[Any] | None:
    if not isinstance(schema, Mapping):
        return None
    return [schema["const"]] if "const" in schema else schema.get("enum")


def property_schema(side: Mapping[str, Any], name: str) -> Any:
    """What one side asks of a property."""
    if name in side.get("properties", {}):
        return side["properties"][name]
    matching = [schema for pattern, schema in side.get("patternProperties", {}).items() if re.search(pattern, name)]
    return {"allOf": matching} if matching else side.get("additionalProperties", True)


def has_type(value: Any, kinds: list[str] | None) -> bool:
    """Whether a value is of one of the types; None: of any."""
    if kinds is None or value is None or isinstance(value, bool):
        return kinds is None or ("null" if value is None else "boolean") in kinds
    if isinstance(value, int | float):
        return "number" in kinds or ("integer" in kinds and value == value // 1)
    return ("string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array") in kinds


def _item(side: Mapping[str, Any], place: int) -> Any:
    return side["prefixItems"][place] if place < len(side["prefixItems"]) else side.get("items", True)


def _all_of(one: Any, other: Any) -> Any:
    if one is True or one == other:
        return other
    if other is True:
        return one
    return False if one is False or other is False else {"allOf": [one, other]}


def _common_types(one: list[str], other: list[str]) -> list[str]:
    common = [kind for kind in one if kind in other]
    if ("integer" in one and "number" in other) or ("number" in one and "integer" in other):
        common.append("integer")
    return list(dict.fromkeys(common))


def _tighter(side: str, bounds: list[tuple[Decimal, bool]]) -> tuple[Decimal, bool]:
    if side == "minimum":
        return max(bounds, key=lambda bound: (bound[0], bound[1]))
    return min(bounds, key=lambda bound: (bound[0], not bound[1]))


def _canonical(value: Any) -> str:
    """One text for equal values; 1 and 1.0 are equal, 1 and true are not."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [plain(each) for each in part]
        return int(part) if isinstance(part, float) and part == int(part) else part

    return json.dumps(plain(value), sort_keys=True)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def implied_types(flat: Mapping[str, Any]) -> list[str]:
    """The types whose keywords a schema without `type` has; "any" if it has none."""
    return [kind for kind, names in OF_TYPE.items() if any(name in flat for name in names.split())] or ["any"]


def schema_list(value: Any, path: str) -> Sequence[Any]:
    """The schemas of a combining keyword. Raises RequestError: it is no list."""
    if not isinstance(value, list | tuple):
        raise RequestError(f"{path} is {value!r:.80}", hint="it must be a list of schemas")
    return value
