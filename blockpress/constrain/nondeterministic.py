"""A nondeterministic automaton of an expression, and the sets of its states.

Invariant: empty moves of a state stand in the order in which `re` tries them.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int32

from blockpress.constrain.automaton import (
    DEAD,
    MAX_STATES,
    Ahead,
    Automaton,
    Behind,
    Bytes,
    Chars,
    Concat,
    Expression,
    Graph,
    Linked,
    Repeat,
    Union,
    byte_ranges,
    check_size,
    minimal,
)
from blockpress.constrain.utf8 import utf8_sequences
from blockpress.errors import RequestError

MAX_POSITIONS = 200_000
"""Most states of the nondeterministic automaton."""
MAX_SECONDS = 10.0


@lru_cache(maxsize=512)
def char_automaton(ranges: tuple[tuple[int, int], ...]) -> Automaton | None:
    """The automaton of one character of these ranges; None if UTF-8 can write none of them."""
    builder = Builder(time.thread_time() + MAX_SECONDS)
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


def check_time(deadline: float) -> None:
    """Raises RequestError: it is later than the deadline."""
    if time.thread_time() > deadline:
        raise RequestError(
            f"the shape takes more than {MAX_SECONDS:.0f} seconds to compile",
            hint="make repetitions shorter, or nest fewer of them",
        )


class Builder:
    """A nondeterministic automaton in the making: byte ranges, empty moves and conditions between numbered states."""

    def __init__(self, deadline: float, *, linking: bool = False) -> None:
        self.deadline, self._linking = deadline, linking
        self.linked: dict[int, Automaton] = {}
        """Automata that a move stands for: the first for the symbol 256, and so on."""
        self._symbols: dict[int, int] = {}
        self.moves: list[list[tuple[int, int, int]]] = []
        self.empty: list[list[int]] = []
        self.conditions: dict[int, Ahead | Behind] = {}
        """What must hold in a state, if any is there; then only `Threads` may make it deterministic."""

    def state(self) -> int:
        if len(self.moves) % 4096 == 0:
            check_time(self.deadline)
        check_size(len(self.moves), MAX_POSITIONS)
        self.moves.append([])
        self.empty.append([])
        return len(self.moves) - 1

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
                    self.empty[start].append(end)
            case Union(parts):
                for part in parts:
                    self.add(part, start, end)
            case Repeat():
                self._repeat(expression, start, end)
            case Graph(edges):
                nodes = {0: start, 1: end}
                for source, part, target in edges:
                    ends = [
                        nodes[each] if each in nodes else nodes.setdefault(each, self.state())
                        for each in (source, target)
                    ]
                    self.add(part, *ends)
            case Linked(automaton) if self._linking:
                symbol = self._symbols.setdefault(id(automaton), 256 + len(self._symbols))
                self.linked[symbol] = automaton
                self.move(start, symbol, symbol, end)
            case Linked(automaton):
                self._embed(automaton, start, end)
            case Automaton():
                self._embed(expression, start, end)
            case Ahead() | Behind():
                middle = self.state()
                self.conditions[middle] = expression
                self.empty[start].append(middle)
                self.empty[middle].append(end)

    def _repeat(self, repeat: Repeat, start: int, end: int) -> None:
        for _ in range(repeat.low):
            middle = self.state()
            self.add(repeat.part, start, middle)
            start = middle
        if repeat.high is None:
            loop, back = self.state(), self.state()
            self.add(repeat.part, loop, back)
            for each in (start, back):
                self.empty[each] += [end, loop] if repeat.lazy else [loop, end]
            return
        for _ in range(repeat.high - repeat.low):
            inside, middle = self.state(), self.state()
            self.empty[start] += [end, inside] if repeat.lazy else [inside, end]
            self.add(repeat.part, inside, middle)
            start = middle
        self.empty[start].append(end)

    def _embed(self, automaton: Automaton | None, start: int, end: int) -> None:
        if automaton is None:
            return
        inner = [self.state() for _ in range(len(automaton))]
        self.empty[start].append(inner[0])
        for number, row in enumerate(byte_ranges(automaton)):
            self.moves[inner[number]] += [(low, high, inner[target]) for low, high, target in row]
            if automaton.accepting[number]:
                self.empty[inner[number]].append(end)

    def move(self, start: int, low: int, high: int, end: int) -> None:
        """One byte from low to high, or the symbol of a linked automaton."""
        self.moves[start].append((low, high, end))

    def classes(self, more: Iterable[Automaton] = ()) -> tuple[dict[int, int], Int32[np.ndarray, " symbols"]]:
        """Of symbols that no move tells apart, nor one of `more`: the class that begins at each cut, and each one's."""
        symbols = 256 + len(self.linked)
        ways = (*self.moves, *(row for automaton in more for row in byte_ranges(automaton)))
        cuts = sorted({0, 256, symbols} | {cut for moves in ways for low, high, _ in moves for cut in (low, high + 1)})
        class_of = np.searchsorted(cuts, np.arange(symbols), side="right") - 1
        return {cut: number for number, cut in enumerate(cuts)}, class_of.astype(np.int32)

    def determinize(
        self, start: int, end: int
    ) -> tuple[Int32[np.ndarray, "states symbols"], Bool[np.ndarray, " states"]]:
        """Subset construction, without conditions."""
        index, class_of = self.classes()
        closures: dict[int, frozenset[int]] = {}
        first = self._closure(start, closures)
        numbers, queue = {first: 0}, [first]
        rows: list[list[int]] = []
        for subset in queue:
            if len(rows) % 64 == 0:
                check_time(self.deadline)
            following: dict[int, set[int]] = {}
            for state in subset:
                for low, high, target in self.moves[state]:
                    closure = self._closure(target, closures)
                    for each in range(index[low], index[high + 1]):
                        following.setdefault(each, set()).update(closure)
            row = [DEAD] * (len(index) - 1)
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
                new = [other for other in self.empty[each] if other not in seen]
                seen.update(new)
                queue += new
            known[state] = frozenset(each for each in seen if self.moves[each] or not self.empty[each])
        return known[state]
