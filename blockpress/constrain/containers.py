"""Arrays and objects as graphs: members, with commas between them, counted as far as limits need it.

    "["  (0, 0)  member  (0, 1)  "," member  (0, 2)  ... "]"    nodes (place, count); a place is a declared property

Invariant: a member's expression stands once in the graph for every node after it, however many ways lead there.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

from blockpress.constrain.automaton import (
    DEAD,
    EMPTY_TEXT,
    MAX_STATES,
    NOTHING,
    Automaton,
    Concat,
    Expression,
    Graph,
    Linked,
    Union,
    _NothingMatches,
    _TooLarge,
    check_size,
    difference,
    intersection,
    literal,
    optional,
)
from blockpress.constrain.compiler import compile_expression, listed_texts, text_automaton
from blockpress.constrain.distinct import distinct_parts
from blockpress.constrain.ecma import texts_without
from blockpress.constrain.json_numbers import json_number
from blockpress.constrain.json_text import json_string, text_of
from blockpress.constrain.merge import Flat, all_of, bounds, not_schema, property_schema, refused
from blockpress.constrain.references import below

COMMA = Concat((literal(","), optional(literal(" "))))
COLON = Concat((literal(":"), optional(literal(" "))))
MOST_DISTINCT = 64
"""Most listed values of which each is told from all others where none may come twice; of more, as many groups."""


class Parts(Protocol):
    """What makes the automata of schemas within one; None: no value."""

    def value(self, schema: Any, place: str) -> Automaton | None: ...

    def listed(self, schema: Any, place: str) -> list[Any] | None:
        """The values of a schema that only lists some."""

    @property
    def exhausted(self) -> bool:
        """Whether what may be left out is, since enough has been made."""

    enough: int
    """Most states of an automaton."""

    repeated: int
    """Most states that a counted repetition has, where it may be shorter."""

    optional: int | None
    """Most states of what an object or array may do without; None: all of it is written."""


def _may_miss(schema: Any, place: str, parts: Parts) -> Automaton | None:
    """The automaton of what may be left out, if it is not too large."""
    if parts.exhausted:
        return None
    try:
        value = parts.value(schema, place)
    except _TooLarge:
        if parts.optional is None:
            raise
        return None
    return value if value is None or parts.optional is None or len(value) <= parts.optional else None


class Members:
    """A `Graph` in the making, with nodes of any name: "start" and "end" are its own."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {"start": 0, "end": 1}
        self._edges: list[tuple[int, Expression, int]] = []

    def add(self, source: Hashable, part: Expression, target: Hashable) -> None:
        """An edge."""
        numbers = [self._numbers.setdefault(node, len(self._numbers)) for node in (source, target)]
        self._edges.append((numbers[0], part, numbers[1]))

    def member(self, source: Hashable, member: Expression, target: Hashable, *, first: bool) -> None:
        """A member on the way from a node to another; after a comma if it is not the first."""
        shared = ("member", target, id(member))
        known = shared in self._numbers
        self.add(source, EMPTY_TEXT if first else COMMA, shared)
        if not known:
            self.add(shared, member, target)

    def expression(self) -> Expression:
        """The ways from "start" to "end"."""
        return Graph(tuple(self._edges))


@lru_cache(maxsize=8)
def any_value(depth: int) -> Automaton:
    """Any JSON value, with arrays and objects down to a depth."""
    text = json_string(text_of((0, None)))
    parts: list[Expression] = [text, json_number(None, None), *map(literal, ("true", "false", "null"))]
    if depth:
        inner = Linked(any_value(depth - 1))
        for brackets, member in (("[]", inner), ("{}", Concat((text, COLON, inner)))):
            members = Members()
            members.add("start", literal(brackets[0]), 0)
            members.member(0, member, 1, first=True)
            members.member(1, member, 1, first=False)
            for count in range(2):
                members.add(count, literal(brackets[1]), "end")
            parts.append(Linked(compile_expression(members.expression())))
    return compile_expression(Union(tuple(parts)))


def object_texts(flat: Flat, place: str, parts: Parts) -> Expression:
    """Objects: declared members in their order, then others."""
    declared: dict[str, Any] = dict(flat.get("properties", {}))
    required = flat.get("required", [])
    for name in required:
        declared.setdefault(name, property_schema(flat, name))
    names = parts.value(_text_names(flat), below(place, "propertyNames")) if "propertyNames" in flat else None
    steps: list[tuple[Expression, bool]] = []  # members in their order, and whether they may be left out
    sizes: list[int] = []
    for name, schema in declared.items():
        key = json.dumps(name, ensure_ascii=False)
        value = None
        if "propertyNames" not in flat or (names is not None and names.matches(key)):
            make = parts.value if name in required else partial(_may_miss, parts=parts)
            value = make(schema, below(place, "properties", name))
        if value is not None:
            steps.append((Concat((literal(key), COLON, Linked(value))), name not in required))
            sizes.append(len(value) + len(key))
            if parts.optional is None:
                check_size(sum(sizes), parts.enough)
        elif name in required:
            return NOTHING
    if parts.optional is not None:
        steps = _affordable(steps, sizes, parts.optional)
    least, most = bounds(flat, "Properties", place)
    free = [*_free_members(flat, declared, names, place, parts)] if most != len(required) else []
    if free and least > len(required) + 1:
        steps += [
            (Concat((part, value)), True)
            for key, value, _ in free
            for part in distinct_parts(key, parts.repeated, least)
        ]
        free = []
    if most is not None and (most < len(required) or least > most):
        return NOTHING
    if most is not None and free:
        size = max(size for *_, size in free)
        most = min(most, max(least, len(required), parts.repeated // size, 1))
    if most is not None and not free and most >= len(steps):
        most = None
    highest = max(0 if least <= len(required) else least, 1) if most is None else most
    return _object_graph(steps, [Concat((key, value)) for key, value, _ in free], least, highest, most is not None)


def _affordable(
    steps: Sequence[tuple[Expression, bool]], sizes: Sequence[int], most: int
) -> list[tuple[Expression, bool]]:
    """The members that must be there, and of the others the smallest that have `most` states together."""
    kept = set()
    for size, number in sorted((size, number) for number, size in enumerate(sizes)):
        if steps[number][1] and size <= most:
            kept.add(number)
            most -= size
    return [step for number, step in enumerate(steps) if number in kept or not step[1]]


def _object_graph(
    steps: Sequence[tuple[Expression, bool]], free: Sequence[Expression], least: int, highest: int, bounded: bool
) -> Expression:
    """Nodes (place, count): the count ends at `highest`, where with `bounded` no member may follow."""
    graph = Members()
    graph.add("start", literal("{"), (0, 0))

    def member(place: int, count: int, part: Expression, after: int) -> None:
        following = count + 1 if bounded else min(count + 1, highest)
        if following <= highest:
            graph.member((place, count), part, (after, following), first=not count)

    last = len(steps)
    needed = sum(not may for _, may in steps)
    for count in range(highest + 1):
        for place, (part, may_miss) in enumerate(steps):
            if may_miss:
                graph.add((place, count), EMPTY_TEXT, (place + 1, count))
            member(place, count, part, place + 1)
        for part in free:
            member(last, count, part, last)
        if least <= needed or count >= least:
            graph.add((last, count), literal("}"), "end")
    return graph.expression()


def _text_names(flat: Flat) -> Any:
    return all_of({"type": "string"}, flat["propertyNames"])


def _free_members(
    flat: Flat, declared: Mapping[str, Any], names: Automaton | None, place: str, parts: Parts
) -> Iterator[tuple[Automaton, Expression, int]]:
    """(key, colon and value, states) of members that are not declared one by one."""
    patterns: Mapping[str, Any] = flat.get("patternProperties", {})
    additional = flat.get("additionalProperties", not (flat.get("declares") or patterns))
    schemas: list[tuple[tuple[str, ...], Any]] = [
        (("patternProperties", pattern), schema) for pattern, schema in patterns.items()
    ]
    for where, schema in [*schemas, (("additionalProperties",), additional)]:
        if schema is False or ("propertyNames" in flat and names is None):
            continue
        inside = below(place, *where)
        try:
            keys = text_of((0, None), where[1:])
            for pattern in patterns:
                if pattern not in where[1:]:
                    keys = intersection(keys, texts_without(pattern))
            if declared:
                keys = difference(keys, text_automaton(map(_encodable, declared)))
            text = compile_expression(json_string(keys))
            if names is not None:
                text = intersection(text, names)
        except _NothingMatches:
            continue
        value = _may_miss(schema, inside, parts)
        if value is not None:
            yield text, Concat((COLON, Linked(value))), len(text) + len(value)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def array_texts(flat: Flat, place: str, parts: Parts) -> Expression:
    """Arrays."""
    first: list[Any] = list(flat.get("prefixItems", []))
    least, most = bounds(flat, "Items", place)
    further = flat.get("items", not first or least > len(first))
    contained = [each for each in flat.get("contains", ()) if each[1] or each[2] is not None]
    least = max([least, *(each[1] for each in contained if len(contained) == 1)])
    if further is False:
        most = len(first) if most is None else min(most, len(first))
    if flat.get("uniqueItems") and (most is None or most > 1):
        found = None if first or contained else _distinct_items(flat, further, place, parts)
        if found is not None and len(found) >= least:
            return _object_like(found, least, most)
        if least > 1:
            raise refused(below(place, "uniqueItems"), True, f"for {least} items that cannot be told apart beforehand")
        most = 1
    if most is not None and least > most:
        return NOTHING
    return _array_graph(first, further, contained, least, most, place, parts)


def _object_like(items: Sequence[Automaton], least: int, most: int | None) -> Expression:
    steps: list[tuple[Expression, bool]] = [(Linked(item), True) for item in items]
    highest = max(least, 1) if most is None or most >= len(items) else most
    graph = _object_graph(steps, [], least, highest, most is not None and most < len(items))
    assert isinstance(graph, Graph)
    brackets = {literal("{"): literal("["), literal("}"): literal("]")}
    return Graph(tuple((source, brackets.get(part, part), target) for source, part, target in graph.edges))


def _distinct_items(flat: Flat, further: Any, place: str, parts: Parts) -> list[Automaton] | None:
    """Items of which any two have different values, for arrays that have each of them once at most."""
    values = parts.listed(further, below(place, "items"))
    if values is not None:
        texts = [json.dumps(value, ensure_ascii=False) for value in values]
        size = max(1, -(-len(values) // MOST_DISTINCT))
        return [listed_texts(tuple(texts[i : i + size])) for i in range(0, len(texts), size)]
    plain = {"minimum": -(10**9), "maximum": 10**9}  # numbers in one form
    item = parts.value(further, below(place, "items"))
    if item is not None and item.run("1e1") != DEAD:
        item = parts.value(all_of(further, {"anyOf": [plain | {"type": "number"}, {"type": _NO_NUMBERS}]}), place)
    return [] if item is None else distinct_parts(item, parts.repeated, flat.get("minItems", 0))


_NO_NUMBERS = ["string", "array", "object", "boolean", "null"]


def _array_graph(
    first: Sequence[Any],
    further: Any,
    contained: Sequence[tuple[Any, int, int | None]],
    least: int,
    most: int | None,
    place: str,
    parts: Parts,
) -> Expression:
    """Nodes (items, items found of each `contains`)."""
    if most is not None and most > len(first):
        item = (parts.value if least > len(first) else partial(_may_miss, parts=parts))(further, below(place, "items"))
        room = 1 if item is None else parts.repeated // len(item)
        most = min(most, max(least, len(first), room, 1))
    highest = max(least, len(first), 1) if most is None else most
    check_size(4 * least, MAX_STATES)
    graph = Members()
    graph.add("start", literal("["), (0, (0,) * len(contained)))
    queue = dict.fromkeys([(0, (0,) * len(contained))])
    for count, found in _growing(queue):
        if count >= least and all(have >= each[1] for have, each in zip(found, contained, strict=True)):
            graph.add((count, found), literal("]"), "end")
        if count == most:
            continue
        schema = first[count] if count < len(first) else further
        where = below(place, "prefixItems", count) if count < len(first) else below(place, "items")
        for choice in itertools.product((False, True), repeat=len(contained)):
            whole, after = schema, []
            for take, have, (wanted, need, limit) in zip(choice, found, contained, strict=True):
                if take:
                    whole = all_of(whole, wanted)
                elif limit is not None:
                    whole = all_of(whole, not_schema(wanted))
                after.append(min(have + take, need) if limit is None else have + take)
            if any(each[2] is not None and have > each[2] for have, each in zip(after, contained, strict=True)):
                continue
            make = parts.value if count < least else partial(_may_miss, parts=parts)
            if (item := make(whole, where)) is None:
                continue
            target = (count + 1 if most is not None else min(count + 1, highest), tuple(after))
            queue.setdefault(target)
            graph.member((count, found), _linked(item), target, first=not count)
    return graph.expression()


def _growing(queue: dict[Any, None]) -> Iterator[Any]:
    """The keys of a dictionary that grows meanwhile."""
    done = 0
    while done < len(queue):
        yield from list(itertools.islice(queue, done, (done := len(queue))))


@lru_cache(maxsize=4096)
def _linked(automaton: Automaton) -> Linked:
    return Linked(automaton)
