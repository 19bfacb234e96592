"""Regular expressions in Python's syntax, as expressions of automata.

Python's own parser reads the pattern, so every construct means what `re` makes it mean for text that matches whole.

Invariant: what an automaton cannot express (back references, assertions inside repetitions, ...) is refused by name.
Run it:  python -m pytest tests/constrain/test_regex.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from blockpress.constrain.automaton import (
    ANY_CHAR,
    EMPTY_TEXT,
    Chars,
    Concat,
    Expression,
    Repeat,
    Union,
    _NothingMatches,
    difference,
    intersection,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.errors import RequestError

ANY_TEXT = Repeat(ANY_CHAR, 0, None)
NOTHING = Union(())
LAST = sys.maxunicode


def parse_regex(pattern: object, *, search: bool = False) -> Expression:
    """The texts that match a pattern as a whole; with `search` those in which it is found.

    Raises:
        RequestError: the pattern is not one, or has a construct that an automaton cannot express; it is named.
    """
    if not isinstance(pattern, str):
        raise RequestError(f"regex is {pattern!r:.80}", hint="regex must be a text")
    try:
        tree = _parser.parse(pattern, re.UNICODE)
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError(f"regex {pattern!r:.200} is not a regular expression: {error}", hint="correct it") from error
    translator = _Translator(pattern)
    nodes = list(tree)
    if not search:
        return translator.sequence(nodes, tree.state.flags, EMPTY_TEXT)
    return translator.found(nodes, tree.state.flags)


class _Translator:
    """Nodes of Python's parser to expressions. Flags are those that hold at a node."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def sequence(
        self, nodes: Sequence[Any], flags: int, rest: Expression, *, first: bool = True, last: bool = True
    ) -> Expression:
        """The nodes one after the other, then `rest`. first, last: whether the text begins and ends with them."""
        result = rest
        after_nothing = rest == EMPTY_TEXT
        for place in reversed(range(len(nodes))):
            code, value = nodes[place]
            at_start = first and all(self._is_empty(node) for node in nodes[:place])
            if code is sre.ASSERT or code is sre.ASSERT_NOT:
                result = self._look_ahead(code is sre.ASSERT, value, flags, result, at_start=at_start, known_rest=last)
            elif code is sre.AT:
                result = self._anchor(
                    value, flags, result, at_start=at_start, known_rest=last, at_end=last and after_nothing
                )
            else:
                alone = place == len(nodes) - 1
                result = self._join(
                    self.node(code, value, flags, first=at_start, last=last and alone and after_nothing), result
                )
                after_nothing = False
        return result

    def found(self, nodes: Sequence[Any], flags: int) -> Expression:
        """Texts in which the nodes are found: alternatives are anchored one by one."""
        if len(nodes) == 1 and nodes[0][0] is sre.SUBPATTERN:
            _, added, removed, inner = nodes[0][1]
            return self.found(list(inner), (flags | added) & ~removed)
        nodes = list(nodes)
        begins, ends = self._starts_anchored(nodes, flags), self._ends_anchored(nodes, flags)
        before, middle, after = nodes[:begins], nodes[begins : len(nodes) - ends], nodes[len(nodes) - ends :]
        if len(middle) == 1 and middle[0][0] is sre.BRANCH:
            return Union(tuple(self.found([*before, *branch, *after], flags) for branch in middle[0][1][1]))
        inner = self.sequence(middle, flags, EMPTY_TEXT if ends else ANY_TEXT, first=bool(begins), last=True)
        return inner if begins else Concat((ANY_TEXT, inner))

    def _starts_anchored(self, nodes: Sequence[Any], flags: int) -> int:
        kinds = (sre.AT_BEGINNING_STRING,) if flags & re.MULTILINE else (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
        return int(bool(nodes) and nodes[0][0] is sre.AT and nodes[0][1] in kinds)

    def _ends_anchored(self, nodes: Sequence[Any], flags: int) -> int:
        kinds = (sre.AT_END_STRING,) if flags & re.MULTILINE else (sre.AT_END, sre.AT_END_STRING)
        return int(bool(nodes) and nodes[-1][0] is sre.AT and nodes[-1][1] in kinds)

    def node(self, code: Any, value: Any, flags: int, *, first: bool = False, last: bool = False) -> Expression:
        """One node that takes text. first, last: whether the text begins and ends with it."""
        if code is sre.LITERAL:
            return self._chars([(value, value)], flags)
        if code is sre.NOT_LITERAL:
            return self._chars(_negated(_folded([(value, value)], flags)), flags & ~re.IGNORECASE)
        if code is sre.ANY:
            return ANY_CHAR if flags & re.DOTALL else Chars(((0, 9), (11, LAST)))
        if code is sre.IN:
            return self._set(value, flags)
        if code is sre.BRANCH:
            return Union(
                tuple(self.sequence(list(branch), flags, EMPTY_TEXT, first=first, last=last) for branch in value[1])
            )
        if code is sre.SUBPATTERN:
            _, added, removed, inner = value
            return self.sequence(list(inner), (flags | added) & ~removed, EMPTY_TEXT, first=first, last=last)
        if code is sre.MAX_REPEAT or code is sre.MIN_REPEAT:
            low, high, inner = value
            part = self.sequence(list(inner), flags, EMPTY_TEXT, first=False, last=False)
            return Repeat(part, low, None if high == sre.MAXREPEAT else high)
        raise self._refused(_NAMES.get(code, str(code).lower()))

    def _join(self, part: Expression, rest: Expression) -> Expression:
        return part if rest == EMPTY_TEXT else Concat((part, rest))

    def _is_empty(self, node: Any) -> bool:
        return node[0] in (sre.AT, sre.ASSERT, sre.ASSERT_NOT)

    def _look_ahead(
        self, positive: bool, value: Any, flags: int, rest: Expression, *, at_start: bool, known_rest: bool
    ) -> Expression:
        direction, nodes = value[0], list(value[1])
        if direction < 0:
            raise self._refused("a look-behind")
        if not known_rest:
            raise self._refused("a look-ahead inside a repetition or before an alternative's end")
        behind: Expression = ANY_TEXT
        if self._ends_anchored(nodes, flags):
            behind = Repeat(Chars(((10, 10),)), 0, int(nodes.pop()[1] is sre.AT_END))
        wanted = Concat((self.sequence(nodes, flags, EMPTY_TEXT, first=at_start, last=False), behind))
        try:
            follows = compile_expression(rest)
        except _NothingMatches:
            return NOTHING
        try:
            ahead = compile_expression(wanted)
        except _NothingMatches:
            return NOTHING if positive else follows
        try:
            return intersection(follows, ahead) if positive else difference(follows, ahead)
        except _NothingMatches:
            return NOTHING

    def _anchor(
        self, value: Any, flags: int, rest: Expression, *, at_start: bool, known_rest: bool, at_end: bool
    ) -> Expression:
        begins = value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
        if begins and at_start:
            return rest
        if value in (sre.AT_END, sre.AT_END_STRING) and known_rest and not flags & re.MULTILINE:
            if at_end:
                return rest
            allowed: Expression = EMPTY_TEXT
            if value is sre.AT_END:
                allowed = Union((EMPTY_TEXT, Chars(((10, 10),))))
            try:
                return intersection(compile_expression(rest), compile_expression(allowed))
            except _NothingMatches:
                return NOTHING
        if begins and not flags & re.MULTILINE and not at_start:
            raise self._refused("an anchor inside the text")
        raise self._refused(_NAMES.get(value, str(value).lower()))

    def _set(self, items: Sequence[Any], flags: int) -> Expression:
        negated = items[0][0] is sre.NEGATE
        ranges: list[tuple[int, int]] = []
        for code, value in items[negated:]:
            if code is sre.LITERAL:
                ranges.append((value, value))
            elif code is sre.RANGE:
                ranges.append(value)
            else:
                ranges += _category(value, bool(flags & re.ASCII))
        ranges = _folded(ranges, flags)
        return self._chars(_negated(ranges) if negated else ranges, flags & ~re.IGNORECASE)

    def _chars(self, ranges: Iterable[tuple[int, int]], flags: int) -> Expression:
        return Chars(tuple(_merged(_folded(list(ranges), flags))))

    def _refused(self, what: str) -> RequestError:
        return RequestError(
            f"regex {self._pattern!r:.200} has {what}, which cannot be enforced on a canvas",
            hint="write the pattern without it",
        )


_NAMES = {
    sre.GROUPREF: "a back reference",
    sre.GROUPREF_EXISTS: "a conditional group",
    sre.ATOMIC_GROUP: "an atomic group",
    sre.POSSESSIVE_REPEAT: "a possessive repetition",
    sre.AT_BOUNDARY: r"\b",
    sre.AT_NON_BOUNDARY: r"\B",
    sre.AT_BEGINNING: "^ for lines",
    sre.AT_END: "$ for lines or inside a repetition",
    sre.AT_BEGINNING_STRING: r"\A inside the text",
    sre.AT_END_STRING: r"\Z inside a repetition",
}


@lru_cache(maxsize=32)
def _category(code: Any, ascii_only: bool) -> list[tuple[int, int]]:
    """The ranges of \\d, \\w, \\s and their opposites, as `re` has them."""
    name = str(code)
    letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[name.rsplit("_", 1)[-1]]
    everything = "".join(map(chr, range(LAST + 1)))
    runs = re.finditer(rf"\{letter}+", everything, re.ASCII if ascii_only else 0)
    ranges = [(run.start(), run.end() - 1) for run in runs]
    return _negated(ranges) if "_NOT_" in name else ranges


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same code points in ascending ranges that do not touch."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def _negated(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """All other code points."""
    result, start = [], 0
    for low, high in _merged(ranges):
        if low > start:
            result.append((start, low - 1))
        start = high + 1
    return result + ([(start, LAST)] if start <= LAST else [])


def _folded(ranges: list[tuple[int, int]], flags: int) -> list[tuple[int, int]]:
    """With the flag (?i) also what differs in case only."""
    if not flags & re.IGNORECASE:
        return ranges
    groups = _case_groups(bool(flags & re.ASCII))
    more = [
        (other, other)
        for point, others in groups.items()
        if any(low <= point <= high for low, high in ranges)
        for other in others
    ]
    return [*ranges, *more]


@lru_cache(maxsize=2)
def _case_groups(ascii_only: bool) -> dict[int, list[int]]:
    """Code points that `re` takes for each other without regard to case, for each that has any."""
    from re import _casefix  # type: ignore[attr-defined]

    if ascii_only:
        return {ord(char): [ord(char.swapcase())] for char in map(chr, range(128)) if char.isalpha()}
    groups: dict[int, set[int]] = {}
    for point, char in enumerate(map(chr, range(LAST + 1))):
        lower = char.lower()
        if lower == char:
            continue
        key = ord(lower) if len(lower) == 1 else point
        groups.setdefault(key, {key}).add(point)
    for key, others in _casefix._EXTRA_CASES.items():
        whole = groups.setdefault(key, {key}).union(*(groups.get(other, {other}) for other in others))
        for point in (key, *others):
            groups[point] = whole
    return {point: sorted(group) for group in groups.values() if len(group) > 1 for point in group}
