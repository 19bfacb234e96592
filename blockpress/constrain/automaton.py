"""Deterministic automata over the bytes of UTF-8 text, and the expressions that they are built from.

    expression     Concat(Chars("a"), Repeat(Chars("0-9"), 1, None))
    automaton      table[state, byte] = next state, or DEAD        accepting[state]: the text may end here

Invariant: state 0 is the start; every state is reached by some text and can still become accepting, so a text is a
beginning of an allowed one exactly if it never meets DEAD. No two states accept the same continuations.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int, Int32

from blockpress.errors import RequestError

Ints = Int[np.ndarray, " _"]
Flags = Bool[np.ndarray, " _"]

DEAD = -1
MAX_STATES = 20_000
"""Most states of an automaton."""


@dataclass(frozen=True)
class Chars:
    """One character of these inclusive ranges of code points. Surrogates never match."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bytes:
    """One byte from low to high."""

    low: int
    high: int


@dataclass(frozen=True)
class Concat:
    """One part after the other; without parts the empty text."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Union:
    """One of the parts; without parts nothing matches."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Repeat:
    """The part `low` to `high` times; None: without a limit. lazy: fewer times are tried first, for `first_match`."""

    part: Expression
    low: int
    high: int | None
    lazy: bool = False


@dataclass(frozen=True)
class Graph:
    """Ways from node 0 to node 1 along edges (from, part, to); for what would repeat a part in an expression."""

    edges: tuple[tuple[int, Expression, int], ...]


@dataclass(frozen=True, eq=False)
class Linked:
    """An automaton in an expression that is copied as it stands where no other way leads through it at once."""

    automaton: Automaton


@dataclass(frozen=True, eq=False)
class Automaton:
    """A minimal automaton; itself an expression."""

    table: Int32[np.ndarray, "states 256"]
    accepting: Bool[np.ndarray, " states"]
    _moves: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.table)

    def matches(self, text: str | bytes) -> bool:
        """Whether the whole text is allowed.

        >>> from blockpress.constrain.compiler import compile_expression
        >>> compile_expression(literal("añ")).matches("añ")
        True
        """
        state = self.run(text)
        return state != DEAD and bool(self.accepting[state])

    def run(self, text: str | bytes, state: int = 0) -> int:
        """The state after a text, or DEAD."""
        for byte in text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text:
            if state == DEAD:
                return DEAD
            state = int(self.table[state, byte])
        return state

    def moves(self, state: int) -> list[tuple[int, int, int]]:
        """The moves of a state as (low, high, target)."""
        if state not in self._moves:
            row = self.table[state]
            cuts = np.flatnonzero(np.append(True, row[1:] != row[:-1]))
            targets, ends = row[cuts].tolist(), [*cuts.tolist(), 256]
            self._moves[state] = [(ends[i], ends[i + 1] - 1, to) for i, to in enumerate(targets) if to != DEAD]
        return self._moves[state]

    def texts(self, most: int) -> list[str] | None:
        """All allowed texts; None if they are more than `most`."""
        found: list[str] = []
        stack = [(0, b"")]
        while stack:
            state, text = stack.pop()
            if self.accepting[state]:
                found.append(text.decode())
            if len(found) > most or len(text) > len(self):  # a longer text has been in one state twice
                return None
            stack += [(int(to), text + bytes([byte])) for byte, to in enumerate(self.table[state]) if to != DEAD]
        return found


@dataclass(frozen=True)
class Ahead:
    """Nothing, where the automaton allows the whole rest of the text."""

    automaton: Automaton


@dataclass(frozen=True)
class Behind:
    """Nothing, where the automaton allows the whole text before."""

    automaton: Automaton


Expression = Chars | Bytes | Concat | Union | Repeat | Graph | Linked | Automaton | Ahead | Behind
EMPTY_TEXT = Concat(())
NOTHING = Union(())
ANY_CHAR = Chars(((0, 0x10FFFF),))
ANY_BYTES = Automaton(np.zeros((1, 256), np.int32), np.ones(1, bool))


class _NothingMatches(Exception):
    """No text at all is allowed."""


class _TooLarge(RequestError):
    """An automaton would have more states than it may."""


def literal(text: str) -> Expression:
    """Exactly this text."""
    try:
        return Concat(tuple(Bytes(byte, byte) for byte in text.encode()))
    except UnicodeEncodeError:
        return Union(())  # a surrogate, which no UTF-8 has


def optional(part: Expression) -> Expression:
    """The part or nothing."""
    return Union((part, EMPTY_TEXT))


def intersection(left: Automaton, right: Automaton) -> Automaton:
    """The texts that both allow.

    Raises:
        RequestError: too many states. _NothingMatches: no text is allowed by both.
    """
    return _product(left, right, lambda a, b: a & b)


def difference(left: Automaton, right: Automaton) -> Automaton:
    """The texts that `left` allows and `right` does not. Raises as `intersection`."""
    sink = len(right)
    table = np.vstack((np.where(right.table == DEAD, sink, right.table), np.full((1, 256), sink, np.int32)))
    return _product(left, Automaton(table, np.append(right.accepting, False)), lambda a, b: a & ~b)


def _product(left: Automaton, right: Automaton, accept: Callable[[Flags, Flags], Flags]) -> Automaton:
    width = len(right)
    columns, column_of = np.unique(np.vstack((left.table, right.table)), axis=1, return_inverse=True)
    ways_left, ways_right = columns[: len(left)].tolist(), columns[len(left) :].tolist()
    found: dict[int, int] = {0: 0}
    rows: list[list[int]] = []
    queue = [0]
    for pair in queue:
        a, b = divmod(pair, width)
        row = []
        for next_a, next_b in zip(ways_left[a], ways_right[b], strict=True):
            new = DEAD if next_a == DEAD or next_b == DEAD else next_a * width + next_b
            if new != DEAD and new not in found:
                found[new] = len(queue)
                queue.append(new)
                check_size(len(queue), MAX_STATES)
            row.append(found.get(new, DEAD))
        rows.append(row)
    states = np.array(queue)
    table = np.array(rows, np.int32)[:, column_of.ravel()]
    return minimal(table, accept(left.accepting[states // width], right.accepting[states % width]))


def check_size(count: int, most: int) -> None:
    """Raises RequestError: an automaton has more states than it may."""
    if count > most:
        raise _TooLarge(
            f"the shape needs more than {most} states", hint="make repetitions shorter, or nest fewer of them"
        )


@lru_cache(maxsize=512)
def rerooted(automaton: Automaton, state: int) -> Automaton:
    """What may follow from a state."""
    order = np.arange(len(automaton))
    order[[0, state]] = state, 0
    numbers = np.append(order, DEAD).astype(np.int32)  # a swap is its own inverse
    return minimal(numbers[automaton.table[order]], automaton.accepting[order])


def minimal(table: Int32[np.ndarray, "states 256"], accepting: Bool[np.ndarray, " states"]) -> Automaton:
    """The minimal automaton that allows the same; state 0 is the start of both.

    Raises:
        _NothingMatches: no accepting state can be reached.
    """
    cuts = np.append(0, np.flatnonzero((table[:, 1:] != table[:, :-1]).any(0)) + 1)  # of columns that are alike, one
    widths = np.diff(np.append(cuts, table.shape[1]))
    table = table[:, cuts]
    keep, kinds = _useful(table, accepting)  # those on a way to an end; numbers that only differ where states do
    if not keep[0]:
        raise _NothingMatches
    numbers = np.where(keep, np.cumsum(keep) - 1, DEAD)
    table, accepting, kinds = np.append(numbers, DEAD)[table[keep]], accepting[keep], kinds[keep]
    _, first, block = np.unique(_alike(table, kinds), return_index=True, return_inverse=True)
    order = np.argsort(first)  # the start stays first
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    merged = np.append(rank[block], DEAD)[table[first[order]]].astype(np.int32)
    return Automaton(np.repeat(merged, widths, axis=1), accepting[first[order]])


def _alike(table: Int32[np.ndarray, "states symbols"], kinds: Ints) -> Ints:
    """A number for each state, the same for those from which the same may follow.

    States are alike if their kinds are and what follows is; a hash stands for what follows. A state is looked at again
    only after one that follows has got a new number.
    """
    random, total, block = np.random.default_rng(0), len(table), np.unique(kinds, return_inverse=True)[1]
    hashes = np.append(random.integers(1, 2**63, total, dtype=np.uint64), np.uint64(0))
    weights = random.integers(1, 2**63, (table.shape[1],), dtype=np.uint64)
    source, column = np.nonzero(table != DEAD)
    order = np.argsort(table[source, column], kind="stable")
    starts = np.searchsorted(table[source, column][order], np.arange(total + 1))
    source, weight = source[order], weights[column[order]]
    signature = hashes[np.append(block, DEAD)[table]] @ weights
    sizes, count = np.bincount(block, minlength=total), int(block.max()) + 1
    common = np.zeros(total, np.uint64)  # the signature of those in a block that have not changed
    changed = np.arange(total)
    while len(changed):
        changed = changed[np.lexsort((signature[changed], block[changed]))]
        blocks, signs = block[changed], signature[changed]
        first = np.flatnonzero(np.append(True, (np.diff(blocks) != 0) | (signs[1:] != signs[:-1])))
        blocks, signs, lengths = blocks[first], signs[first], np.diff(np.append(first, len(changed)))
        stays = signs == common[blocks]
        largest = np.lexsort((-lengths, blocks))
        largest = largest[np.append(True, np.diff(blocks[largest]) != 0)]
        gone = (np.bincount(blocks, lengths, total) == sizes) & (np.bincount(blocks, stays, total) == 0)
        largest = largest[gone[blocks[largest]]]  # keeps the number of a block whose states have all changed
        common[blocks[largest]], stays[largest] = signs[largest], True
        new = count + np.arange(len(first) - stays.sum())
        count += len(new)
        np.subtract.at(sizes, blocks[~stays], lengths[~stays])
        common[new], sizes[new] = signs[~stays], lengths[~stays]
        moved, number = changed[np.repeat(~stays, lengths)], np.repeat(new, lengths[~stays])
        delta = hashes[number] - hashes[block[moved]]
        block[moved] = number
        uses = starts[moved + 1] - starts[moved]
        edges = np.repeat(starts[moved] - np.cumsum(uses) + uses, uses) + np.arange(uses.sum())
        np.add.at(signature, source[edges], weight[edges] * np.repeat(delta, uses))
        changed = np.unique(source[edges])
    return block


def _useful(
    table: Int32[np.ndarray, "states 256"], accepting: Bool[np.ndarray, " states"]
) -> tuple[Bool[np.ndarray, " states"], Int[np.ndarray, " states"]]:
    """States on a way from the start to an accepting one, and a number for the lengths of their shortest and longest
    continuations."""
    source, byte = np.nonzero(table != DEAD)
    pairs = np.unique(source * len(table) + table[source, byte])
    source, target = np.divmod(pairs, len(table))
    start = np.zeros(len(table), bool)
    start[0] = True
    shortest = _spread(accepting, target, source)
    keep = (_spread(start, source, target) >= 0) & (shortest >= 0)
    inside = keep[source] & keep[target]
    longest = _longest(len(table), source[inside], target[inside])
    return keep, shortest * (len(table) + 1) + longest


def _spread(reached: Flags, source: Ints, target: Ints) -> Ints:
    """How many edges lead to each state from the nearest that is `reached`; -1: none do."""
    following, starts = _adjacent(len(reached), source, target)
    distance, queue = np.where(reached, 0, -1).tolist(), np.nonzero(reached)[0].tolist()
    for state in queue:
        for other in following[starts[state] : starts[state + 1]]:
            if distance[other] < 0:
                distance[other] = distance[state] + 1
                queue.append(other)
    return np.array(distance, np.int64)


def _longest(states: int, source: Ints, target: Ints) -> Ints:
    """The length of the longest way from each state; the number of states where there is no longest."""
    before, starts = _adjacent(states, target, source)
    open_ways = np.bincount(source, minlength=states).tolist()
    longest, queue = [states] * states, [state for state, ways in enumerate(open_ways) if not ways]
    length = [0] * states
    for state in queue:
        longest[state] = length[state]
        for other in before[starts[state] : starts[state + 1]]:
            length[other] = max(length[other], length[state] + 1)
            open_ways[other] -= 1
            if not open_ways[other]:
                queue.append(other)
    return np.array(longest, np.int64)


def _adjacent(states: int, source: Ints, target: Ints) -> tuple[list[int], list[int]]:
    """The targets of edges, source by source, and where each source's begin."""
    order = np.argsort(source, kind="stable")
    return target[order].tolist(), np.searchsorted(source[order], np.arange(states + 1)).tolist()


def byte_ranges(automaton: Automaton) -> list[list[tuple[int, int, int]]]:
    """For each state its moves as (low, high, target), whole ranges of bytes."""
    return [automaton.moves(state) for state in range(len(automaton))]
