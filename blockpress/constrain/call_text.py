"""From the JSON texts of arguments to those of a call: the same values, written as the model writes them.

    JSON    {"city": "a \\"b\\"", "n": [1, null]}
    call    {city:"a "b"",n:[1,null]}              the outer quotes are the quote token; keys are bare where they can be

It is a walk through the automaton of the JSON texts that writes something else, so it serves every schema.

Invariant: `chat.tool_calls.read_call` of such a text gives the JSON's value.
Source: `chat.tool_calls.write_call`, and the chat templates of Gemma 4.
Run it:  python -m pytest tests/constrain/test_turns.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np

from blockpress.constrain.automaton import (
    ANY_CHAR,
    DEAD,
    EMPTY_TEXT,
    Automaton,
    Bytes,
    Expression,
    Graph,
    Repeat,
    difference,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import FIRST_LETTER

QUOTE = FIRST_LETTER
"""The letter of the token that opens and closes a string in a call."""

_MARK, _BACKSLASH, _COLON = b'"\\:'
_BLANKS = frozenset(b" \t\n\r")
_SIMPLE = {ord(sign): ord(char) for sign, char in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True)}

Node = tuple[str, int, int]
"""Where the walk is: outside of strings ("out"), there after a string that is a value ("value ended") or a key ("key
ended"), or in one ("value", "bare", "quoted"); the state of the JSON; and in a key that of what it may be."""


def call_text(arguments: Automaton) -> Expression:
    """The texts of a call's arguments, from the JSON texts of the same."""
    numbers: dict[Node | str, int] = {"start": 0, "end": 1, ("out", 0, 0): 2}
    edges: list[tuple[int, Expression, int]] = [(0, EMPTY_TEXT, 2)]
    queue: list[Node] = [("out", 0, 0)]
    for node in queue:
        mode, state, _ = node
        if mode in ("out", "value ended") and arguments.accepting[state]:
            edges.append((numbers[node], EMPTY_TEXT, 1))
        for part, target in _moves(arguments, node):
            if target not in numbers:
                numbers[target] = len(numbers)
                queue.append(target)
            edges.append((numbers[node], part, numbers[target]))
    return Graph(tuple(edges))


def _moves(arguments: Automaton, node: Node) -> Iterator[tuple[Expression, Node]]:
    mode, state, inner = node
    if mode in ("value", "bare", "quoted"):
        yield from _in_string(arguments, mode, state, inner)
        return
    for byte, target in enumerate(arguments.table[state].tolist()):
        if target == DEAD:
            continue
        if byte in _BLANKS:
            yield EMPTY_TEXT, (mode, target, 0)
        elif byte == _MARK and mode == "out":
            yield EMPTY_TEXT, ("bare", target, 0)
            yield Bytes(QUOTE, QUOTE), ("quoted", target, 0)
            yield Bytes(QUOTE, QUOTE), ("value", target, 0)
        elif mode == "out" or (mode == "key ended") == (byte == _COLON):
            yield Bytes(byte, byte), ("out", target, 0)


def _in_string(arguments: Automaton, mode: str, state: int, inner: int) -> Iterator[tuple[Expression, Node]]:
    key = None if mode == "value" else _keys()[mode]
    row = arguments.table[state]
    end = int(row[_MARK])
    if end != DEAD and (key is None or key.accepting[inner]):
        closing = EMPTY_TEXT if mode == "bare" else Bytes(QUOTE, QUOTE)
        yield closing, ("value ended" if key is None else "key ended", end, 0)
    inners = np.zeros(256, np.int32) if key is None else key.table[inner]
    for byte, target in _escaped(arguments, int(row[_BACKSLASH])):
        if inners[byte] != DEAD:
            yield Bytes(byte, byte), (mode, target, int(inners[byte]))
    pairs = np.stack((row, inners))
    cuts = np.nonzero((np.diff(pairs) != 0).any(0))[0] + 1
    bounds = sorted({0, *cuts.tolist(), _MARK, _MARK + 1, _BACKSLASH, _BACKSLASH + 1, 256})
    for low, after in pairwise(bounds):
        target, following = pairs[:, low].tolist()
        if DEAD not in (target, following) and low not in (_MARK, _BACKSLASH):
            yield Bytes(low, after - 1), (mode, target, following)


def _escaped(arguments: Automaton, state: int) -> Iterator[tuple[int, int]]:
    """The bytes that escapes write, from the state after their backslash, with the state after each."""
    if state == DEAD:
        return
    for sign, byte in _SIMPLE.items():
        if (target := int(arguments.table[state, sign])) != DEAD:
            yield byte, target
    for byte in range(32):  # every other character may stand for itself
        for written in {f"u{byte:04x}", f"u{byte:04X}"}:
            if (target := arguments.run(written, state)) != DEAD:
                yield byte, target


@lru_cache(maxsize=1)
def _keys() -> dict[str, Automaton]:
    """The keys that stand without quotes, and those that cannot."""
    edge, sign = r"""[^:,{}\[\]"'\s]""", r"""[^:,{}\[\]"']"""
    bare = compile_expression(parse_regex(f"{edge}(?:{sign}*{edge})?"))
    return {"bare": bare, "quoted": difference(compile_expression(Repeat(ANY_CHAR, 0, None)), bare)}
