"""From an expression to its minimal automaton: a nondeterministic one, then sets of its states.

Invariant: it ends within a number of states and of seconds, or says that it would not.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
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
    Linked,
    Repeat,
    Union,
    byte_ranges,
    check_size,
    minimal,
    trimmed,
)
from blockpress.errors import RequestError

MAX_POSITIONS = 200_000
"""Most states of the nondeterministic automaton."""
MAX_SECONDS = 10.0


def compile_expression(expression: Expression) -> Automaton:
    """The minimal automaton of an expression.

    Raises:
        RequestError: it needs too many states or too much time. _NothingMatches: no text is allowed.
    """
    if isinstance(expression, Automaton | Linked):
        return expression if isinstance(expression, Automaton) else expression.automaton
    for linking in (True, False):
        builder = _Builder(time.thread_time() + MAX_SECONDS, linking=linking)
        start, end = builder.state(), builder.state()
        builder.add(expression, start, end)
        skeleton = minimal(*builder.determinize(start, end))
        automaton = _link(skeleton, [*builder.linked.values()]) if builder.linked else skeleton
        if automaton is not None:
            check_size(len(automaton), MAX_STATES)
            return automaton
    raise AssertionError("without links nothing is in the way of another")


def _link(skeleton: Automaton, parts: Sequence[Automaton]) -> Automaton | None:
    """An automaton whose symbols from 256 on each stand for a text of a part, with these parts in their place.

    None: a byte may belong to two parts, or to a part and what follows it.
    """
    table = skeleton.table
    source, part = np.nonzero(table[:, 256:] != DEAD)
    uses = list(zip(source.tolist(), part.tolist(), table[source, part + 256].tolist(), strict=True))
    offsets: dict[tuple[int, int], int] = {}
    total = len(table)
    for _, number, target in uses:
        if (number, target) not in offsets:
            offsets[number, target] = total
            total += len(parts[number])
            check_size(total, 2 * MAX_STATES)
    rows = np.full((total, 256), DEAD, np.int32)
    rows[: len(table)] = table[:, :256]
    ends = np.append(skeleton.accepting, np.zeros(total - len(table), bool))
    inside_of = {use: _placed(parts[use[0]], offset, use[1]) for use, offset in offsets.items()}
    for state, number, target in uses:
        first = inside_of[number, target][0]
        if parts[number].accepting[0] or ((first != DEAD) & (rows[state] != DEAD)).any():
            return None
        rows[state] = np.where(first == DEAD, rows[state], first)
    for (number, target), offset in offsets.items():
        block, last = inside_of[number, target], parts[number].accepting
        if ((block[last] != DEAD) & (rows[target] != DEAD)).any():
            return None
        block[last] = np.where(block[last] == DEAD, rows[target], block[last])
        rows[offset : offset + len(block)] = block
        ends[offset : offset + len(block)] = last & skeleton.accepting[target]
    return trimmed(rows, ends)


def _placed(part: Automaton, offset: int, target: int) -> Int32[np.ndarray, "states 256"]:
    """A part's table at its place: a state in which it can only end is the one after it."""
    place = np.arange(offset, offset + len(part))
    place[part.accepting & (part.table == DEAD).all(1)] = target
    return np.where(part.table == DEAD, DEAD, place[part.table]).astype(np.int32)


def text_automaton(texts: Iterable[str]) -> Automaton:
    """The automaton of just these texts, built state by state in their order, each state minimal as soon as it is done.

    Source: Daciuk et al., Incremental construction of minimal acyclic finite-state automata (2000).

    Raises:
        RequestError: it has too many states. _NothingMatches: there are no texts.
    """
    words = sorted({text.encode() for text in texts})
    rows: list[tuple[dict[int, int], bool]] = []
    known: dict[tuple[tuple[tuple[int, int], ...], bool], int] = {}
    path: list[tuple[dict[int, int], bool]] = [({}, False)]  # the states of the last word, whose ways are still open

    def close(length: int) -> None:
        while len(path) > length + 1:
            moves, ends = path.pop()
            key = (tuple(moves.items()), ends)
            if key not in known:
                known[key] = len(rows)
                rows.append((moves, ends))
                check_size(len(rows), MAX_STATES)
            path[-1][0][before[len(path) - 1]] = known[key]

    before = b""
    for word in words:
        shared = next((i for i, (a, b) in enumerate(zip(before, word, strict=False)) if a != b), len(before))
        close(shared)
        path += [({}, False) for _ in range(len(word) - len(path) + 1)]
        path[-1] = (path[-1][0], True)
        before = word
    close(0)
    table = np.full((len(rows) + 1, 256), DEAD, np.int32)
    for state, (moves, _) in enumerate([path[0], *rows]):
        for byte, target in moves.items():
            table[state, byte] = target + 1
    return minimal(table, np.array([ends for _, ends in [path[0], *rows]]))


@lru_cache(maxsize=512)
def char_automaton(ranges: tuple[tuple[int, int], ...]) -> Automaton | None:
    """The automaton of one character of these ranges; None if UTF-8 can write none of them."""
    builder = _Builder(time.thread_time() + MAX_SECONDS, linking=False)
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
    if time.thread_time() > deadline:
        raise RequestError(
            f"the shape takes more than {MAX_SECONDS:.0f} seconds to compile",
            hint="make repetitions shorter, or nest fewer of them",
        )


class _Builder:
    """A nondeterministic automaton in the making: byte ranges and empty moves between numbered states."""

    def __init__(self, deadline: float, *, linking: bool) -> None:
        self._deadline, self._linking = deadline, linking
        self.linked: dict[int, Automaton] = {}
        """Automata that a move stands for: the first for the symbol 256, and so on."""
        self._symbols: dict[int, int] = {}
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
            case Linked(automaton) if self._linking:
                symbol = self._symbols.setdefault(id(automaton), 256 + len(self._symbols))
                self.linked[symbol] = automaton
                self.move(start, symbol, symbol, end)
            case Linked(automaton):
                self._embed(automaton, start, end)
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
        """One byte from low to high, or the symbol of a linked automaton."""
        self._moves[start].append((low, high, end))

    def determinize(
        self, start: int, end: int
    ) -> tuple[Int32[np.ndarray, "states symbols"], Bool[np.ndarray, " states"]]:
        """Subset construction over classes of bytes that no move tells apart."""
        symbols = 256 + len(self.linked)
        cuts = sorted(
            {0, 256, symbols} | {cut for moves in self._moves for low, high, _ in moves for cut in (low, high + 1)}
        )
        class_of = np.searchsorted(cuts, np.arange(symbols), side="right") - 1
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
