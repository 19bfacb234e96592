"""Texts of different values, told by where they begin, for arrays and keys that must not repeat.

    "a..."   "b..."   ...   "0..."   ""     parts of the texts of strings; one item of each part at most, in this order

An automaton cannot remember the items before; that items come from different parts it can tell.

Invariant: two texts of two parts have different values.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import numpy as np

from blockpress.constrain.automaton import DEAD, Automaton, Bytes, Concat, Linked, minimal
from blockpress.constrain.compiler import compile_expression

_LETTERS = [(byte, byte - 32) for byte in range(97, 123)]
_FIRSTS = [{34}, *map(set, _LETTERS), *({byte} for byte in range(48, 58))]
_FIRSTS.append(set(range(256)).difference(*_FIRSTS))
"""First bytes of strings after the quote, by which texts are told apart: the quote itself is that of an empty one."""


def distinct_parts(texts: Automaton, most_states: int, least: int) -> list[Automaton]:
    """Automata of JSON texts whose values differ between any two of them, told by the first byte that is not given.

    Only if numbers have one form each. Not of arrays and objects, where that byte may be a space.

    Args:
        most_states: of all together, unless `least` parts need more.
    """
    result: list[Automaton] = []
    for byte in np.nonzero(texts.table[0] != DEAD)[0].tolist():
        at, start = int(texts.table[0, byte]), bytes([byte])
        while byte == 34 and not texts.accepting[at] and (texts.table[at] != DEAD).sum() == 1:
            start += bytes([int(np.argmax(texts.table[at] != DEAD))])
            at = int(texts.table[at, start[-1]])
        live = set(np.nonzero(texts.table[at] != DEAD)[0].tolist())
        firsts = [first & live for first in _FIRSTS if first & live]
        count = max(least, min(len(firsts), most_states // len(texts))) if byte == 34 and not texts.accepting[at] else 1
        for number in range(min(count, len(firsts) or 1)):
            allowed = set().union(*firsts[number::count])
            rest = np.vstack((texts.table, np.full((1, 256), DEAD, np.int32)))
            for each in allowed:
                rest[-1, each] = texts.table[at, each]
            order = [len(texts), *range(len(texts))]
            place = np.argsort(order)
            moved = np.where(rest == DEAD, DEAD, place[rest])[order].astype(np.int32)
            accepting = np.append(texts.accepting, texts.accepting[at])[order]
            tail = minimal(moved, accepting)
            result.append(compile_expression(Concat((*(Bytes(each, each) for each in start), Linked(tail)))))
    return result
