"""Regular expressions in Python's syntax, as expressions of automata.

Python's own parser reads the pattern, so every construct means what `re` makes it mean for text that matches whole.

Invariant: what an automaton cannot express (conditional groups, most back references) is refused by name.
Run it:  python -m pytest tests/constrain/test_regex.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from re import _constants as sre
from re import _parser
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
    literal,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.conditions import ANY_TEXT, ahead, begins, behind, ends, first_match, looks
from blockpress.errors import RequestError

LAST = sys.maxunicode
MAX_GROUP = 64
"""Most texts of a group that is referred to."""


def parse_regex(pattern: object, *, search: bool = False, ordered: bool = False) -> Expression:
    """The texts that match a pattern as a whole; with `search` those in which it is found.

    A search knows no atomic groups and no possessive repetitions: if less of them is allowed, more may match.

    Args:
        ordered: the expression is for `first_match`.

    Raises:
        RequestError: the pattern is not one, or has a construct that an automaton cannot express; it is named.
    """
    if not isinstance(pattern, str):
        raise RequestError(f"regex is {pattern!r:.80}", hint="regex must be a text")
    try:
        tree = _parser.parse(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"regex {pattern!r:.200} is not a regular expression: {error}", hint="correct it") from error
    inner = _Translator(pattern, search, ordered).sequence(list(tree), tree.state.flags)
    return Concat((ANY_TEXT, inner, ANY_TEXT)) if search else inner


class _Translator:
    """Nodes of Python's parser to expressions. Flags are those that hold at a node."""

    def __init__(self, pattern: str, search: bool, ordered: bool) -> None:
        self._pattern, self._search, self._ordered = pattern, search, ordered
        self._groups: dict[int, str] = {}

    def sequence(self, nodes: Sequence[Any], flags: int) -> Expression:
        """The nodes one after the other. A group that a later one refers to is written out, text by text."""
        for place, (code, value) in enumerate(nodes):
            if code is sre.SUBPATTERN and value[0] is not None and _refers(nodes[place + 1 :], value[0]):
                before = [self.node(earlier, what, flags) for earlier, what in nodes[:place]]
                known, options = self._groups, []
                for text in self._texts(self.node(code, value, flags)):
                    self._groups = {**known, value[0]: text}
                    options.append(Concat((literal(text), self.sequence(nodes[place + 1 :], flags))))
                self._groups = known
                return Concat((*before, Union(tuple(options))))
        parts = tuple(self.node(code, value, flags) for code, value in nodes)
        return parts[0] if len(parts) == 1 else Concat(parts)

    def _texts(self, group: Expression) -> list[str]:
        try:
            texts = None if any(looks(group)) else compile_expression(group).texts(MAX_GROUP)
        except _NothingMatches:
            return []
        if texts is None or (self._ordered and any(a != b and b.startswith(a) for a in texts for b in texts)):
            raise self._refused(f"a back reference to a group of other than at most {MAX_GROUP} texts")
        return texts

    def node(self, code: Any, value: Any, flags: int) -> Expression:
        """One node."""
        match code:
            case sre.LITERAL:
                return self._chars([(value, value)], flags)
            case sre.NOT_LITERAL:
                return self._chars(_negated(_folded([(value, value)], flags)), flags & ~re.IGNORECASE)
            case sre.ANY:
                return ANY_CHAR if flags & re.DOTALL else Chars(((0, 9), (11, LAST)))
            case sre.IN:
                return self._set(value, flags)
            case sre.BRANCH:
                return Union(tuple(self.sequence(list(branch), flags) for branch in value[1]))
            case sre.SUBPATTERN:
                _, added, removed, inner = value
                return self.sequence(list(inner), (flags | added) & ~removed)
            case sre.MAX_REPEAT | sre.MIN_REPEAT:
                return self._repeat(code, value, flags)
            case sre.POSSESSIVE_REPEAT if not self._search:
                return self._first_match(lambda: self._repeat(code, value, flags))
            case sre.ATOMIC_GROUP if not self._search:
                return self._first_match(lambda: self.sequence(list(value), flags))
            case sre.ASSERT | sre.ASSERT_NOT:
                return self._look(value, flags, code is sre.ASSERT)
            case sre.AT:
                return self._at(value, flags)
            case sre.GROUPREF if value in self._groups:
                return Concat(tuple(self._chars([(ord(char), ord(char))], flags) for char in self._groups[value]))
        raise self._refused(_NAMES.get(code, str(code).lower()))

    def _repeat(self, code: Any, value: Any, flags: int) -> Expression:
        low, high, inner = value
        most = None if high == sre.MAXREPEAT else high
        return Repeat(self.sequence(list(inner), flags), low, most, code is sre.MIN_REPEAT)

    def _first_match(self, make: Callable[[], Expression]) -> Expression:
        before, self._ordered = self._ordered, True
        inner = make()
        self._ordered = before
        return first_match(inner)

    def _look(self, value: Any, flags: int, wanted: bool) -> Expression:
        direction, nodes = value
        inner = self.sequence(list(nodes), flags)
        if direction > 0:
            return ahead(inner, wanted)
        if looks(inner)[1]:
            raise self._refused("a look-ahead inside a look-behind")
        return behind(inner, wanted)

    def _at(self, value: Any, flags: int) -> Expression:
        lines, newline = bool(flags & re.MULTILINE), Chars(((10, 10),))
        match value:
            case sre.AT_BEGINNING if lines:
                return Union((begins(), behind(newline)))
            case sre.AT_BEGINNING | sre.AT_BEGINNING_STRING:
                return begins()
            case sre.AT_END if lines:
                return Union((ends(EMPTY_TEXT), ahead(newline)))
            case sre.AT_END:
                return ends(Union((EMPTY_TEXT, newline)))
            case sre.AT_END_STRING:
                return ends(EMPTY_TEXT)
        word = Chars(tuple(_category(sre.CATEGORY_WORD, bool(flags & re.ASCII))))
        if value is sre.AT_BOUNDARY:
            return Union(tuple(Concat((behind(word, side), ahead(word, not side))) for side in (True, False)))
        inside = Concat((behind(word), ahead(word)))
        outside = Concat((behind(word, False), ahead(word, False)))
        if re.match(r"\B", ""):  # from Python 3.14 on
            return Union((inside, outside))
        return Union((inside, *(Concat((outside, some)) for some in (ahead(ANY_CHAR), behind(ANY_CHAR)))))

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
    sre.GROUPREF: "a back reference to a group that is not before it",
    sre.GROUPREF_EXISTS: "a conditional group",
    sre.ATOMIC_GROUP: "an atomic group",
    sre.POSSESSIVE_REPEAT: "a possessive repetition",
}


def _refers(nodes: Any, group: int) -> bool:
    """Whether a back reference to a group stands somewhere in the nodes."""
    if isinstance(nodes, tuple) and len(nodes) == 2 and nodes[0] is sre.GROUPREF:
        return bool(nodes[1] == group)
    return isinstance(nodes, list | tuple | _parser.SubPattern) and any(_refers(node, group) for node in nodes)


@lru_cache(maxsize=32)
def _category(code: Any, ascii_only: bool) -> list[tuple[int, int]]:
    """The ranges of \\d, \\w, \\s and their opposites, as `re` has them."""
    name = str(code)
    letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[name.rsplit("_", 1)[-1]]
    ranges = matching(rf"\{letter}", re.ASCII if ascii_only else 0)
    return _negated(ranges) if "_NOT_" in name else ranges


def matching(pattern: str, flags: int = 0) -> list[tuple[int, int]]:
    """The ranges of the code points that a pattern of one character matches."""
    runs = re.finditer(f"(?:{pattern})+", every_character(), flags)
    return [(run.start(), run.end() - 1) for run in runs]


@lru_cache(maxsize=1)
def every_character() -> str:
    """All code points in their order, surrogates included."""
    return "".join(map(chr, range(LAST + 1)))


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
