"""Tool calls as the model writes them: `call:NAME{key:value,...}`, strings quoted by a token of their own.

    call:book{guests:2,name:<|"|>Ann "A" Lee<|"|>,notes:[<|"|>a<|"|>,null],when:{day:3,late:true}}

Why: a string may hold any sign, also `"`, `{` and line ends, and needs no escapes, because its quote is a token and not
text. So a call is read from the pieces of text between those tokens, never from one joined text.

Invariant: `read_call` of what `write_call` wrote gives the same name and arguments; what is no call comes back whole as
a `MalformedToolCall` that says why, and never as a call with something left out.

Run: python -m pytest tests/chat/test_tool_calls.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

__all__ = ["QUOTE", "MalformedToolCall", "ToolCall", "read_call", "write_call"]

QUOTE = '<|"|>'
"""The text of the token that opens and closes a string."""

MAX_DEPTH = 64
"""Objects and arrays inside each other; deeper ones are a fault."""

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NEEDS_QUOTES = frozenset(':,{}[]"')
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}


@final
@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that could be read: the tool's name, and its arguments as JSON values."""

    name: str
    arguments: dict[str, Any]


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


def read_call(pieces: Sequence[str]) -> ToolCall | MalformedToolCall:
    """Read a call from the pieces of text between its quote tokens: outside, string, outside, string, ..., outside.

    Read too, because models write it: strings in JSON's own quotes, bare words as strings, blanks around anything.

    >>> read_call(['call:say{what:', 'a "b" {c', '}'])
    ToolCall(name='say', arguments={'what': 'a "b" {c'})
    >>> read_call(["call:say{n:1"]).fault
    'it ends inside an object'
    """
    raw = QUOTE.join(pieces)
    if len(pieces) % 2 == 0:
        return MalformedToolCall(raw=raw, fault="a string is not closed")
    try:
        name, arguments = _Reader(pieces).call()
    except _Fault as fault:
        return MalformedToolCall(raw=raw, fault=str(fault))
    return ToolCall(name=name, arguments=arguments)


class _Fault(Exception):
    """Why the text is no call."""


@final
class _Reader:
    """Recursive descent over signs and quoted strings: a `str` of one sign, or a tuple that holds a whole string."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._items: list[str | tuple[str]] = []
        for number, piece in enumerate(pieces):
            self._items += [(piece,)] if number % 2 else list(piece)
        self._at = 0

    def call(self) -> tuple[str, dict[str, Any]]:
        prefix, name = self._text_until(":").strip(), ""
        if prefix != "call":
            raise _Fault("it does not begin with 'call:'")
        self._at += 1
        name = self._text_until("{").strip()
        if not name:
            raise _Fault("the call has no name")
        if self._peek() != "{":
            raise _Fault("there is no '{' behind the name")
        arguments = self._object(1)
        if self._peek() is not None:
            raise _Fault(f"there is {self._here()} behind the call")
        return name, arguments

    def _value(self, depth: int) -> Any:
        item = self._peek()
        if isinstance(item, tuple):
            self._at += 1
            return item[0]
        if item in ("{", "[") and depth > MAX_DEPTH:
            raise _Fault(f"it is nested deeper than {MAX_DEPTH}")
        if item == "{":
            return self._object(depth)
        if item == "[":
            return self._array(depth)
        if item == '"':
            return self._json_string()
        return _scalar(self._text_until(",", "}", "]", "{", "[").strip())

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._at += 1
        while not self._closes("}", first=not found):
            key = self._key()
            if self._peek() != ":":
                raise _Fault(f"there is no ':' behind the key {key!r}")
            self._at += 1
            if key in found:
                raise _Fault(f"the key {key!r} comes twice")
            found[key] = self._value(depth + 1)
        return found

    def _array(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self._at += 1
        while not self._closes("]", first=not found):
            found.append(self._value(depth + 1))
        return found

    def _closes(self, end: str, *, first: bool) -> bool:
        """Step over the end, or over the comma before another entry."""
        item = self._peek()
        if item is None:
            raise _Fault("it ends inside an " + ("object" if end == "}" else "array"))
        if item == end:
            self._at += 1
            return True
        if not first:
            if item != ",":
                raise _Fault(f"there is {self._here()} where ',' or {end!r} should be")
            self._at += 1
        return False

    def _key(self) -> str:
        item = self._peek()
        if isinstance(item, tuple):
            self._at += 1
            return item[0]
        if item == '"':
            return self._json_string()
        key = self._text_until(":", ",", "{", "}", "[", "]").strip()
        if not key:
            raise _Fault(f"there is {self._here()} where a key should be")
        return key

    def _json_string(self) -> str:
        begin, escaped = self._at, False
        for place in range(begin + 1, len(self._items)):
            item = self._items[place]
            if isinstance(item, tuple):
                break
            if item == '"' and not escaped:
                self._at = place + 1
                text = "".join(str(sign) for sign in self._items[begin : place + 1])
                try:
                    value: str = json.loads(text, strict=False)
                except ValueError:
                    raise _Fault("a string in plain quotes is no JSON string") from None
                return value
            escaped = item == "\\" and not escaped
        raise _Fault("a string in plain quotes is not closed")

    def _text_until(self, *ends: str) -> str:
        begin = self._at
        while self._at < len(self._items):
            item = self._items[self._at]
            if isinstance(item, tuple):
                if "".join(str(sign) for sign in self._items[begin : self._at]).strip():
                    raise _Fault("a quoted string stands behind text without quotes")
                raise _Fault("a quoted string stands where it means nothing")
            if item in ends:
                break
            self._at += 1
        return "".join(str(sign) for sign in self._items[begin : self._at])

    def _peek(self) -> str | tuple[str] | None:
        """The next item that is no blank, or None at the end."""
        while self._at < len(self._items):
            item = self._items[self._at]
            if isinstance(item, tuple) or not item.isspace():
                return item
            self._at += 1
        return None

    def _here(self) -> str:
        item = self._peek()
        return "the end" if item is None else "a quoted string" if isinstance(item, tuple) else repr(item)


def _scalar(text: str) -> Any:
    """A JSON number, truth value or null; any other bare word is a string."""
    if not text:
        raise _Fault("a value is missing")
    if text in _WORDS:
        return _WORDS[text]
    if not _NUMBER.fullmatch(text):
        return text
    try:
        number = json.loads(text)
    except ValueError:  # more digits than Python turns into a number
        return text
    return text if isinstance(number, float) and math.isinf(number) else number
