"""From an expression to its minimal automaton: a nondeterministic one, then sets of its states or of its threads.

Invariant: it ends within a number of states and of seconds, or says that it would not.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from blockpress.constrain.automaton import (
    DEAD,
    MAX_STATES,
    Automaton,
    Expression,
    Linked,
    check_size,
    minimal,
    trimmed,
)
from blockpress.constrain.nondeterministic import MAX_SECONDS, Builder
from blockpress.constrain.threads import Threads


def compile_expression(expression: Expression, deadline: float | None = None) -> Automaton:
    """The minimal automaton of an expression.

    Args:
        deadline: by `time.thread_time`; None: `MAX_SECONDS` from now.

    Raises:
        RequestError: it needs too many states or too much time. _NothingMatches: no text is allowed.
    """
    if isinstance(expression, Automaton | Linked):
        return expression if isinstance(expression, Automaton) else expression.automaton
    for linking in (True, False):
        limit = time.thread_time() + MAX_SECONDS if deadline is None else deadline
        builder = Builder(limit, linking=linking)
        start, end = builder.state(), builder.state()
        builder.add(expression, start, end)
        if builder.conditions and builder.linked:
            continue  # a condition asks for what is inside of a part, too
        skeleton = minimal(*(Threads(builder) if builder.conditions else builder).determinize(start, end))
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
