"""A nondeterministic automaton of an expression, and the sets of its states.

    Concat("[", Linked(item), "]")      start --[--> (item, to 7)  ...copied as it stands...  7 --]--> end

A linked automaton is gone through only where several ways lead through it, or through it and others, at once.

Invariant: empty moves of a state stand in the order in which `re` tries them.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import final

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
    _TooLarge,
    byte_ranges,
    check_size,
    minimal,
)
from blockpress.constrain.utf8 import utf8_sequences

MAX_POSITIONS = 200_000
"""Most states of the nondeterministic automaton."""
MAX_WORK = 1_000_000
"""Most steps of making one automaton, each a state or a thread in a set: counted, so that it is the same everywhere."""
PART = 1 << 20
"""More than any automaton has states."""


@lru_cache(maxsize=512)
def char_automaton(ranges: tuple[tuple[int, int], ...]) -> Automaton | None:
    """The automaton of one character of these ranges; None if UTF-8 can write none of them."""
    builder = Builder(Work())
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


@final
class Work:
    """How many steps are left: `left`."""

    def __init__(self, left: int | None = None) -> None:
        self.left = MAX_WORK if left is None else left

    def spend(self, steps: int) -> None:
        """Raises RequestError: none are left."""
        self.left -= steps
        if self.left < 0:
            raise _TooLarge(
                "the shape needs too much work to compile", hint="make repetitions shorter, or nest fewer of them"
            )


class Builder:
    """A nondeterministic automaton in the making: byte ranges, empty moves and conditions between numbered states."""

    def __init__(self, work: Work, *, linking: bool = False) -> None:
        self.work, self._linking = work, linking
        self._parts: list[tuple[Automaton, frozenset[int]]] = []
        """Linked automata, each with the states after it: its state q is the state (its number + 1) * PART + q here."""
        self._part_numbers: dict[tuple[int, frozenset[int]], int] = {}
        self._closures: dict[int, frozenset[int]] = {}
        self._unions: dict[frozenset[int], frozenset[int]] = {}
        self.moves: list[list[tuple[int, int, int]]] = []
        self.empty: list[list[int]] = []
        self.conditions: dict[int, Ahead | Behind] = {}
        """What must hold in a state, if any is there; then only `Threads` may make it deterministic."""

    def state(self) -> int:
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
                self.empty[start].append(self._part(automaton, frozenset((end,))))
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
        """One byte from low to high."""
        self.moves[start].append((low, high, end))

    def classes(self, more: Iterable[Automaton] = ()) -> tuple[dict[int, int], Int32[np.ndarray, " 256"]]:
        """Of bytes that no move tells apart, nor one of `more`: the class that begins at each cut, and each one's."""
        ways = (*self.moves, *(row for automaton in more for row in byte_ranges(automaton)))
        cuts = sorted({0, 256} | {cut for moves in ways for low, high, _ in moves for cut in (low, high + 1)})
        class_of = np.searchsorted(cuts, np.arange(256), side="right") - 1
        return {cut: number for number, cut in enumerate(cuts)}, class_of.astype(np.int32)

    def determinize(self, start: int, end: int) -> tuple[Int32[np.ndarray, "states 256"], Bool[np.ndarray, " states"]]:
        """Subset construction, without conditions. What is in one linked automaton alone is copied with it."""
        numbers: dict[frozenset[int], int] = {}
        copied: dict[int, int] = {}  # by part, where its states begin among all that are copied: state q is -2 - place
        places: dict[int, Int32[np.ndarray, " states"]] = {}
        queue: list[frozenset[int]] = []
        rows: list[list[tuple[int, int, int]]] = []
        total = 0

        def number(subset: frozenset[int]) -> int:
            nonlocal total
            if len(subset) == 1 and (state := next(iter(subset))) >= PART:
                part, inner = divmod(state, PART)
                automaton = self._parts[part - 1][0]
                if not automaton.accepting[inner]:
                    if part not in copied:
                        copied[part], total = total, total + len(automaton)
                        check_size(total, 2 * MAX_STATES)
                    return -2 - copied[part] - inner
            if subset not in numbers:
                numbers[subset] = len(queue)
                queue.append(subset)
                check_size(len(queue), MAX_STATES)
            return numbers[subset]

        first = number(self._closure(start))
        while len(rows) < len(queue) or len(places) < len(copied):
            for subset in queue[len(rows) :]:
                following = [*self._following(subset)]
                self.work.spend(len(subset) + sum(len(states) for *_, states in following) // 4)
                rows.append([(low, high, number(states)) for low, high, states in following])
            for part in [*copied][len(places) :]:
                automaton = self._parts[part - 1][0]
                places[part] = np.arange(-2 - copied[part], -2 - copied[part] - len(automaton), -1, dtype=np.int32)
                for inner in np.flatnonzero(automaton.accepting).tolist():
                    places[part][inner] = number(self._closure(part * PART + inner))
        table = np.full((len(rows) + total, 256), DEAD, np.int32)
        for row, ways in zip(table, rows, strict=False):
            for low, high, target in ways:
                row[low : high + 1] = target
        for part, place in copied.items():
            inside = self._parts[part - 1][0].table
            table[len(rows) + place :][: len(inside)] = np.append(places[part], DEAD)[inside]
        table = np.where(table < DEAD, len(rows) - 2 - table, table)
        if first:  # a state of a part, or one after it
            table = np.vstack((table[first if first >= 0 else len(rows) - 2 - first], table + (table != DEAD)))
            table[0] += table[0] != DEAD
        accepting = np.array([end in subset for subset in queue] + [False] * total, bool)
        return table.astype(np.int32), np.append([False], accepting) if first else accepting

    def _part(self, automaton: Automaton, ends: frozenset[int]) -> int:
        """The first state of a linked automaton before some states."""
        key = id(automaton), ends
        if key not in self._part_numbers:
            self._parts.append((automaton, ends))
            self._part_numbers[key] = len(self._parts)
        return self._part_numbers[key] * PART

    def _following(self, subset: frozenset[int]) -> Iterator[tuple[int, int, frozenset[int]]]:
        """The sets of states that follow, each with the bytes that lead there."""
        ways = [way for state in subset for way in self._ways(state)]
        if all(one[1] < other[0] for one, other in pairwise(ways)):  # as most are
            yield from ((low, high, self._after(frozenset((target,)))) for low, high, target in ways)
            return
        cuts = sorted({cut for low, high, _ in ways for cut in (low, high + 1)})
        index = {cut: place for place, cut in enumerate(cuts)}
        reached: list[set[int]] = [set() for _ in cuts]
        for low, high, target in ways:
            for targets in reached[index[low] : index[high + 1]]:
                targets.add(target)
        for place, states in enumerate(map(frozenset, reached)):
            if states:
                yield cuts[place], cuts[place + 1] - 1, self._after(states)

    def _after(self, states: frozenset[int]) -> frozenset[int]:
        """The states that empty moves reach from any of these."""
        if len(states) == 1:
            return self._closure(*states)
        if states not in self._unions:
            self._unions[states] = self._joined(frozenset().union(*map(self._closure, states)))
        return self._unions[states]

    def _ways(self, state: int) -> list[tuple[int, int, int]]:
        """The moves of a state, those inside of parts included."""
        if state < PART:
            return self.moves[state]
        part, inner = divmod(state, PART)
        return [(low, high, part * PART + to) for low, high, to in self._parts[part - 1][0].moves(inner)]

    def _joined(self, states: frozenset[int]) -> frozenset[int]:
        """The same states, but one for all that are in the same state of one automaton before different states."""
        inside: dict[tuple[int, int], list[int]] = {}
        for state in states:
            if state >= PART:
                inside.setdefault((id(self._parts[state // PART - 1][0]), state % PART), []).append(state)
        for several in inside.values():
            if len(several) > 1:
                parts = [self._parts[state // PART - 1] for state in several]
                ends = frozenset[int]().union(*(ends for _, ends in parts))
                states = states.difference(several) | {self._part(parts[0][0], ends) + several[0] % PART}
        return states

    def _closure(self, state: int) -> frozenset[int]:
        """The states that empty moves reach, of which only those with moves of their own, or without any, are kept."""
        if state not in self._closures:
            seen, queue = {state}, [state]
            kept = set()
            for each in queue:
                if each < PART:
                    others, keeps = self.empty[each], bool(self.moves[each] or not self.empty[each])
                else:
                    automaton, ends = self._parts[each // PART - 1]
                    others = [*ends] if automaton.accepting[each % PART] else []
                    keeps = bool((automaton.table[each % PART] != DEAD).any())
                kept |= {each} if keeps else set()
                new = [other for other in others if other not in seen]
                seen.update(new)
                queue += new
            self._closures[state] = self._joined(frozenset(kept))
        return self._closures[state]
