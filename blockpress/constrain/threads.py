"""The threads of a nondeterministic automaton with conditions, and the sets of them.

    thread  (state, what the rest of the text must be besides, as states of the automata of `Ahead`)

Invariant: it ends within a number of threads, the same on every machine, or says that it would not.
Run it:  python -m pytest tests/constrain/test_regex.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int32

from blockpress.constrain.automaton import DEAD, MAX_STATES, Ahead, Automaton, Behind, check_size, rerooted
from blockpress.constrain.nondeterministic import Builder

Held = frozenset[int]
Thread = tuple[int, Held]
Places = tuple[int, ...]
"""The states of the automata of `Behind` after the text so far."""


class Threads:
    """The ways through what a builder has made, which must be complete."""

    def __init__(self, builder: Builder) -> None:
        self._builder, self.work = builder, builder.work
        conditions = [*dict.fromkeys(condition.automaton for condition in builder.conditions.values())]
        self.index, self._class_of = builder.classes(conditions)
        """The class of bytes that begins at each cut between them."""
        self._behind = [
            *dict.fromkeys(each.automaton for each in builder.conditions.values() if isinstance(each, Behind))
        ]
        self._ahead: list[tuple[Automaton, int]] = []
        self._first_held: dict[Automaton, int] = {}
        self._steps_of: dict[Thread, list[tuple[int, int, int, Held]]] = {}
        self._places: dict[Places, list[Places]] = {}
        self._closures: dict[tuple[Thread, Places], tuple[Thread, ...]] = {}

    def determinize(
        self, start: int, end: int, threads: Iterable[Thread] = (), places: Places | None = None
    ) -> tuple[Int32[np.ndarray, "states 256"], Bool[np.ndarray, " states"]]:
        """Subset construction over classes of bytes that no move tells apart.

        threads, places: from where, in place of the start of a text.
        """
        places = self.places if places is None else places
        first = frozenset(threads) or frozenset(self.closure((start, frozenset()), places)), places
        numbers, queue = {first: 0}, [first]
        known: dict[tuple[frozenset[Thread], Places], int] = {}
        rows: list[list[int]] = []
        for subset, places in queue:
            self.work.spend(len(subset))
            following: dict[int, set[Thread]] = {}
            for thread in subset:
                for low, high, target, held in self.steps(thread):
                    for each in range(self.index[low], self.index[high + 1]):
                        following.setdefault(each, set()).add((target, held))
            row = [DEAD] * (len(self.index) - 1)
            for each, targets in following.items():
                raw = frozenset(targets), self.move_places(places, each)
                if raw not in known:
                    key = self._pruned({near for thread in targets for near in self.closure(thread, raw[1])}), raw[1]
                    if key not in numbers:
                        numbers[key] = len(queue)
                        queue.append(key)
                        check_size(len(queue), MAX_STATES)
                    known[raw] = numbers[key]
                row[each] = known[raw]
            rows.append(row)
        accepting = [any(state == end and self.holds(held) for state, held in subset) for subset, _ in queue]
        return np.array(rows, np.int32)[:, self._class_of], np.array(accepting)

    @property
    def places(self) -> Places:
        """Of the empty text."""
        return (0,) * len(self._behind)

    def move_places(self, places: Places, byte: int) -> Places:
        """After one more byte, given by its class."""
        if not places:
            return places
        if places not in self._places:
            first = [*self.index][:-1]
            rows = [
                automaton.table[place][first] if place != DEAD else np.full(len(first), DEAD)
                for automaton, place in zip(self._behind, places, strict=True)
            ]
            self._places[places] = [*map(tuple, np.stack(rows, axis=1).tolist())]
        return self._places[places][byte]

    def steps(self, thread: Thread) -> list[tuple[int, int, int, Held]]:
        """The moves of a thread as (low, high, state, held)."""
        if thread not in self._steps_of:
            state, held = thread
            steps = [(low, high, target, frozenset[int]()) for low, high, target in self._builder.moves[state]]
            for number in held:
                automaton, at = self._ahead[number]
                steps = [
                    (max(low, first), min(high, last), target, so_far | self.held(automaton, to))
                    for low, high, target, so_far in steps
                    for first, last, to in automaton.moves(at)
                    if first <= high and low <= last
                ]
            self._steps_of[thread] = steps
        return self._steps_of[thread]

    def held(self, automaton: Automaton, state: int = 0) -> Held:
        """That the automaton, in a state, allows the rest; nothing if it allows any."""
        if automaton.accepting[state] and (automaton.table[state] == state).all():
            return frozenset()
        if automaton not in self._first_held:
            self._first_held[automaton] = len(self._ahead)
            self._ahead += [(automaton, each) for each in range(len(automaton))]
        return frozenset((self._first_held[automaton] + state,))

    def holds(self, held: Held) -> bool:
        """Whether the text may end."""
        return all(self._ahead[number][0].accepting[self._ahead[number][1]] for number in held)

    def automata(self, held: Held) -> Iterator[Automaton]:
        """What is held, as automata that start there."""
        for number in sorted(held):
            yield rerooted(*self._ahead[number])

    def closure(self, thread: Thread, places: Places) -> tuple[Thread, ...]:
        """The threads that empty moves reach, in the order in which `re` tries them.

        Of the states only those with moves of their own, or without any, are kept.
        """
        known = self._closures.get((thread, places))
        if known is not None:
            return known
        found: dict[Thread, bool] = {}
        stack = [thread]
        while stack:
            state, held = each = stack.pop()
            if each in found:
                continue
            found[each] = bool(self._builder.moves[state] or not self._builder.empty[state])
            condition = self._builder.conditions.get(state)
            if isinstance(condition, Ahead):
                held = held | self.held(condition.automaton)
            elif isinstance(condition, Behind):
                place = places[self._behind.index(condition.automaton)]
                if place == DEAD or not condition.automaton.accepting[place]:
                    continue
            stack += [(other, held) for other in reversed(self._builder.empty[state])]
        result = tuple(each for each, kept in found.items() if kept)
        self._closures[thread, places] = result
        return result

    def _pruned(self, threads: set[Thread]) -> frozenset[Thread]:
        """Without threads for which another asks for less of the rest."""
        if not any(held for _, held in threads):
            return frozenset(threads)
        by_state: dict[int, list[Held]] = {}
        for state, held in threads:
            by_state.setdefault(state, []).append(held)
        return frozenset((state, held) for state, held in threads if not any(other < held for other in by_state[state]))
