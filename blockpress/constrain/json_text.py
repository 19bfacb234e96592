"""The JSON texts of strings, as expressions.

    decoded text, an automaton --escaped--> what stands between the quotes

Texts are written in one way where JSON allows several (no escapes but the necessary ones), so that text and value
determine each other.

Invariant: every text of an expression parses to a string within the limits.
Run it:  python -m pytest tests/constrain/test_json_text.py
"""

from __future__ import annotations

import contextlib
import json
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

import numpy as np

from blockpress.constrain.automaton import (
    ANY_CHAR,
    DEAD,
    EMPTY_TEXT,
    MAX_STATES,
    Automaton,
    Bytes,
    Chars,
    Concat,
    Expression,
    Graph,
    Repeat,
    _NothingMatches,
    byte_ranges,
    check_size,
    intersection,
    literal,
    minimal,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.ecma import pattern_texts, texts_without
from blockpress.constrain.formats import FORMATS, format_texts

_ESCAPES = {byte: json.dumps(chr(byte))[1:-1] for byte in (*range(32), 34, 92)}
WRITTEN = Chars(((8, 10), (12, 13), (32, 0x10FFFF)))
"""Characters of strings, unless a pattern asks for others: of control characters those with an escape of one letter."""
COUNTED = 256
"""Most characters of a string that are counted where `maxLength` allows more."""


@lru_cache(maxsize=512)
def json_string(decoded: Automaton) -> Automaton:
    """The JSON strings whose decoded text an automaton allows, quotes included.

    Raises:
        RequestError: it has too many states.
    """
    count = len(decoded)  # states: those of the text, then one after a backslash in each, a start and an end
    start, end = 2 * count, 2 * count + 1
    table = np.full((2 * count + 2, 256), DEAD, np.int32)
    plain = [byte for byte in range(32, 256) if byte not in _ESCAPES]
    table[:count, plain] = decoded.table[:, plain]
    for byte, text in _ESCAPES.items():
        table[count : 2 * count, ord(text[1])] = decoded.table[:, byte] if len(text) == 2 else DEAD
    table[:count, 92] = np.where((table[count : 2 * count] != DEAD).any(1), np.arange(count, 2 * count), DEAD)
    table[:count, 34] = np.where(decoded.accepting, end, DEAD)
    table[start, 34] = 0
    controls = [byte for byte, text in _ESCAPES.items() if len(text) > 2]
    if (decoded.table[:, controls] != DEAD).any():
        return compile_expression(Concat((literal('"'), _with_controls(decoded), literal('"'))))
    accepting = np.arange(len(table)) == end
    first = np.concatenate(([start], np.arange(start), [end]))
    place = np.argsort(first)
    return minimal(np.where(table == DEAD, DEAD, place[table])[first].astype(np.int32), accepting[first])


def _with_controls(decoded: Automaton) -> Expression:
    """What stands between the quotes, control characters as \\\\uXXXX."""
    edges: list[tuple[int, Expression, int]] = [(0, EMPTY_TEXT, 2)]
    for state, row in enumerate(byte_ranges(decoded)):
        if decoded.accepting[state]:
            edges.append((state + 2, EMPTY_TEXT, 1))
        for low, high, target in row:
            edges += [(state + 2, literal(text), target + 2) for byte, text in _ESCAPES.items() if low <= byte <= high]
            plain = [(low, min(high, 33)), (max(low, 35), min(high, 91)), (max(low, 93), high)]
            edges += [(state + 2, Bytes(max(a, 32), b), target + 2) for a, b in plain if max(a, 32) <= b]
    return Graph(tuple(edges))


@lru_cache(maxsize=512)
def text_of(
    lengths: tuple[int, int | None],
    patterns: tuple[str, ...] = (),
    formats: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    counted: int = COUNTED,
) -> Automaton:
    """The texts of so many characters in which every pattern is found and which have every format, if it is known.

    Args:
        without: patterns that are not found.
        counted: no text has more characters than this where the limit on its length is larger.

    Raises:
        RequestError: a pattern that cannot be enforced. _NothingMatches: no text is left.
    """
    languages = [format_texts(name) for name in formats if name in FORMATS]
    languages += [*(pattern_texts(pattern, most=counted) for pattern in patterns), *map(texts_without, without)]
    low, high = lengths
    result = languages[0] if languages else compile_expression(Repeat(WRITTEN, 0, None))
    for other in languages[1:]:
        result = intersection(result, other)
    if patterns or without:
        with contextlib.suppress(_NothingMatches):  # raised by a pattern of control characters
            result = intersection(result, compile_expression(Repeat(WRITTEN, 0, None)))
    shortest, longest = char_lengths(result)
    least = low if low > shortest else 0
    if high is None or (longest is not None and longest <= high):
        most = None
    else:
        most = min(high, max(low, shortest, counted if not languages else 4 * counted // len(result)))
        if most < max(low, shortest):
            raise _NothingMatches
    if not least and most is None:
        return result
    length = _counted(WRITTEN if not languages else ANY_CHAR, least, most)
    return length if not languages else intersection(result, length)


def _counted(char: Chars, low: int, high: int | None) -> Automaton:
    """So many characters: copies of the automaton of one, each from the end of the one before."""
    if high is None:
        return compile_expression(Repeat(char, low, high))
    one = compile_expression(char)
    inner = len(one) - 1  # its start and all states but the end
    end = int(np.nonzero(one.accepting)[0][0])
    place = np.arange(len(one)) - (np.arange(len(one)) > end)
    place[end] = inner  # the start of the next copy
    rows = np.where(one.table == DEAD, DEAD, place[one.table])[np.arange(len(one)) != end]
    check_size(high * inner, MAX_STATES)
    shifts = (np.arange(high) * inner)[:, None, None]
    table = np.where(rows[None] == DEAD, DEAD, rows[None] + shifts).reshape(-1, 256)
    table = np.vstack((table, np.full((1, 256), DEAD))).astype(np.int32)
    accepting = np.zeros(len(table), bool)
    accepting[low * inner :: inner] = True
    return Automaton(table, accepting)


def char_lengths(automaton: Automaton) -> tuple[int, int | None]:
    """How many characters the shortest and the longest text have; None: there is no longest."""
    following = []
    for row in automaton.table:
        moves = np.nonzero(row != DEAD)[0]
        starts = bool(len(moves)) and not 0x80 <= moves[0] < 0xC0
        following.append((int(starts), np.unique(row[moves]).tolist()))
    shortest = [len(automaton)] * len(automaton)
    queue = [(0, 0)]
    while queue:
        count, state = heappop(queue)
        if count < shortest[state]:
            shortest[state] = count
            for target in following[state][1]:
                heappush(queue, (count + following[state][0], target))
    return min(shortest[state] for state in np.nonzero(automaton.accepting)[0]), _longest(automaton, following)


def _longest(automaton: Automaton, following: list[tuple[int, list[int]]]) -> int | None:
    before = [0] * len(automaton)
    for _, targets in following:
        for target in targets:
            before[target] += 1
    longest, queue = [0] * len(automaton), [0] if not before[0] else []
    for state in queue:
        weight, targets = following[state]
        for target in targets:
            longest[target] = max(longest[target], longest[state] + weight)
            before[target] -= 1
            if not before[target]:
                queue.append(target)
    if len(queue) < len(automaton):
        return None  # the others lie on circles
    return max(longest[state] for state in np.nonzero(automaton.accepting)[0].tolist())


def json_literal(value: Any) -> Expression:
    """One value, as `json.dumps` writes it."""
    return literal(json.dumps(value, ensure_ascii=False))
