"""Deterministic automata over the bytes of UTF-8 text, and the expressions that they are built from.

    expression     Concat(Chars("a"), Repeat(Chars("0-9"), 1, None))
    automaton      table[state, byte] = next state, or DEAD        accepting[state]: the text may end here

Invariant: state 0 is the start; every state is reached by some text and can still become accepting, so a text is a
beginning of an allowed one exactly if it never meets DEAD. No two states accept the same continuations.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """The part `low` to `high` times; None: without a limit."""

    part: Expression
    low: int
    high: int | None


@dataclass(frozen=True)
class Graph:
    """Ways from node 0 to node 1 along edges (from, part, to); for what would repeat a part in an expression."""

    edges: tuple[tuple[int, Expression, int], ...]


@dataclass(frozen=True, eq=False)
class Automaton:
    """A minimal automaton; itself an expression."""

    table: Int32[np.ndarray, "states 256"]
    accepting: Bool[np.ndarray, " states"]

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


Expression = Chars | Bytes | Concat | Union | Repeat | Graph | Automaton
EMPTY_TEXT = Concat(())
ANY_CHAR = Chars(((0, 0x10FFFF),))


class _NothingMatches(Exception):
    """No text at all is allowed."""


def literal(text: str) -> Expression:
    """Exactly this text."""
    return Concat(tuple(Chars(((ord(char), ord(char)),)) for char in text))


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
    found: dict[int, int] = {0: 0}
    rows: list[Int32[np.ndarray, " 256"]] = []
    queue = [0]
    for pair in queue:
        a, b = divmod(pair, width)
        next_a, next_b = left.table[a].astype(np.int64), right.table[b]
        pairs = np.where((next_a == DEAD) | (next_b == DEAD), DEAD, next_a * width + next_b)
        for new in np.unique(pairs).tolist():
            if new != DEAD and new not in found:
                found[new] = len(queue)
                queue.append(new)
                check_size(len(queue), MAX_STATES)
        rows.append(_renumber(pairs, found))
    states = np.array(queue)
    return minimal(np.stack(rows), accept(left.accepting[states // width], right.accepting[states % width]))


def _renumber(values: Ints, numbers: Mapping[int, int]) -> Int32[np.ndarray, " _"]:
    unique, inverse = np.unique(values, return_inverse=True)
    return np.array([numbers.get(value, DEAD) for value in unique.tolist()], np.int32)[inverse]


def check_size(count: int, most: int) -> None:
    """Raises RequestError: an automaton has more states than it may."""
    if count > most:
        raise RequestError(
            f"the shape needs more than {most} states", hint="make repetitions shorter, or nest fewer of them"
        )


def minimal(table: Int32[np.ndarray, "states 256"], accepting: Bool[np.ndarray, " states"]) -> Automaton:
    """The minimal automaton that allows the same; state 0 is the start of both.

    Raises:
        _NothingMatches: no accepting state can be reached.
    """
    keep = _useful(table, accepting)
    if not keep[0]:
        raise _NothingMatches
    numbers = np.where(keep, np.cumsum(keep) - 1, DEAD).astype(np.int32)
    table = np.where(table[keep] == DEAD, DEAD, numbers[table[keep]])
    accepting = accepting[keep]
    columns, column_of = np.unique(table, axis=1, return_inverse=True)
    weights = np.random.default_rng(0).integers(1, 2**63, columns.shape[1] + 1, dtype=np.uint64)
    block, count = accepting.astype(np.int64), 0
    while True:  # states are alike if their block and the blocks that follow are; the hash stands for both
        following = np.append(block + 1, 0)[columns].astype(np.uint64)
        signature = following @ weights[:-1] + block.astype(np.uint64) * weights[-1]
        _, first, block = np.unique(signature, return_index=True, return_inverse=True)
        if len(first) == count:
            break
        count = len(first)
    order = np.argsort(first)  # the start stays first
    rank = np.empty_like(order)
    rank[order] = np.arange(count)
    block, first = rank[block], first[order]
    merged = np.append(block, DEAD)[columns[first]].astype(np.int32)
    return Automaton(np.ascontiguousarray(merged[:, column_of.ravel()]), accepting[first])


def _useful(
    table: Int32[np.ndarray, "states 256"], accepting: Bool[np.ndarray, " states"]
) -> Bool[np.ndarray, " states"]:
    """States on a way from the start to an accepting one."""
    source, byte = np.nonzero(table != DEAD)
    pairs = np.unique(source * len(table) + table[source, byte])
    source, target = np.divmod(pairs, len(table))
    start = np.zeros(len(table), bool)
    start[0] = True
    return _spread(start, source, target) & _spread(accepting, target, source)


def _spread(reached: Flags, source: Ints, target: Ints) -> Flags:
    """Everything that edges lead to from `reached`."""
    order = np.argsort(source, kind="stable")
    source, target = source[order], target[order]
    starts, ends = (np.searchsorted(source, np.arange(len(reached)), side=side) for side in ("left", "right"))
    reached, queue = reached.copy(), np.nonzero(reached)[0].tolist()
    while queue:
        state = queue.pop()
        for other in target[starts[state] : ends[state]].tolist():
            if not reached[other]:
                reached[other] = True
                queue.append(other)
    return reached


@lru_cache(maxsize=512)
def byte_ranges(automaton: Automaton) -> list[list[tuple[int, int, int]]]:
    """For each state its moves as (low, high, target), whole ranges of bytes."""
    rows: list[list[tuple[int, int, int]]] = []
    for row in automaton.table:
        cuts = np.concatenate(([0], np.nonzero(np.diff(row))[0] + 1, [256]))
        targets = row[cuts[:-1]].tolist()
        ends = cuts.tolist()
        rows.append([(ends[i], ends[i + 1] - 1, t) for i, t in enumerate(targets) if t != DEAD])
    return rows
