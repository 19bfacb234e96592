r"""What must stand around a place in a text: look-ahead and look-behind, word boundaries, the first match of `re`.

    \bfoo\b     Behind(no word character), Ahead(a word character), "foo", Behind(...), Ahead(...)
    a*?b        "b", "ab", ..., and behind each: Ahead(whatever `re`, which takes the first match that it finds, allows)

Invariant: a condition is about the whole text, before or after; what is inside another one is told what stands before.
Run it:  python -m pytest tests/constrain/test_regex.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, reduce

import numpy as np

from blockpress.constrain.automaton import (
    ANY_BYTES,
    ANY_CHAR,
    DEAD,
    EMPTY_TEXT,
    MAX_STATES,
    NOTHING,
    Ahead,
    Automaton,
    Behind,
    Bytes,
    Concat,
    Expression,
    Graph,
    Repeat,
    Union,
    _NothingMatches,
    check_size,
    difference,
    intersection,
    minimal,
    rerooted,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.nondeterministic import Builder, Work
from blockpress.constrain.threads import Held, Places, Thread, Threads

ANY_TEXT = Repeat(ANY_CHAR, 0, None)


def ahead(part: Expression, wanted: bool = True) -> Expression:
    """Nothing, where a text of `part` follows, or, if it is not `wanted`, where none does."""
    return in_context(part, lambda inside: _condition(Ahead, Concat((inside, ANY_BYTES)), wanted))


def behind(part: Expression, wanted: bool = True) -> Expression:
    """Nothing, where a text of `part` stands before, or, if it is not `wanted`, where none does."""
    return _condition(Behind, Concat((ANY_TEXT, part)), wanted)


def ends(part: Expression) -> Expression:
    """Nothing, where the rest of the text is one of `part`."""
    return _condition(Ahead, part, True)


def begins() -> Expression:
    """Nothing, at the start of the text."""
    return _condition(Behind, EMPTY_TEXT, True)


@lru_cache(maxsize=256)
def _condition(kind: type[Ahead] | type[Behind], part: Expression, wanted: bool) -> Expression:
    try:
        automaton = compile_expression(part)
    except _NothingMatches:
        return NOTHING if wanted else EMPTY_TEXT
    try:
        return kind(automaton if wanted else difference(ANY_BYTES, automaton))
    except _NothingMatches:
        return NOTHING


def in_context(expression: Expression, make: Callable[[Expression], Expression]) -> Expression:
    """What `make` makes of an expression that is compiled apart from what stands before it.

    If the expression looks behind, for each state in which the text before may leave its conditions.
    """
    automata = [*dict.fromkeys(condition.automaton for condition in _conditions(expression, Behind))]
    if not automata:
        return make(expression)
    parts = []
    for states, guard in _contexts(tuple(automata)):
        known = {
            automaton: NOTHING if state == DEAD else Behind(rerooted(automaton, state))
            for automaton, state in zip(automata, states, strict=True)
        }
        parts.append(Concat((Behind(guard), make(_replaced(expression, known)))))
    return Union(tuple(parts))


@lru_cache(maxsize=64)
def _contexts(automata: tuple[Automaton, ...]) -> list[tuple[Places, Automaton]]:
    """The states in which whole characters leave several automata together, each with the texts that do."""
    parts = [compile_expression(ANY_TEXT), *automata]
    queue: list[Places] = [(0,) * len(parts)]
    numbers, rows = {queue[0]: 0}, []
    for places in queue:
        columns = [part.table[at] if at != DEAD else np.full(256, DEAD) for part, at in zip(parts, places, strict=True)]
        row = []
        for following in map(tuple, np.stack(columns, axis=1).tolist()):
            if following[0] != DEAD and following not in numbers:
                numbers[following] = len(queue)
                queue.append(following)
                check_size(len(queue), MAX_STATES)
            row.append(numbers.get(following, DEAD))
        rows.append(row)
    table = np.array(rows, np.int32)
    return [
        (places[1:], minimal(table, np.arange(len(queue)) == number))
        for number, places in enumerate(queue)
        if parts[0].accepting[places[0]]
    ]


def _conditions(expression: Expression, kind: type[Ahead] | type[Behind]) -> Iterator[Ahead | Behind]:
    match expression:
        case Ahead() | Behind():
            if isinstance(expression, kind):
                yield expression
        case Concat(parts) | Union(parts):
            for part in parts:
                yield from _conditions(part, kind)
        case Repeat(part):
            yield from _conditions(part, kind)
        case Graph(edges):
            for _, part, _ in edges:
                yield from _conditions(part, kind)


def looks(expression: Expression) -> tuple[bool, bool]:
    """Whether an expression has conditions on the text behind, and on the text ahead."""
    return any(_conditions(expression, Behind)), any(_conditions(expression, Ahead))


def _replaced(expression: Expression, known: Mapping[Automaton, Expression]) -> Expression:
    match expression:
        case Behind(automaton):
            return known[automaton]
        case Concat(parts):
            return Concat(tuple(_replaced(part, known) for part in parts))
        case Union(parts):
            return Union(tuple(_replaced(part, known) for part in parts))
        case Repeat(part, low, high, lazy):
            return Repeat(_replaced(part, known), low, high, lazy)
        case Graph(edges):
            return Graph(tuple((source, _replaced(part, known), target) for source, part, target in edges))
    return expression


def first_match(expression: Expression) -> Expression:
    """Of the texts of an expression, at each place, the one that `re.match` takes, which depends on what follows.

    This is what an atomic group is, and a terminal of a grammar.
    """
    return in_context(expression, lambda inside: _FirstMatch(inside).graph())


class _FirstMatch:
    """Threads in the order in which `re` would try them; those after one that has matched are dropped.

    Wherever a thread matches, it is the match if none before it comes to match later.
    """

    def __init__(self, expression: Expression) -> None:
        builder = Builder(Work())
        self._start, end, self._tail = (builder.state() for _ in range(3))
        builder.add(expression, self._start, end)
        builder.add(EMPTY_TEXT, end, self._tail)
        builder.move(self._tail, 0, 255, self._tail)
        self._threads = Threads(builder)
        self._opposites: dict[Held, Held | None] = {}
        self._failing: dict[tuple[tuple[Thread, ...], Places], Expression] = {}

    def graph(self) -> Graph:
        """One node for each list of threads; exits to node 1 are under their conditions."""
        ways, index = self._threads, self._threads.index
        cuts = [*index]
        first = self._cut(ways.closure((self._start, frozenset()), ways.places)), ways.places
        numbers, queue = {first: 2}, [first]
        edges: list[tuple[int, Expression, int]] = [(0, EMPTY_TEXT, 2)]  # other ways may leave node 0
        for threads, places in queue:
            ways.work.spend(len(threads))
            node = numbers[threads, places]
            following: dict[int, dict[Thread, None]] = {}
            for rank, (state, held) in enumerate(threads):
                if state == self._tail:
                    edges.append((node, self._exit(threads[:rank], held, places), 1))
                    continue
                for low, high, target, kept in ways.steps((state, held)):
                    for each in range(index[low], index[high + 1]):
                        following.setdefault(each, {}).setdefault((target, kept))
            for each, raw in following.items():
                after = ways.move_places(places, each)
                near = dict.fromkeys(thread for one in raw for thread in ways.closure(one, after))
                key = self._cut(tuple(near)), after
                if key not in numbers:
                    numbers[key] = len(queue) + 2
                    queue.append(key)
                    check_size(len(queue), MAX_STATES)
                edges.append((node, Bytes(cuts[each], cuts[each + 1] - 1), numbers[key]))
        return Graph(tuple(edges))

    def _cut(self, threads: tuple[Thread, ...]) -> tuple[Thread, ...]:
        """Without what cannot be the match any more; behind a match under a condition only if this one fails."""
        kept: dict[Thread, None] = {}
        failed: Held = frozenset()
        for state, held in threads:
            if any(other == state and less <= held | failed for other, less in kept):
                continue
            kept[state, held | failed] = None
            if state == self._tail:
                unmet = self._unmet(held)
                if unmet is None:
                    break
                failed = failed | unmet
        return tuple(kept)

    def _unmet(self, held: Held) -> Held | None:
        """That the rest is not what is held; None: it always is."""
        if held not in self._opposites:
            try:
                opposite = difference(ANY_BYTES, reduce(intersection, self._threads.automata(held), ANY_BYTES))
                self._opposites[held] = self._threads.held(opposite)
            except _NothingMatches:
                self._opposites[held] = None
        return self._opposites[held]

    def _exit(self, before: tuple[Thread, ...], held: Held, places: Places) -> Expression:
        rest = tuple(thread for thread in before if thread[0] != self._tail)
        if (rest, places) not in self._failing:
            condition: Expression = EMPTY_TEXT
            if rest:
                try:
                    later = minimal(*self._threads.determinize(self._start, self._tail, rest, places))
                    condition = NOTHING
                    condition = Ahead(difference(ANY_BYTES, later))
                except _NothingMatches:
                    pass
            self._failing[rest, places] = condition
        return Concat((*map(Ahead, self._threads.automata(held)), self._failing[rest, places]))
