"""Schemas that combine others as alternatives that do not.

    {"properties": A, "anyOf": [B, {"$ref": C}], "not": D}  -->  A and B and not D, A and C and not D: each a flat one

What does not satisfy a schema is itself a list of alternatives, one for each keyword that may be what fails.

Invariant: each value of an alternative satisfies the schema. Not every value that does has one: of `MAX_ALTERNATIVES`
combinations the first count, and nothing is known to fail a format.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blockpress.constrain.failing import failing_keywords, is_shallow, loss, with_others
from blockpress.constrain.merge import (
    PLAIN,
    Flat,
    Synthetic,
    combined_lists,
    dependencies,
    implied_types,
    merge_keywords,
    normalize_keywords,
    overlap,
    property_schema,
    schema_name,
)
from blockpress.constrain.references import Document, below
from blockpress.constrain.values import Values
from blockpress.errors import RequestError

KEYWORDS = PLAIN | {
    *("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
}
"""Keywords that are enforced; any other name is an annotation, as JSON Schema has it."""
SINCE = {"const": 6, "contains": 6, "propertyNames": 6, "if": 7, "prefixItems": 2020}
"""Drafts that first know a keyword: one that does not ignores it."""
MAX_ALTERNATIVES = 128
MAX_MERGED = 60_000
"""Pairs of alternatives that are tried together in one document, from which on of each side the first four count."""
MAX_OF_AN_OPTION = 8
"""Most alternatives that are tried to keep one option of a `oneOf` apart from the others."""


@dataclass(frozen=True)
class Seen:
    """What the keywords of an alternative say about: for `unevaluatedProperties` and `unevaluatedItems`."""

    properties: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    all_properties: bool = False
    items: int = 0
    all_items: bool = False

    def __or__(self, other: Seen) -> Seen:
        return Seen(
            self.properties | other.properties,
            self.patterns | other.patterns,
            self.all_properties or other.all_properties,
            max(self.items, other.items),
            self.all_items or other.all_items,
        )


@dataclass(frozen=True)
class Alternative:
    """Keywords in the form of `normalize_keywords`, and how many more recursive references may be followed in them."""

    flat: Flat
    depth: int
    seen: Seen = field(default=Seen())


class Alternatives:
    """The alternatives of the schemas of one document. cut: a reference was not followed, for depth."""

    def __init__(self, document: Document, values: Values) -> None:
        self._document, self._values = document, values
        self._known: dict[Hashable, tuple[Any, list[Alternative]]] = {}
        self._merged, self.cut = 0, False

    def of(self, schema: Any, place: str, depth: int) -> list[Alternative]:
        """The alternatives of a schema.

        Raises:
            RequestError: it is malformed, or has a reference that leads nowhere.
        """
        return self._once("yes", schema, place, depth, self._of)

    def failing(self, schema: Any, place: str, depth: int) -> list[Alternative]:
        """Alternatives of what does not satisfy a schema. Raises as `of`."""
        return self._once("no", schema, place, depth, self._failing)

    def _once(
        self, kind: str, schema: Any, place: str, depth: int, find: Callable[[Any, str, int], list[Alternative]]
    ) -> list[Alternative]:
        if isinstance(schema, bool):
            return [Alternative({}, depth)] if schema == (kind != "no") else []
        if not isinstance(schema, Mapping):
            raise RequestError(f"schema {place} is {schema!r:.80}", hint="a schema is a mapping, true or false")
        key = (kind, schema_name(schema), depth)
        if key not in self._known:
            self._known[key] = schema, []  # for a schema in itself
            self._known[key] = schema, find(schema, self._document.place(schema, place), depth)
        return self._known[key][1]

    def _of(self, schema: Mapping[str, Any], place: str, depth: int) -> list[Alternative]:
        own = normalize_keywords(schema, place, self._document.draft)
        if own is None:
            return []
        if "enum" in own:
            values = [value for value in own["enum"] if self._values.allows(value, schema, place)]
            return [Alternative({"enum": values}, depth)] if values else []
        seen = Seen(
            frozenset(own.get("properties", ())),
            frozenset(own.get("patternProperties", ())),
            "additionalProperties" in own,
            len(own.get("prefixItems", ())),
            "items" in own,
        )
        result = [Alternative(own, depth, seen)]
        for part in self._parts(schema, place, depth):
            result = self._both(result, part)
        return self._unevaluated(result, schema, place)

    def _parts(self, schema: Mapping[str, Any], place: str, depth: int) -> Iterable[list[Alternative]]:
        """For each combining keyword its alternatives; a value must satisfy one of each."""
        for name in ("$ref", "$dynamicRef", "$recursiveRef"):
            if name in schema:
                yield self._follow(schema, name, place, depth, self.of)
        for name, options in combined_lists(schema, place):
            if name == "allOf":
                yield from (self.of(part, where, depth) for where, part in options)
            elif name == "anyOf":
                yield self._any_of(options, depth)
            else:
                yield self._one_of(options, below(place, name), depth)
        if "not" in schema:
            yield self.failing(schema["not"], below(place, "not"), depth)
        if "if" in schema and ("then" in schema or "else" in schema):
            condition, when = schema["if"], below(place, "if")
            then, otherwise = (self.of(schema.get(name, True), below(place, name), depth) for name in ("then", "else"))
            yield self._both(self.of(condition, when, depth), then) + self._both(
                self.failing(condition, when, depth), otherwise
            )
        for name, needed, where in dependencies(schema, place):
            there = Alternative({"required": [name]}, depth)
            yield [
                Alternative({"properties": {name: False}}, depth),
                *self._both([there], self.of(needed, where, depth)),
            ]

    def _follow(
        self,
        schema: Mapping[str, Any],
        name: str,
        place: str,
        depth: int,
        find: Callable[[Any, str, int], list[Alternative]],
    ) -> list[Alternative]:
        target = self._document.follow(schema, name, place)
        if isinstance(target, Mapping) and self._document.recursive(target):
            if depth == 0:
                self.cut = True
                found = find(target, place, 0) if find == self.failing else []
                return [each for each in found if is_shallow(each.flat)]
            depth -= 1
        return find(target, self._document.place(target, below(place, name)), depth)

    def _any_of(self, options: Sequence[tuple[str, Any]], depth: int) -> list[Alternative]:
        """Alternatives of all options. Those that only ask for properties are told apart by the first one there is:
        an automaton would have to remember all of them."""
        asks = ({"required"}, {"required", "type"})
        if not all(isinstance(part, Mapping) and part.keys() in asks for _, part in options):
            return [each for where, part in options for each in self.of(part, where, depth)]
        result: list[Alternative] = []
        earlier = [Alternative({}, depth)]
        for where, part in options:
            result += self._both(self.of(part, where, depth), earlier)
            earlier = self._both(earlier, self.failing(part, where, depth))
        return result

    def _both(self, left: Sequence[Alternative], right: Sequence[Alternative]) -> list[Alternative]:
        """One alternative of each side together, but for pairs that no value satisfies. A long list stays whole."""
        self._merged += len(left) * len(right)
        if self._merged > MAX_MERGED:
            left, right = left[:4], right[:4]
        result = [
            Alternative(flat, min(one.depth, other.depth), one.seen | other.seen)
            for one in left
            for other in right
            if (flat := merge_keywords(one.flat, other.flat)) is not None
        ]
        return result[: max(MAX_ALTERNATIVES, len(left), len(right))]

    def _one_of(self, options: Sequence[tuple[str, Any]], place: str, depth: int) -> list[Alternative]:
        """Alternatives that satisfy one option each, and certainly no other."""
        alternatives = [self.of(part, where, depth) for where, part in options]
        covers = [self._once("cover", part, where, 0, self._cover) for where, part in options]
        result = []
        for number, option in enumerate(alternatives):
            for other, (where, part) in enumerate(options):
                if other != number:
                    option = self._apart(option, part, [each.flat for each in covers[other]], where)
            result += option
        if not result and any(alternatives):
            about = f"schema {place} has options that overlap, and no value is certain to satisfy one alone"
            raise RequestError(
                about, hint="use anyOf, or give each option a constant of its own in a required property"
            )
        return result

    def _apart(self, option: list[Alternative], part: Any, cover: list[Flat], where: str) -> list[Alternative]:
        """What of an option fails another, whose values all satisfy one of `cover`: all of it where that can be."""
        result: list[Alternative] = []
        for one in option:
            if not any(self._meet(one.flat, other, where) for other in cover):
                result.append(one)
                continue
            others = [Alternative(flat, one.depth) for flat in with_others(one.flat, cover)]
            found = self._both([one], [*self.failing(part, where, one.depth), *others])
            found = sorted(
                (each for each in found if not self._is_vain(each, where)), key=lambda x: loss(one.flat, x.flat)
            )
            result += found[:1] if found and not loss(one.flat, found[0].flat) else found[:MAX_OF_AN_OPTION]
        return result[: max(MAX_OF_AN_OPTION, len(option))]

    def _meet(self, left: Flat, right: Flat, where: str, nested: int = 2) -> bool:
        """Whether one value may satisfy both; False only where that is certain."""
        for side, rival in ((left, right), (right, left)):
            if "enum" in side:
                return any(self._values.fits(value, rival, where) is not False for value in side["enum"])
        if not overlap(left, right):
            return False
        if not nested or not any(side.get("type", implied_types(side)) == ["object"] for side in (left, right)):
            return True
        for name in {*left.get("required", ()), *right.get("required", ())}:
            both = [property_schema(side, name) for side in (left, right)]
            if all(isinstance(each, Mapping) for each in both):
                ours, theirs = (self._once("cover", each, where, 0, self._cover) for each in both)
                if not any(self._meet(a.flat, b.flat, where, nested - 1) for a in ours for b in theirs):
                    return False
        return True

    def _is_vain(self, one: Alternative, where: str) -> bool:
        """Whether a property that is required has listed values, and none of them is allowed."""
        for name in one.flat.get("required", ()):
            schema = property_schema(one.flat, name)
            if isinstance(schema, Synthetic):
                covers = self._once("cover", schema, where, 0, self._cover)
                values = [value for each in covers for value in each.flat.get("enum", [None])]
                listed = all("enum" in each.flat for each in covers)
                if listed and all(self._values.allows(value, schema, where) is False for value in values):
                    return True
        return False

    def _cover(self, schema: Mapping[str, Any], place: str, depth: int) -> list[Alternative]:
        """Alternatives of which every value that satisfies a schema satisfies one: `of` with less asked."""
        own = normalize_keywords(schema, place, self._document.draft)
        self._known["cover", schema_name(schema), depth] = schema, [Alternative({}, depth)]  # for a schema in itself
        result = [] if own is None else [Alternative(own, depth)]
        parts = [
            [each for where, part in options for each in self._once("cover", part, where, depth, self._cover)]
            for name, options in combined_lists(schema, place)
            if name != "allOf"
        ]
        for name, options in combined_lists(schema, place):
            if name == "allOf":
                parts += [self._once("cover", part, where, depth, self._cover) for where, part in options]
        if "$ref" in schema:
            target = self._document.follow(schema, "$ref", place)
            parts.append(self._once("cover", target, place, depth, self._cover))
        for part in parts:
            if len(result) * len(part) <= MAX_ALTERNATIVES and self._merged <= MAX_MERGED:
                result = self._both(result, part)
        return result

    def _unevaluated(self, found: list[Alternative], schema: Mapping[str, Any], place: str) -> list[Alternative]:
        if "unevaluatedProperties" in schema:
            rest = schema["unevaluatedProperties"]
            found = [each for one in found if (each := _with_rest_of_properties(one, rest)) is not None]
        if "unevaluatedItems" in schema:
            rest = schema["unevaluatedItems"]
            found = [each for one in found if (each := _with_rest_of_items(one, rest)) is not None]
        return found

    def _failing(self, schema: Mapping[str, Any], place: str, depth: int) -> list[Alternative]:
        draft, whole = self._document.draft, schema
        if "$ref" in schema and draft < 2019:
            return self._follow(schema, "$ref", place, depth, self.failing)  # what stands beside it may not count
        schema = {name: value for name, value in schema.items() if not 0 < draft < SINCE.get(name, 0)}
        own = normalize_keywords(schema, place, draft)
        if own is None:
            return [Alternative({}, depth)]
        result = [Alternative(flat, depth) for flat in failing_keywords(own)]
        for name in ("$ref", "$dynamicRef", "$recursiveRef"):
            if name in schema:
                result += self._follow(whole, name, place, depth, self.failing)
        for name, options in combined_lists(schema, place):
            fails = [self.failing(part, where, depth) for where, part in options]
            if name == "allOf":
                result += [each for fail in fails for each in fail]
                continue
            none = [Alternative({}, depth)]
            for fail in fails:
                none = self._both(none, fail)
            result += none
            if name == "oneOf":
                holds = [self.of(part, where, depth) for where, part in options]
                pairs = ((one, other) for place, one in enumerate(holds) for other in holds[:place])
                result += [each for one, other in pairs for each in self._both(one, other)][:MAX_OF_AN_OPTION]
        if "not" in schema:
            result += self.of(schema["not"], below(place, "not"), depth)
        if "if" in schema and ("then" in schema or "else" in schema):
            condition, when = schema["if"], below(place, "if")
            then, otherwise = (
                self.failing(schema.get(name, True), below(place, name), depth) for name in ("then", "else")
            )
            result += self._both(self.of(condition, when, depth), then)
            result += self._both(self.failing(condition, when, depth), otherwise)
        return [replace(each, seen=Seen()) for each in result][:MAX_ALTERNATIVES]


def _with_rest_of_properties(one: Alternative, rest: Any) -> Alternative | None:
    seen = one.seen
    if seen.all_properties:
        return one
    known: Flat = {"additionalProperties": rest}
    if seen.properties:
        known["properties"] = dict.fromkeys(sorted(seen.properties), True)
    if seen.patterns:
        known["patternProperties"] = dict.fromkeys(sorted(seen.patterns), True)
    flat = merge_keywords(one.flat, known)
    return None if flat is None else replace(one, flat=flat, seen=replace(seen, all_properties=True))


def _with_rest_of_items(one: Alternative, rest: Any) -> Alternative | None:
    seen = one.seen
    if seen.all_items:
        return one
    known: Flat = {"items": rest}
    if seen.items:
        known["prefixItems"] = [True] * seen.items
    flat = merge_keywords(one.flat, known)
    return None if flat is None else replace(one, flat=flat, seen=replace(seen, all_items=True))
