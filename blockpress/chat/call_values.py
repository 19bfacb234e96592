"""What a value in a tool call means: as JSON, or as the tool's schema says where JSON says something else.

    text        without a schema     {"type": "string"}     {"type": "integer"}
    12345       12345                "12345"                12345
    00501       "00501"              "00501"                501
    108.        108.0                "108."                 108
    True        True                 "True"                 True
    <|"|>7<|"|> "7"                  "7"                    7

Invariant: a value that the schema does not allow keeps the meaning that it has without one; nothing is left out.

Run: python -m pytest tests/chat/test_call_values.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

__all__ = ["BARE", "QUOTED", "Typing", "is_json", "read_bare"]

QUOTED, BARE = "q", "b"
"""What a string in the translated call begins with: whether the model wrote its text in quotes."""

# As Python and JavaScript write them, and JSON does not.
_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}
_LOOSE_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)\.|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_ANY_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

_TYPES: dict[type, frozenset[str]] = {
    bool: frozenset({"boolean"}),
    int: frozenset({"integer", "number"}),
    float: frozenset({"number"}),
    str: frozenset({"string"}),
    type(None): frozenset({"null"}),
    dict: frozenset({"object"}),
    list: frozenset({"array"}),
}


class _CallFault(Exception):
    """Why a text is no call."""


def _refuse(constant: str) -> Any:
    raise _CallFault(f"{constant} is no JSON value")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise _CallFault(f"{text} is too large for a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_WHOLE = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def is_json(text: str) -> bool:
    """Whether a word without quotes is a number or a word of JSON, as Python reads it."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def read_bare(text: str) -> tuple[Any, bool]:
    """What a word without quotes means, and whether JSON reads it so.

    _CallFault names NaN and the infinities, which JSON does not have.

    >>> read_bare("-1.5e3"), read_bare("108."), read_bare("New York")
    ((-1500.0, True), (108.0, False), ('New York', False))
    """
    if text in _WORDS:
        return _WORDS[text], False
    try:
        value, known = _DECODER.decode(text), True
    except ValueError:  # no JSON, or more digits than Python turns into a number
        value, known = (float(text), False) if _LOOSE_NUMBER.fullmatch(text) else (text, False)
    return (text, False) if isinstance(value, float) and math.isinf(value) else (value, known)


@final
class Typing:
    """Gives the values of a translated call their types, as the tool's `parameters`, a JSON schema, declare them."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.root = parameters
        self.mended = False
        """Whether a value was given a type that its text alone does not have."""

    def value(self, node: Any, schema: Any) -> Any:
        """`node`: objects and arrays of strings that begin with QUOTED or BARE. _CallFault: it has no value."""
        if isinstance(node, dict):
            return {key: self.value(entry, self._child(schema, key)) for key, entry in node.items()}
        if isinstance(node, list):
            return [self.value(entry, self._child(schema, place)) for place, entry in enumerate(node)]
        text, types = node[1:], self._types(schema)
        if node[0] == QUOTED:
            return text if not types or "string" in types else self._cast(text, types, text)
        if types == {"string"}:
            self.mended = True
            return text
        if not text and types and "string" not in types:
            if "null" not in types:
                raise _CallFault("a value is missing")
            return None
        value, known = read_bare(text)
        if not types or _TYPES[type(value)] & types:
            self.mended |= not known
            return value
        return self._cast(text, types, text if "string" in types else value)

    def _cast(self, text: str, types: frozenset[str], otherwise: Any) -> Any:
        """The value of one of the types that this text writes."""
        self.mended = True
        word = text.strip()
        if types & {"integer", "number"} and _ANY_NUMBER.fullmatch(word):
            number = _number(word, types)
            if number is not None:
                return number
        if "boolean" in types and word.lower() in ("true", "1", "false", "0"):
            return word.lower() in ("true", "1")
        if "null" in types and word in ("null", "None"):
            return None
        if types & {"object", "array"}:
            try:
                whole = _WHOLE.decode(word)
            except (ValueError, _CallFault, RecursionError):
                return otherwise
            if isinstance(whole, dict | list) and _TYPES[type(whole)] & types:
                return whole
        return otherwise

    def _types(self, schema: Any) -> frozenset[str]:
        """The JSON types that a schema allows; none: it does not say."""
        found: set[str] = set()
        for leaf in self._leaves(schema, set()):
            said = leaf.get("type")
            names = [said] if isinstance(said, str) else said if isinstance(said, list) else []
            values = leaf["enum"] if isinstance(leaf.get("enum"), list) else [leaf["const"]] if "const" in leaf else []
            if not names and not values:
                return frozenset()
            found |= {str(name).lower() for name in names} or {sorted(_TYPES[type(value)])[0] for value in values}
            found |= {"null"} if leaf.get("nullable") is True else set()
        return frozenset(found)

    def _child(self, schema: Any, place: str | int) -> Any:
        """The schema of an object's entry or an array's element; {}: it does not say."""
        for leaf in self._leaves(schema, set()):
            if isinstance(place, str):
                listed, others = leaf.get("properties"), leaf.get("additionalProperties")
                if isinstance(listed, Mapping) and place in listed:
                    return listed[place]
            else:
                listed, others = leaf.get("prefixItems"), leaf.get("items")
                if isinstance(listed, Sequence) and place < len(listed):
                    return listed[place]
            if isinstance(others, Mapping):
                return others
        return {}

    def _leaves(self, schema: Any, seen: set[str]) -> Iterator[Mapping[str, Any]]:
        """The schemas that one stands for: what it refers to, and its alternatives."""
        if not isinstance(schema, Mapping):
            return
        where = schema.get("$ref")
        if isinstance(where, str):
            if where not in seen:
                seen.add(where)
                yield from self._leaves(self._referred(where), seen)
            return
        parts = [p for name in ("anyOf", "oneOf", "allOf") for p in _listed(schema.get(name))]
        if parts and "type" not in schema:
            for part in parts:
                yield from self._leaves(part, seen)
        else:
            yield schema

    def _referred(self, where: str) -> Any:
        found: Any = self.root
        for step in where.removeprefix("#").strip("/").split("/"):
            found = found.get(step) if isinstance(found, Mapping) else None
        return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(word: str, types: frozenset[str]) -> int | float | None:
    """The number of one of the types, or None."""
    try:
        if word.lstrip("+-").isdigit():
            return int(word)
        value = float(word)
    except ValueError:  # more digits than Python turns into a number
        return None
    if "number" in types and math.isfinite(value):
        return value
    return int(value) if value.is_integer() else None
