"""From an expression to its minimal automaton: a nondeterministic one, then sets of its states or of its threads.

Invariant: it ends within a number of states and of steps, the same everywhere, or says that it would not.
Run it:  python -m pytest tests/constrain/test_automaton.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from blockpress.constrain.automaton import (
    DEAD,
    MAX_STATES,
    Automaton,
    Expression,
    Linked,
    check_size,
    minimal,
)
from blockpress.constrain.nondeterministic import Builder, Work
from blockpress.constrain.threads import Threads


def compile_expression(expression: Expression, work: Work | None = None) -> Automaton:
    """The minimal automaton of an expression.

    Args:
        work: what is left of it; None: `MAX_WORK` of its own.

    Raises:
        RequestError: it needs too many states or too much work. _NothingMatches: no text is allowed.
    """
    if isinstance(expression, Automaton | Linked):
        return expression if isinstance(expression, Automaton) else expression.automaton
    builder, ends = _built(expression, work or Work(), linking=True)
    if builder.conditions:
        builder, ends = _built(expression, builder.work, linking=False)  # they ask for what is inside of a part, too
    automaton = minimal(*(Threads(builder) if builder.conditions else builder).determinize(*ends))
    check_size(len(automaton), MAX_STATES)
    return automaton


def _built(expression: Expression, work: Work, *, linking: bool) -> tuple[Builder, tuple[int, int]]:
    """An expression's nondeterministic automaton, its start and its end."""
    builder = Builder(work, linking=linking)
    ends = builder.state(), builder.state()
    builder.add(expression, *ends)
    return builder, ends


@lru_cache(maxsize=4096)
def listed_texts(texts: tuple[str, ...]) -> Automaton:
    """`text_automaton`, once."""
    return text_automaton(texts)


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
