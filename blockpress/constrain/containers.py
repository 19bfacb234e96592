"""Arrays and objects as graphs: members, with commas between them, counted as far as limits need it.

    "["  (0, 0)  member  (0, 1)  "," member  (0, 2)  ... "]"    nodes (place, count); a place is a declared property

Invariant: a member's expression stands once in the graph for every count after it, however many ways lead there.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

from blockpress.constrain.automaton import (
    EMPTY_TEXT,
    Concat,
    Expression,
    Graph,
    Union,
    literal,
    optional,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.json_text import json_number, json_string, text_of

COMMA = Concat((literal(","), optional(literal(" "))))
COLON = Concat((literal(":"), optional(literal(" "))))
ANY_DEPTH = 3
"""How deep the arrays and objects nest where any value is allowed."""


class Members:
    """A `Graph` in the making, with nodes of any name: "start", "end", and (place, count)."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {"start": 0, "end": 1}
        self._edges: list[tuple[int, Expression, int]] = []

    def add(self, source: Hashable, part: Expression, target: Hashable) -> None:
        """An edge."""
        numbers = [self._numbers.setdefault(node, len(self._numbers)) for node in (source, target)]
        self._edges.append((numbers[0], part, numbers[1]))

    def member(self, place: int, count: int, member: Expression, after: int, highest: int, *, bounded: bool) -> None:
        """One more member after `count` of them, at the place `after` then; after a comma if it is not the first.

        Counts end at `highest`: with `bounded` no member may follow, without it the count stays there.
        """
        following = count + 1 if bounded else min(count + 1, highest)
        if following > highest:
            return
        shared = ("member", place, after, following, id(member))
        known = shared in self._numbers
        self.add((place, count), COMMA if count else EMPTY_TEXT, shared)
        if not known:
            self.add(shared, member, (after, following))

    def expression(self) -> Expression:
        """The ways from "start" to "end"."""
        return Graph(tuple(self._edges))


@lru_cache(maxsize=8)
def any_value(depth: int) -> Expression:
    """Any JSON value, with arrays and objects down to a depth."""
    text = json_string(text_of((0, None), (), ()))
    parts: list[Expression] = [text, json_number(None, None), *map(literal, ("true", "false", "null"))]
    if depth:
        inner = any_value(depth - 1)
        for brackets, member in (("[]", inner), ("{}", Concat((text, COLON, inner)))):
            members = Members()
            members.add("start", literal(brackets[0]), (0, 0))
            for count in range(2):
                members.member(0, count, member, 0, 1, bounded=False)
                members.add((0, count), literal(brackets[1]), "end")
            parts.append(members.expression())
    return compile_expression(Union(tuple(parts)))
