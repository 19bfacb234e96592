"""A JSON schema's own keywords in one form, and two sets of them that a value must satisfy both as one.

    type        a list                      enum       also of const           pattern, format, multipleOf   tuples
    minimum     (number, excluded)          maximum    likewise                prefixItems  also of a list in items
    contains    (schema, least, most)s      not_values, not_pattern            what `not` makes of enum and pattern
    fractional  a number is not whole       declares   `properties` are the schema's own, so that others are not meant

Invariant: a value satisfies the merged keywords exactly if it satisfies both; None means that no value can.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from blockpress.constrain.automaton import MAX_STATES
from blockpress.constrain.ecma import pattern_is_found
from blockpress.constrain.references import below
from blockpress.errors import RequestError

OF_TYPE = {
    "object": "properties required additionalProperties patternProperties propertyNames minProperties maxProperties",
    "array": "items prefixItems additionalItems minItems maxItems uniqueItems contains",
    "string": "minLength maxLength pattern format not_pattern",
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf fractional",
}
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_TUPLES = ("pattern", "not_pattern", "format", "multipleOf", "contains", "not_values")
PLAIN = frozenset(" ".join(OF_TYPE.values()).split()) - {"not_pattern", "fractional"} | {
    *("type", "enum", "const", "minContains", "maxContains")
}
"""Keywords about a value itself."""
Flat = dict[str, Any]


class Synthetic(dict[str, Any]):
    """A schema made of others. name: what it is made of, alike for those that are."""

    def __init__(self, name: Hashable, keywords: Mapping[str, Any]) -> None:
        super().__init__(keywords)
        self.name = name


def schema_name(schema: Any) -> Hashable:
    """What tells a schema from others: where it lies in memory, or what it is made of."""
    return schema if isinstance(schema, bool) else schema.name if isinstance(schema, Synthetic) else id(schema)


def not_schema(schema: Any) -> Any:
    """What does not satisfy a schema, as a schema."""
    return not schema if isinstance(schema, bool) else Synthetic(("not", schema_name(schema)), {"not": schema})


def normalize_keywords(schema: Mapping[str, Any], path: str, draft: int = 0) -> Flat | None:
    """The keywords of a schema without combining ones, checked; None if no value satisfies them.

    Raises:
        RequestError: a keyword's value is not what it must be.
    """
    flat = {name: value for name, value in schema.items() if name in PLAIN}

    def need(name: str, ok: bool, what: str) -> None:
        if not ok:
            raise RequestError(f"schema {below(path, name)} is {schema[name]!r:.80}", hint=f"it must be {what}")

    if "type" in flat:
        given = flat["type"]
        kinds = [given] if isinstance(given, str) else given
        need("type", isinstance(kinds, list | tuple) and all(k in TYPES for k in kinds), f"of {', '.join(TYPES)}")
        flat["type"] = [kind for kind in dict.fromkeys(kinds) if not (kind == "integer" and "number" in kinds)]
    for name in ("properties", "patternProperties"):
        if name in flat:
            mapped = isinstance(flat[name], Mapping) and all(isinstance(key, str) for key in flat[name])
            need(name, mapped, "a mapping of schemas")
    if flat.get("properties"):
        flat["declares"] = True
    _fold_patterns(flat, path)
    for name in ("enum", "required", "prefixItems"):
        if name in flat:
            need(name, isinstance(flat[name], list | tuple), "a list")
    if "required" in flat:
        need("required", all(isinstance(each, str) for each in flat["required"]), "a list of names")
        flat["required"] = list(dict.fromkeys(flat["required"]))
    for name in (*COUNTS, "minContains", "maxContains"):
        if name in flat:
            need(name, _is_number(flat[name]) and flat[name] == int(flat[name]) >= 0, "a whole number of at least 0")
            flat[name] = int(flat[name])
    for name in ("pattern", "format"):
        if name in flat:
            need(name, isinstance(flat[name], str), "a text")
            flat[name] = (flat[name],)
    if "multipleOf" in flat:
        need("multipleOf", _is_number(flat["multipleOf"]) and flat["multipleOf"] > 0, "a number above 0")
        flat["multipleOf"] = (Fraction(repr(flat["multipleOf"])),)
    _normalize_items(flat, draft)
    _normalize_bounds(flat, need)
    if "const" in flat:
        return merge_keywords(flat, {"enum": [flat.pop("const")]})
    return None if flat.get("type") == [] or flat.get("enum") == [] else flat


def _normalize_bounds(flat: Flat, need: Callable[[str, bool, str], None]) -> None:
    for side in ("minimum", "maximum"):
        exclusive = f"exclusive{side.capitalize()}"
        bounds = []
        sides: tuple[tuple[str, bool], ...] = ((side, False), (exclusive, True))
        if isinstance(flat.get(exclusive), bool):  # as in draft 4
            sides = ((side, bool(flat.pop(exclusive))),)
        for name, excluded in sides:
            if name in flat:
                need(name, _is_number(flat[name]), "a number")
                bounds.append((Decimal(repr(flat.pop(name))), excluded))
        if bounds:
            flat[side] = _tighter(side, bounds)


def _normalize_items(flat: Flat, draft: int) -> None:
    if isinstance(flat.get("items"), list | tuple):
        flat["prefixItems"] = flat.pop("items")
        if "additionalItems" in flat:
            flat["items"] = flat["additionalItems"]
    flat.pop("additionalItems", None)
    least, most = flat.pop("minContains", 1), flat.pop("maxContains", None)
    if "contains" in flat:
        least = max(least, int(0 < draft < 2019))  # which know no minContains
        flat["contains"] = ((flat["contains"], least, most),)


def _fold_patterns(flat: Flat, path: str) -> None:
    """Asks of declared properties also what patterns that match their names do."""
    for pattern in flat.get("patternProperties", ()):
        try:
            pattern_is_found(pattern, "")
        except RequestError as error:
            place = below(path, "patternProperties", pattern)
            raise RequestError(f"schema {place}: {error.message}", hint=error.hint) from None
    if "patternProperties" in flat and "properties" in flat:
        flat["properties"] = {
            name: all_of(schema, property_schema({**flat, "properties": {}, "additionalProperties": True}, name))
            for name, schema in flat["properties"].items()
        }


def merge_keywords(left: Flat, right: Flat) -> Flat | None:
    """Keywords that hold where those of both sides do, all as `normalize_keywords` gives them; None: nowhere."""
    both = {**right, **left}
    for name in left.keys() & right.keys():
        one, other = left[name], right[name]
        if name == "type":
            both[name] = _common_types(one, other)
        elif name == "enum":
            both[name] = _common_values(one, other)
        elif name in ("minimum", "maximum"):
            both[name] = _tighter(name, [one, other])
        elif name in COUNTS:
            both[name] = max(one, other) if name.startswith("min") else min(one, other)
        elif name in _TUPLES:
            both[name] = (*one, *(each for each in other if each not in one))
        elif name == "required":
            both[name] = list(dict.fromkeys([*one, *other]))
        elif name in ("uniqueItems", "declares"):
            both[name] = one or other
        elif name in ("items", "additionalProperties", "propertyNames"):
            both[name] = all_of(one, other)
    if "properties" in both:
        names = dict.fromkeys([*left.get("properties", {}), *right.get("properties", {})])
        both["properties"] = {name: all_of(*(property_schema(side, name) for side in (left, right))) for name in names}
    if "patternProperties" in both:
        patterns = dict.fromkeys([*left.get("patternProperties", {}), *right.get("patternProperties", {})])
        both["patternProperties"] = {
            pattern: all_of(
                *(
                    side.get("patternProperties", {}).get(pattern, side.get("additionalProperties", True))
                    for side in (left, right)
                )
            )
            for pattern in patterns
        }
    if "prefixItems" in left and "prefixItems" in right:
        longest = max(len(left["prefixItems"]), len(right["prefixItems"]))
        both["prefixItems"] = [all_of(*(_item(side, place) for side in (left, right))) for place in range(longest)]
    elif "prefixItems" in both:
        side, other = (left, right) if "prefixItems" in left else (right, left)
        both["prefixItems"] = [all_of(item, other.get("items", True)) for item in side["prefixItems"]]
    return None if _is_empty(both) else both


def _is_empty(flat: Flat) -> bool:
    """Whether no value satisfies these keywords, as far as a glance tells."""
    kinds = flat.get("type")
    if flat.get("enum") == [] or (flat.get("fractional") and kinds == ["integer"]):
        return True
    if kinds is None or kinds == ["object"]:
        missing = any(property_schema(flat, name) is False for name in flat.get("required", ()))
        return missing and (kinds is not None or implied_types(flat) == ["object"])
    return kinds == []


def overlap(left: Flat, right: Flat) -> bool:
    """Whether one value may satisfy both; False only where that is certain."""
    for name in {*left.get("required", ()), *right.get("required", ())}:
        if left.get("type") == ["object"] or right.get("type") == ["object"]:
            both = all_of(property_schema(left, name), property_schema(right, name))
            if both is False or (isinstance(both, Mapping) and both.get("enum") == []):
                return False
    if all(side.get("type") and "enum" not in side for side in (left, right)):
        return bool(_common_types(left["type"], right["type"])) and merge_keywords(left, right) is not None
    return merge_keywords(left, right) is not None


def property_schema(side: Flat, name: str) -> Any:
    """What one side asks of a property."""
    if name in side.get("properties", {}):
        return side["properties"][name]
    found = {pattern: pattern_is_found(pattern, name) for pattern in side.get("patternProperties", {})}
    schema: Any = True
    for pattern, there in found.items():
        if there is not False:
            schema = all_of(schema, side["patternProperties"][pattern])
    return schema if True in found.values() else all_of(schema, side.get("additionalProperties", True))


def has_type(value: Any, kinds: Sequence[str] | None) -> bool:
    """Whether a value is of one of the types; None: of any."""
    if kinds is None or value is None or isinstance(value, bool):
        return kinds is None or ("null" if value is None else "boolean") in kinds
    if isinstance(value, int | float):
        return "number" in kinds or ("integer" in kinds and value == value // 1)
    return ("string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array") in kinds


def _item(side: Flat, place: int) -> Any:
    return side["prefixItems"][place] if place < len(side["prefixItems"]) else side.get("items", True)


def all_of(one: Any, other: Any) -> Any:
    """One schema for two; False where listed values tell that nothing satisfies both."""
    if one is True or schema_name(one) == schema_name(other):
        return other
    if other is True:
        return one
    if one is False or other is False or not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return False if False in (one, other) else Synthetic(("all", id(one), id(other)), {"allOf": [one, other]})
    for side, rival in ((one, other), (other, one)):
        values, against, never = _values(side), _values(rival), rival.get("not")
        if values is not None and against is not None and not _common_values(values, against):
            return False
        listed = isinstance(never, Mapping) and never.keys() in ({"const"}, {"enum"})
        if values is not None and listed and len(_common_values(values, _values(never) or [])) == len(values):
            return False
    return Synthetic(("all", schema_name(one), schema_name(other)), {"allOf": [one, other]})


def _values(schema: Any) -> list[Any] | None:
    """The values that a schema lists, if it does no more."""
    if not isinstance(schema, Mapping) or (isinstance(schema, Synthetic) and "enum" not in schema):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


def _common_types(one: list[str], other: list[str]) -> list[str]:
    common = [kind for kind in one if kind in other]
    if ("integer" in one and "number" in other) or ("number" in one and "integer" in other):
        common.append("integer")
    return list(dict.fromkeys(common))


def _common_values(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    known = {*map(canonical, other)}
    return [value for value in one if canonical(value) in known]


def _tighter(side: str, bounds: list[tuple[Decimal, bool]]) -> tuple[Decimal, bool]:
    if side == "minimum":
        return max(bounds, key=lambda bound: (bound[0], bound[1]))
    return min(bounds, key=lambda bound: (bound[0], not bound[1]))


def canonical(value: Any) -> str:
    """One text for equal values; 1 and 1.0 are equal, 1 and true are not."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [plain(each) for each in part]
        return int(part) if isinstance(part, float) and math.isfinite(part) and part == int(part) else part

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
        raise RequestError(f"schema {path} is {value!r:.80}", hint="it must be a list of schemas")
    return value


def bounds(flat: Mapping[str, Any], what: str, place: str) -> tuple[int, int | None]:
    """The limits `minWHAT` and `maxWHAT`. Raises RequestError: the lower one is out of reach."""
    if flat.get(f"min{what}", 0) > MAX_STATES:
        raise refused(below(place, f"min{what}"), flat[f"min{what}"], f"above {MAX_STATES}")
    return flat.get(f"min{what}", 0), flat.get(f"max{what}")


def refused(place: str, value: Any, why: str) -> RequestError:
    """The error for a keyword that cannot be enforced."""
    hint = "leave it out and check the answer yourself"
    return RequestError(f"schema {place} is {value!r:.80}, which cannot be enforced {why}", hint=hint)


def dependencies(schema: Mapping[str, Any], place: str) -> Iterable[tuple[str, Any, str]]:
    """(property, what its presence asks for, where) of all kinds of dependencies."""
    for name in ("dependencies", "dependentRequired", "dependentSchemas"):
        given = schema.get(name, {})
        if not isinstance(given, Mapping):
            raise RequestError(f"schema {below(place, name)} is {given!r:.80}", hint="it must be a mapping")
        for key, needed in given.items():
            where = below(place, name, key)
            listed = [needed] if isinstance(needed, str) else needed
            if isinstance(listed, list | tuple) and name != "dependentSchemas":
                yield key, Synthetic(("required", *map(str, listed)), {"required": list(listed)}), where
            else:
                yield key, needed, where


def combined_lists(schema: Mapping[str, Any], place: str) -> Iterable[tuple[str, list[tuple[str, Any]]]]:
    """The schemas of each combining keyword, with their places."""
    for name in ("allOf", "anyOf", "oneOf"):
        if name in schema:
            where = below(place, name)
            yield name, [(below(where, i), part) for i, part in enumerate(schema_list(schema[name], where))]
