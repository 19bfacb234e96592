"""From an expression to its minimal automaton: a nondeterministic one, then sets of its states.

Invariant: it ends within a number of states and of seconds, or says that it would not.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int32

from blockpress.constrain.automaton import (
    DEAD,
    MAX_STATES,
    Automaton,
    Bytes,
    Chars,
    Concat,
    Expression,
    Graph,
    Repeat,
    Union,
    byte_ranges,
    check_size,
    minimal,
)
from blockpress.errors import RequestError

MAX_POSITIONS = 200_000
"""Most states of the nondeterministic automaton."""
MAX_SECONDS = 10.0


def compile_expression(expression: Expression, deadline: float | None = None) -> Automaton:
    """The minimal automaton of an expression.

    Args:
        deadline: by `time.monotonic`; None: `MAX_SECONDS` from now.

    Raises:
        RequestError: it needs too many states or too much time. _NothingMatches: no text is allowed.
    """
    if isinstance(expression, Automaton):
        return expression
    builder = _Builder(time.monotonic() + MAX_SECONDS if deadline is None else deadline)
    start, end = builder.state(), builder.state()
    builder.add(expression, start, end)
    return minimal(*builder.determinize(start, end))


@lru_cache(maxsize=512)
def char_automaton(ranges: tuple[tuple[int, int], ...]) -> Automaton | None:
    """The automaton of one character of these ranges; None if UTF-8 can write none of them."""
    builder = _Builder(time.monotonic() + MAX_SECONDS)
    start, end = builder.state(), builder.state()
    empty = True
    for low, high in ranges:
        for sequence in utf8_sequences(low, high):
            state, empty = start, False
            for first, last in sequence[:-1]:
                following = builder.state()
                builder.move(state, first, last, following)
                state = following
            builder.move(state, *sequence[-1], end)
    return None if empty else minimal(*builder.determinize(start, end))


def utf8_sequences(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges of bytes, one for each byte of a character, that together give just the code points low to high.

    >>> [[(hex(a), hex(b)) for a, b in each] for each in utf8_sequences(0x7E, 0x81)]
    [[('0x7e', '0x7f')], [('0xc2', '0xc2'), ('0x80', '0x81')]]
    """
    if low > high:
        return
    for border in (0x80, 0x800, 0xD800, 0xE000, 0x10000):  # lengths change here; UTF-8 has no surrogates
        if low < border <= high:
            yield from utf8_sequences(low, border - 1)
            yield from utf8_sequences(border, high)
            return
    if 0xD800 <= low < 0xE000:
        return
    for bits in (6, 12, 18):  # all continuation bytes below a differing one must be whole ranges
        mask = (1 << bits) - 1
        if low & ~mask != high & ~mask:
            if low & mask:
                yield from utf8_sequences(low, low | mask)
                yield from utf8_sequences((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from utf8_sequences(low, (high & ~mask) - 1)
                yield from utf8_sequences(high & ~mask, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))


def check_time(deadline: float) -> None:
    """Raises RequestError: it is later than the deadline."""
    if time.monotonic() > deadline:
        raise RequestError(
            f"the shape takes more than {MAX_SECONDS:.0f} seconds to compile",
            hint="make repetitions shorter, or nest fewer of them",
        )


class _Builder:
    """A nondeterministic automaton in the making: byte ranges and empty moves between numbered states."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._moves: list[list[tuple[int, int, int]]] = []
        self._empty: list[list[int]] = []

    def state(self) -> int:
        if len(self._moves) % 4096 == 0:
            self._check_time()
        check_size(len(self._moves), MAX_POSITIONS)
        self._moves.append([])
        self._empty.append([])
        return len(self._moves) - 1

    def add(self, expression: Expression, start: int, end: int) -> None:
        """Ways from `start` to `end` for the texts of an expression."""
        match expression:
            case Chars(ranges):
                self._embed(char_automaton(ranges), start, end)
            case Bytes(low, high):
                self.move(start, low, high, end)
            case Concat(parts):
                for part in parts[:-1]:
                    middle = self.state()
                    self.add(part, start, middle)
                    start = middle
                if parts:
                    self.add(parts[-1], start, end)
                else:
                    self._empty[start].append(end)
            case Union(parts):
                for part in parts:
                    self.add(part, start, end)
            case Repeat(part, low, high):
                self._repeat(part, low, high, start, end)
            case Graph(edges):
                nodes = {0: start, 1: end}
                for source, part, target in edges:
                    ends = [
                        nodes[each] if each in nodes else nodes.setdefault(each, self.state())
                        for each in (source, target)
                    ]
                    self.add(part, *ends)
            case Automaton():
                self._embed(expression, start, end)

    def _repeat(self, part: Expression, low: int, high: int | None, start: int, end: int) -> None:
        for _ in range(low):
            middle = self.state()
            self.add(part, start, middle)
            start = middle
        if high is None:
            loop, back = self.state(), self.state()
            self._empty[start].append(loop)
            self.add(part, loop, back)
            self._empty[back].append(loop)
            self._empty[loop].append(end)
            return
        self._empty[start].append(end)
        for _ in range(high - low):
            middle = self.state()
            self.add(part, start, middle)
            self._empty[middle].append(end)
            start = middle

    def _embed(self, automaton: Automaton | None, start: int, end: int) -> None:
        if automaton is None:
            return
        inner = [self.state() for _ in range(len(automaton))]
        self._empty[start].append(inner[0])
        for number, row in enumerate(byte_ranges(automaton)):
            self._moves[inner[number]] += [(low, high, inner[target]) for low, high, target in row]
            if automaton.accepting[number]:
                self._empty[inner[number]].append(end)

    def move(self, start: int, low: int, high: int, end: int) -> None:
        """One byte from low to high."""
        self._moves[start].append((low, high, end))

    def determinize(self, start: int, end: int) -> tuple[Int32[np.ndarray, "states 256"], Bool[np.ndarray, " states"]]:
        """Subset construction over classes of bytes that no move tells apart."""
        cuts = sorted({0, 256} | {cut for moves in self._moves for low, high, _ in moves for cut in (low, high + 1)})
        class_of = np.searchsorted(cuts, np.arange(256), side="right") - 1
        index = {cut: number for number, cut in enumerate(cuts)}
        closures: dict[int, frozenset[int]] = {}
        first = self._closure(start, closures)
        numbers, queue = {first: 0}, [first]
        rows: list[list[int]] = []
        for subset in queue:
            self._check_time(len(rows))
            following: dict[int, set[int]] = {}
            for state in subset:
                for low, high, target in self._moves[state]:
                    closure = self._closure(target, closures)
                    for each in range(index[low], index[high + 1]):
                        following.setdefault(each, set()).update(closure)
            row = [DEAD] * (len(cuts) - 1)
            for each, states in following.items():
                key = frozenset(states)
                if key not in numbers:
                    numbers[key] = len(queue)
                    queue.append(key)
                    check_size(len(queue), MAX_STATES)
                row[each] = numbers[key]
            rows.append(row)
        return np.array(rows, np.int32)[:, class_of], np.array([end in subset for subset in queue])

    def _closure(self, state: int, known: dict[int, frozenset[int]]) -> frozenset[int]:
        """The states that empty moves reach, of which only those with moves of their own, or without any, are kept."""
        if state not in known:
            seen, queue = {state}, [state]
            for each in queue:
                new = [other for other in self._empty[each] if other not in seen]
                seen.update(new)
                queue += new
            known[state] = frozenset(each for each in seen if self._moves[each] or not self._empty[each])
        return known[state]

    def _check_time(self, count: int = 0) -> None:
        if count % 64 == 0:
            check_time(self._deadline)
