"""Tool calls as the model writes them: `call:NAME{key:value,...}`, strings quoted by a token of their own.

    call:book{guests:2,name:<|"|>Ann "A" Lee<|"|>,notes:[<|"|>a<|"|>,null],when:{day:3,late:true}}

Why: a string may hold any character, also `"`, `{` and line ends, and needs no escapes, because its quote is a token
and not text. So a call is read from the pieces of text between those tokens, never from one joined text.

Invariant: `read_call` of what `write_call` wrote gives the same name and arguments. What is not quite of this form is
mended where it can be read in one way only; what is no call comes back whole as a `MalformedToolCall` that says why,
and never as a call with something left out (ADR 0027).

Run: python -m pytest tests/chat/test_tool_calls.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from blockpress.chat.call_quotes import QuoteSearch
from blockpress.chat.call_syntax import MAX_DEPTH, CallState, finish, read_head, read_outside
from blockpress.chat.call_values import QUOTED, Typing, _CallFault

__all__ = ["MAX_DEPTH", "QUOTE", "MalformedToolCall", "ToolCall", "read_call", "write_call"]

QUOTE = '<|"|>'
"""The text of the token that opens and closes a string."""

_NEEDS_QUOTES = frozenset(":,{}[]\"'")


@final
@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that could be read: the tool's name, and its arguments as JSON values.

    mended: whether it was not of the form that `write_call` or JSON gives, and could be read all the same. Calls that
    ask for the same are equal, however they were written.
    """

    name: str
    arguments: dict[str, Any]
    mended: bool = field(default=False, compare=False)


@final
@dataclass(frozen=True, kw_only=True)
class MalformedToolCall:
    """What stood where a call was begun and could not be read. `raw`: its text, quotes included. `fault`: why."""

    raw: str
    fault: str


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of a call, keys sorted without regard to case, as chat templates write it.

    >>> write_call("add", {"b": [1, True], "A": "x"})
    'call:add{A:<|"|>x<|"|>,b:[1,true]}'
    """
    return f"call:{name}{_write(arguments)}"


def _write(value: Any) -> str:
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        pairs = sorted(value.items(), key=lambda pair: pair[0].lower())
        return "{" + ",".join(f"{_write_key(key)}:{_write(entry)}" for key, entry in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_write, value)) + "]"
    return json.dumps(value, allow_nan=False)


def _write_key(key: str) -> str:
    """Bare where that can be read back, quoted where a sign of it would end the key or a blank be lost."""
    bare = bool(key) and key.strip() == key and not _NEEDS_QUOTES & set(key)
    return key if bare else f"{QUOTE}{key}{QUOTE}"


def read_call(
    pieces: Sequence[str],
    tools: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    closed: bool = True,
    held: bool = False,
) -> ToolCall | MalformedToolCall:
    """Read a call from the pieces of text between its quote tokens: outside, string, outside, string, ..., outside.

    Args:
        pieces: as a tokenizer gives them; the tokens themselves are left out.
        tools: the names of tools with their `parameters`, JSON schemas that say which types bare words have.
        closed: whether the model has written the call's end; otherwise nothing that is open at the end is closed.
        held: whether the call was held to its schema, which cannot say that keys differ: of two, the last one counts.

    >>> read_call(['call:say{what:', 'a "b" {c', '}'])
    ToolCall(name='say', arguments={'what': 'a "b" {c'}, mended=False)
    >>> read_call(["call:find{zip:00501,near:[1.,'x']"], {"find": {"properties": {"zip": {"type": "string"}}}})
    ToolCall(name='find', arguments={'zip': '00501', 'near': [1.0, 'x']}, mended=True)
    >>> read_call(["call:say{n:1"], closed=False).fault
    'it ends inside an object'
    """
    try:
        name, rest, begin = read_head(pieces[0] if pieces else "", quoted=len(pieces) > 1)
        parts = [rest, *pieces[1:]]
        try:
            state = _in_pairs(begin, parts, closed=closed)
        except _CallFault:
            found = QuoteSearch(parts, closed=closed).run(begin)
            if found is None:
                raise
            state = found
        typing = Typing((tools or {}).get(name, {}))
        arguments = typing.value(
            json.loads(state.json, object_pairs_hook=dict if held else _without_twins), typing.root
        )
        _check_sayable(arguments)
    except _CallFault as fault:
        return MalformedToolCall(raw=QUOTE.join(pieces), fault=str(fault))
    return ToolCall(name=name, arguments=arguments, mended=state.mended or typing.mended)


def _in_pairs(state: CallState, parts: Sequence[str], *, closed: bool) -> CallState:
    """The end of the reading in which each quote token opens a string or closes it, in turn."""
    for place, part in enumerate(parts):
        if place % 2 == 0:
            state = read_outside(state, part, quoted=place + 1 < len(parts))
        elif place + 1 == len(parts):
            raise _CallFault("a string is not closed")
        else:
            state = state.put(part, QUOTED)
    return finish(state, closed=closed)


def _check_sayable(value: Any, depth: int = 1) -> None:
    """_CallFault: escapes or JSON in a string made something that no chat can say again."""
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise _CallFault("a string holds half of a character")
    if isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise _CallFault(f"it is nested deeper than {MAX_DEPTH}")
        for entry in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_sayable(entry, depth + 1)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise _CallFault(f"the key {twin!r} comes twice")
    return found
