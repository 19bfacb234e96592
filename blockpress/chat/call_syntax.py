"""The arguments of a tool call to JSON: punctuation is read here, what stands between it by `json`.

    pieces   {n:1,path:   a "b"   ,}          text between the quote tokens
    JSON     {"n":"b1","path":"qa \\"b\\""}     b: it was bare, q: it was quoted (`call_values` reads them)

Models leave out a last brace, double a brace, and write a comma too many. That is mended on the way, since there is one
way to do it. Which quote tokens open and close a string is the caller's to say (`tool_calls`, `call_quotes`).

Invariant: every word of the text is in the JSON, or it is a `_CallFault`. The time is in proportion to the text, and
nothing calls itself.

Run: python -m pytest tests/chat/test_tool_calls.py
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from blockpress.chat.call_values import BARE, QUOTED, _CallFault, is_json

__all__ = ["ENDS", "MAX_DEPTH", "NAMED", "CallState", "finish", "read_head", "read_outside", "unescaped"]

MAX_DEPTH = 64
"""Objects and arrays inside each other; deeper ones are a fault."""

_GHOST = "("
"""On the stack: the second brace of two that stand for one."""

ENDS = {"{": "}", "[": "]", _GHOST: "}"}
"""What closes an open container."""

_WANTED = {"first key": "a key", "key": "a key", "close": "'}'"}

_JSON_STRING = json.JSONDecoder(strict=False)
_BLANKS, _KEY, _WORD = re.compile(r"\s*"), re.compile(r"[^:,{}\[\]]+"), re.compile(r"[^,{}\[\]]+")
# An apostrophe ends a string where punctuation or nothing follows it.
_SINGLE_END = r"'(?=\s*(?:[,:}\]]|\Z))"
_SINGLE = re.compile(rf"'((?:[^\\]|\\.)*?){_SINGLE_END}", re.DOTALL)
_SINGLE_ENDS = re.compile(rf"\\.|({_SINGLE_END})", re.DOTALL)
_ESCAPE = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\(.)", re.DOTALL)

NAMED = r"(?:[^\W\d][\w.$-]+\s*:(?!//)|[^\W\d]\s*:(?![/\\]))"
"""A pattern of what looks like the key of an entry, and not like an address or a drive."""

_RUN_ON = re.compile(rf"[\s;]({NAMED}.*)", re.DOTALL)
_QUOTED_ON = re.compile(rf",\s*({NAMED}\s*'.*)", re.DOTALL)
"""An entry in a bare word, or in a string in single quotes: what ends the value may be missing before it."""


Chain = tuple["Chain", str] | None
"""Text that grows at its end and that many readings share: what was there before, and the last of it."""


class CallState(NamedTuple):
    """Where a reading is: the containers that are open, what comes next, the JSON so far, whether it was mended."""

    stack: str
    want: str
    written: Chain
    mended: bool

    @property
    def json(self) -> str:
        texts, chain = [], self.written
        while chain is not None:
            chain, text = chain
            texts.append(text)
        return "".join(reversed(texts))

    @property
    def wants_key(self) -> bool:
        return self.want in ("first key", "key")

    @property
    def wants_value(self) -> bool:
        return self.want in ("value", "first element", "element")

    def put(self, text: str, mark: str) -> CallState:
        """With a key, or with a value, of which `mark` says how it was written. _CallFault: neither fits here."""
        comma = "," if self.want in ("key", "element") else ""
        if self.wants_key:
            return self._replace(want="colon", written=(self.written, f"{comma}{json.dumps(text)}:"))
        if self.wants_value:
            return self._replace(want="comma", written=(self.written, comma + json.dumps(mark + text)))
        raise self.fault("a quoted string")

    def open(self, char: str) -> CallState:
        """In another object or array, or after the second brace of a doubled one."""
        if len(self.stack) == MAX_DEPTH:
            raise _CallFault(f"it is nested deeper than {MAX_DEPTH}")
        if char == _GHOST:
            return self._replace(stack=self.stack + char, mended=True)
        comma = "," if self.want == "element" else ""
        want = "first element" if char == "[" else "first key"
        return self._replace(stack=self.stack + char, want=want, written=(self.written, comma + char))

    def close(self) -> CallState:
        """Out of the innermost container; a comma before its end is left out."""
        above, top = self.stack[:-1], self.stack[-1]
        mended = self.mended or self.want in ("key", "element")
        if top == _GHOST:
            return CallState(above, "close", self.written, mended)
        return CallState(above, "comma" if above else "end", (self.written, ENDS[top]), mended)

    def fault(self, what: str) -> _CallFault:
        """That `what` stands where something else should be."""
        if self.want in ("end", "surplus"):
            return _CallFault(f"there is {what} after the call")
        if self.want == "colon":
            return _CallFault("there is no ':' after a key")
        wanted = f"',' or {ENDS[self.stack[-1]]!r}" if self.want == "comma" else _WANTED.get(self.want, "a value")
        return _CallFault(f"there is {what} where {wanted} should be")


def read_head(text: str, *, quoted: bool) -> tuple[str, str, CallState]:
    """The call's name, what follows its brace, and the state there. `quoted`: a string follows the text.

    The word `call` may be left out. _CallFault: it is no beginning of a call.
    """
    head, brace, rest = text.partition("{")
    if quoted and not brace:
        raise _CallFault("a quoted string stands before the arguments")
    word, colon, name = (part.strip() for part in head.partition(":"))
    mended = not colon or word != "call"
    if mended:
        name = name if not word else "" if colon or word == "call" else word
        if not brace or not re.fullmatch(r"[\w.-][\w.:-]*", name):
            raise _CallFault("it does not begin with 'call:'")
    if not name:
        raise _CallFault("the call has no name")
    if not brace:
        raise _CallFault("there is no '{' after the name")
    return name, rest, CallState("{", "first key", (None, "{"), mended=mended)


def read_outside(state: CallState, text: str, *, quoted: bool) -> CallState:
    """The state after text outside of quoted strings. `quoted`: one follows it."""
    at, ends = 0, _SINGLE_ENDS.finditer(text) if "'" in text else ()
    last_single = max((end.start() for end in ends if end[1]), default=-1)
    while (at := _BLANKS.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        char, want = text[at], state.want
        if char in ",}" and want == "value":
            # Nothing is an empty text. The sign is read again.
            state = state.put("", BARE)._replace(mended=True)
            continue
        if char in "{[" and state.wants_value:
            state = state.open(char)
        elif char == "{" and want == "first key":
            state = state.open(_GHOST)
        elif char in "}]" and want not in ("value", "colon", "end", "surplus") and ENDS[state.stack[-1]] == char:
            state = state.close()
        elif char == "}" and want == "end":
            state = state._replace(want="surplus", mended=True)
        elif char == "," and want == "comma":
            state = state._replace(want="element" if state.stack[-1] == "[" else "key")
        elif char == ":" and want == "colon":
            state = state._replace(want="value")
        elif char in ",:{}[]" or not (state.wants_key or state.wants_value):
            raise state.fault(repr(char))
        else:
            state, at = _read_entry(state, text, at, quoted=quoted, has_single=at < last_single)
            continue
        at += 1
    return state


def _read_entry(state: CallState, text: str, at: int, *, quoted: bool, has_single: bool) -> tuple[CallState, int]:
    """The state after the key or value that begins at `at`, and where it ends."""
    if text[at] == '"':
        try:
            value, end = _JSON_STRING.raw_decode(text, at)
        except json.JSONDecodeError as error:
            closed = not error.msg.startswith("Unterminated")
            raise _CallFault(f"a string in plain quotes is {'no JSON string' if closed else 'not closed'}") from None
        return state.put(value, QUOTED), end
    single = _SINGLE.match(text, at) if text[at] == "'" and has_single else None
    if single is not None and not (quoted and single.end() == len(text)):
        _check_one(_QUOTED_ON.search(single[1]))
        return state.put(unescaped(single[1]), QUOTED)._replace(mended=True), single.end()
    found = (_KEY if state.wants_key else _WORD).match(text, at)
    assert found is not None
    word = found[0].strip()
    if quoted and found.end() == len(text):
        raise _CallFault("a quoted string stands after text without quotes")
    if state.want in ("first element", "element") and re.match(NAMED, word):
        raise _CallFault(f"there is {word[:40]!r} where a value should be")
    if state.wants_value:
        _check_one(_RUN_ON.search(word))
        if state.stack[-1] == "[" and len(parts := word.split()) > 1 and all(map(is_json, parts)):
            raise _CallFault(f"there is no ',' in {word[:40]!r}")
    mended = state.mended or (state.wants_value and not is_json(word))
    return state.put(word, BARE)._replace(mended=mended), found.end()


def _check_one(entry: re.Match[str] | None) -> None:
    if entry is not None:
        raise _CallFault(f"a value goes on with {entry[1][:40]!r}, which may be the next entry")


def unescaped(text: str) -> str:
    """What a string in single quotes says: the escapes of JSON, and the apostrophe; any other backslash is itself.

    >>> unescaped(r"it\\'s \\s\\n")
    "it's \\\\s\\n"
    """

    def said(escape: re.Match[str]) -> str:
        if escape[1] == "'":
            return "'"
        try:
            decoded: str = json.loads(f'"{escape[0]}"')
        except ValueError:
            return escape[0]
        return decoded

    return _ESCAPE.sub(said, text)


def finish(state: CallState, *, closed: bool) -> CallState:
    """The state at the end of the text. `closed`: the model has ended the call, so what is open is closed."""
    if state.want in ("end", "surplus"):
        return state
    if not closed or state.want in ("value", "colon"):
        raise _CallFault(f"it ends inside an {'array' if state.stack[-1] == '[' else 'object'}")
    while state.stack:
        state = state.close()._replace(mended=True)
    return state
