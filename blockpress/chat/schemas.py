"""The JSON schemas of tools as chat templates can show them: every part with its type, nothing to look up elsewhere.

    {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]}      as tools declare it: no template follows it
    {"type": "string", "enum": ["C", "F"], "nullable": true}     as it is rendered

Why: a template writes the type of a property, its description, its strings to choose from, its items and its own
properties. Lists of types, references, alternatives and constants reach the prompt as an empty type or not at all.

Invariant: the result has no `$ref`, `allOf`, `const` or list of types, and means the same as far as templates show it.
What they can show as it stands is left as it is.

Source: JSON Schema 2020-12 (core and validation); `nullable` is OpenAPI 3.0's.
Run: python -m pytest tests/chat/test_schemas.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import reduce
from typing import Any, final
from urllib.parse import unquote

from blockpress.chat.tool_calls import MAX_DEPTH
from blockpress.errors import RequestError

__all__ = ["plain_schema", "plain_tools"]

MOST_PARTS = 10_000
"""Most schemas in one tool's, each reference counted with all that it refers to."""

ANY = "any"
"""The type of what may be anything. Templates write it; JSON Schema has no word for it."""

_HIDDEN = {"$ref", "$defs", "definitions", "allOf", "anyOf", "oneOf", "const", "prefixItems"}
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "enum")
_KINDS = {"properties": Mapping, "description": str, **dict.fromkeys(_LISTS, list)}
_WORDS = {Mapping: "an object", list: "a list", str: "text"}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
_HINTS = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties"},
    "array": {"items", "minItems", "maxItems", "uniqueItems", "contains"},
    "string": {"pattern", "format", "minLength", "maxLength", "contentEncoding", "contentMediaType"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}

Schema = dict[str, Any]


def plain_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools, as `check_tools` gives them, with rewritten schemas. Raises RequestError as `plain_schema`."""
    plain = []
    for number, tool in enumerate(tools or ()):
        function = dict(tool["function"])
        if "parameters" in function:
            function["parameters"] = plain_schema(function["parameters"], f"tools[{number}].function.parameters")
        plain.append({**tool, "function": function})
    return plain or None


def plain_schema(parameters: Mapping[str, Any], at: str) -> Schema:
    """`parameters` of a tool, checked and rewritten; `at`: their field's name, for errors.

    A schema inside of itself is shown once; where it comes again, only its type and description are.

    Raises RequestError: a part is no schema, a reference leads nowhere or to another document, or with all references
    followed the schema is nested deeper than 64 or has more than 10,000 parts.

    >>> plain_schema({"properties": {"n": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}, "parameters")
    {'properties': {'n': {'type': 'integer', 'nullable': True}}, 'type': 'object'}
    """
    return _explained(_Reader(parameters, at).read(parameters, at, ()))


@final
class _Reader:
    """One tool's schema. `refs`: the references that have been followed to where a part is."""

    def __init__(self, root: Mapping[str, Any], at: str) -> None:
        self._root, self._at, self._left = root, at, MOST_PARTS

    def read(self, schema: Any, at: str, refs: tuple[str, ...], depth: int = 1) -> Schema:
        if schema is True:
            return {"type": ANY}
        if not isinstance(schema, Mapping):
            raise _wrong(at, schema, 'a JSON schema, such as {"type": "string"}')
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise RequestError(
                f"{self._at} has more than {MOST_PARTS} parts, or is nested deeper than {MAX_DEPTH}",
                hint="use fewer references inside each other; each counts with all that it refers to",
            )
        _check(schema, at)
        own = {k: v for k, v in schema.items() if k not in _HIDDEN and (v is not None or k == "default")}
        if isinstance(own.get("required"), bool):  # what a property said of itself up to draft 3
            del own["required"]
        if "const" in schema:
            own["enum"] = [schema["const"]]
        self._read_children(own, schema, at, refs, depth)
        found = [own]
        if schema.get("$ref") is not None:
            found.append(self._referred(schema["$ref"], at, refs, depth))
        for word in ("allOf", "anyOf", "oneOf"):
            parts = [
                self.read(part, f"{at}.{word}[{n}]", refs, depth + 1) for n, part in enumerate(schema.get(word) or ())
            ]
            found += parts if word == "allOf" else [_any_of(parts)] if parts else []
        return _typed(reduce(_all_of, found))

    def _read_children(
        self, own: Schema, schema: Mapping[str, Any], at: str, refs: tuple[str, ...], depth: int
    ) -> None:
        """Replace the schemas inside of this one by rewritten ones."""
        if isinstance(schema.get("properties"), Mapping):
            own["properties"] = {
                name: _shown(self.read(part, f"{at}.properties.{name}", refs, depth + 1))
                for name, part in schema["properties"].items()
                if part is not False
            }
        if isinstance(schema.get("additionalProperties"), Mapping):
            others = self.read(schema["additionalProperties"], f"{at}.additionalProperties", refs, depth + 1)
            own["additionalProperties"] = {} if others == {"type": ANY} else others
        items: Any = schema.get("items")
        places: list[Any] = schema.get("prefixItems") or []
        if isinstance(items, list):  # a tuple, as up to draft 7
            items, places = schema.get("additionalItems"), [*places, *items]
        parts = [self.read(part, f"{at}.prefixItems[{n}]", refs, depth + 1) for n, part in enumerate(places)]
        if items not in (None, False):
            parts.append(self.read(items, f"{at}.items", refs, depth + 1))
        own.pop("items", None)
        if parts:
            whole = _any_of(parts)
            own["items"] = {} if whole == {"type": ANY} else whole

    def _referred(self, ref: Any, at: str, refs: tuple[str, ...], depth: int) -> Schema:
        found: Any = self._root if isinstance(ref, str) and re.match(r"#(/|\Z)", ref) else None
        for step in unquote(ref).split("/")[1:] if found is not None else ():
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                found = found.get(name) if isinstance(found, Mapping) else None
        if found is None:
            raise _wrong(f"{at}.$ref", ref, 'a place in the same schema, such as "#/$defs/Unit"')
        if ref not in refs:
            return self.read(found, at, (*refs, ref), depth + 1)
        again = _typed({key: found[key] for key in ("type", "description", "properties", "items") if key in found})
        return {key: again[key] for key in ("type", "description", "nullable") if key in again}


def _check(schema: Mapping[str, Any], at: str) -> None:
    """Raises RequestError: a keyword that is read here has a value of the wrong kind."""
    kind = schema.get("type")
    names = [kind] if isinstance(kind, str) else kind
    if kind is not None and not (isinstance(names, list) and names and all(isinstance(n, str) and n for n in names)):
        raise _wrong(f"{at}.type", kind, "the name of a type, or a list of names")
    for word, wanted in _KINDS.items():
        value = schema.get(word)
        if value is not None and not isinstance(value, wanted):
            raise _wrong(f"{at}.{word}", value, _WORDS[wanted])
    required = schema.get("required")
    is_names = isinstance(required, list) and all(isinstance(name, str) for name in required)
    if required is not None and not is_names and not isinstance(required, bool):
        raise _wrong(f"{at}.required", required, "a list of names")


def _all_of(schema: Schema, other: Schema) -> Schema:
    """What both ask for; where templates have room for one only, the first one's."""
    merged = {**other, **schema}
    shared = {word for word in ("properties", "items", "required", "enum") if word in schema and word in other}
    if "properties" in shared:
        merged["properties"] = _all_properties(schema["properties"], other["properties"])
    if "items" in shared:
        merged["items"] = _all_of(schema["items"], other["items"])
    if "required" in shared:
        merged["required"] = _together(schema["required"], other["required"])
    if "enum" in shared:
        merged["enum"] = [value for value in schema["enum"] if value in other["enum"]] or schema["enum"]
    if other.get("nullable") is True:
        merged["nullable"] = True
    if schema.get("type") == ANY:
        merged["type"] = other.get("type", ANY)
    return merged


def _all_properties(one: Schema, other: Schema) -> Schema:
    both = {name: _all_of(one[name], other[name]) for name in one if name in other}
    return {**other, **one, **both}


def _together(one: list[Any], other: list[Any]) -> list[Any]:
    return [*one, *(value for value in other if value not in one)]


def _any_of(parts: list[Schema]) -> Schema:
    """One schema for rewritten alternatives: details where all are of one type, otherwise the types."""
    if len(parts) == 1:
        return parts[0]
    rest = [part for part in parts if part["type"] != "null"]
    nullable = {"nullable": True} if len(rest) < len(parts) or any(part.get("nullable") for part in rest) else {}
    if not rest:
        return {"type": "null"}
    types = _joined([name for part in rest for name in part["type"].lower().split("|")])
    if len(rest) == 1:
        return {**rest[0], **nullable}
    if types.count("|") or types == ANY:
        return {"type": types, **nullable} | ({} if types == ANY else {"anyOf": rest})
    merged = rest[0]
    for part in rest[1:]:
        merged = _either(merged, part)
    return {**merged, "type": types, **nullable}


def _either(one: Schema, other: Schema) -> Schema:
    """What one or the other of two schemas of one type asks for."""
    merged = {key: value for key, value in one.items() if key in other and other[key] == value}
    if "enum" in one and "enum" in other:
        merged["enum"] = _together(one["enum"], other["enum"])
    if "properties" in one or "properties" in other:
        mine, theirs = one.get("properties", {}), other.get("properties", {})
        both = {name: _any_of([mine[name], theirs[name]]) for name in mine if name in theirs}
        merged["properties"] = {**mine, **theirs, **both}
        merged["required"] = [name for name in one.get("required") or () if name in (other.get("required") or ())]
    if "description" in one and "description" in other:
        merged["description"] = "; ".join(dict.fromkeys([str(one["description"]), str(other["description"])]))
    if one.get("items") and other.get("items"):
        merged["items"] = _any_of([one["items"], other["items"]])
    return merged


def _typed(schema: Schema) -> Schema:
    """With a type that is one text, and `nullable` beside it."""
    said, values = schema.get("type", ANY), schema.get("enum")
    names = said if isinstance(said, list) else [said]
    if said == ANY:
        hinted = [kind for kind, hints in _HINTS.items() if hints & schema.keys()][:1] or [ANY]
        names = ["null" if v is None else _TYPES[type(v)] for v in values] if values else hinted
    others = [name for name in names if name != "null"]
    typed = {**schema, "type": _joined(others) if others else "null"}
    if others and len(others) < len(names):
        typed["nullable"] = True
    if typed.get("nullable") and values and others:
        typed["enum"] = [value for value in values if value is not None]
    return typed


def _joined(names: list[str]) -> str:
    """The types as one text, each once."""
    kept = list(dict.fromkeys(names))
    if "number" in kept and "integer" in kept:
        kept.remove("integer")
    return ANY if ANY in kept else "|".join(kept)


def _shown(schema: Schema) -> Schema:
    """A property. Of an object without properties, templates would take the keywords for its properties."""
    known = {"type", "description", "nullable", "required", "additionalProperties"}
    if str(schema["type"]).lower() != "object" or "properties" in schema:
        return schema
    if isinstance(schema.get("additionalProperties"), Mapping) and schema["additionalProperties"]:
        return {key: value for key, value in schema.items() if key in known}
    return {**schema, "properties": {}}


def _explained(schema: Schema) -> Schema:
    """Alternatives of several types are told in the property's description: templates have no other place for them."""
    explained = dict(schema)
    if "properties" in schema:
        explained["properties"] = {name: _told(part, _explained(part)) for name, part in schema["properties"].items()}
    if isinstance(schema.get("items"), Mapping):
        explained["items"] = _explained(schema["items"])
    return explained


def _told(part: Schema, explained: Schema) -> Schema:
    if not any(one.keys() - {"type", "title", "description", "nullable"} for one in part.get("anyOf", ())):
        return explained
    choice = "One of: " + "; ".join(json.dumps(one, ensure_ascii=False) for one in part["anyOf"])
    return {**explained, "description": f"{part['description']} {choice}" if part.get("description") else choice}


def _wrong(field: str, value: Any, what: str) -> RequestError:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else repr(value)
    return RequestError(f"{field} is {text:.60}", hint=f"it must be {what}")
