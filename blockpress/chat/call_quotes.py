"""Which quote tokens of a tool call open and close its strings, where they do not do so in pairs.

    tokens    {code:Q p(Q a Q)Q ,n:1}      Q: a quote token
    strings         |---------|            the second and the third are quotation marks: p("a")

Models write the token where a quotation mark is meant in a string, leave it out where strings begin, and leave it out
at the end of the last one. A reading supposes one of these three, and is found where it is the only one that makes
sense of the whole text.

Invariant: no reading takes for a quotation mark what may as well be the border between two entries. The work grows with
the square of the number of tokens at most, and that has a limit.

Run: python -m pytest tests/chat/test_tool_calls.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import final

from blockpress.chat.call_syntax import ENDS, NAMED, CallState, finish, read_outside, unescaped
from blockpress.chat.call_values import QUOTED, _CallFault

__all__ = ["QuoteSearch"]

_MOST_PIECES, _MOST_BEGINS = 1001, 16
"""How many pieces are looked at, and at how many places of a piece a string without a beginning may begin."""

_AFTER = {"colon": re.compile(r"\s*:"), "{": re.compile(r"\s*(?:[,}]|\Z)"), "[": re.compile(r"\s*(?:[,\]]|\Z)")}
"""What follows a key, a value in an object, and one in an array."""

_BEFORE_VALUE = re.compile(r"[:\[]\s*")
_ENTRY = re.compile(rf",\s*{NAMED}")
# Between the last comma and a quote token that opens a value: of an object's entry, of an array's element.
_OPENS_VALUE = re.compile(rf"[\s\[{{]*(?:{NAMED}[\s\[{{]*)+")
_OPENS_ELEMENT = re.compile(rf"[\s\[{{]*(?:{NAMED}[\s\[{{]*)*")
# Behind a quote token that closes a value: another entry, another element; or a key without a comma or a colon.
_CLOSES_VALUE = re.compile(rf"[\s}}\]]*,\s*{NAMED}|\s*,\s*[\w.$-]{{3,}}\s*\Z|{NAMED}\s*\Z")
_CLOSES_ELEMENT = re.compile(r"[\s}\]]*,")


@final
class QuoteSearch:
    """The pieces of a call's text between its quote tokens, the first from behind the name's brace."""

    def __init__(self, pieces: Sequence[str], *, closed: bool) -> None:
        """`closed`: the model has ended the call, so what is open at its end has an end there."""
        self._pieces, self._closed = pieces, closed

    def run(self, begin: CallState) -> CallState | None:
        """The end of the only reading that makes sense; None: there is none, or there are several."""
        pieces = len(self._pieces)
        if not 2 <= pieces <= _MOST_PIECES:
            return None
        # What has been reached before each piece, and whether on two ways.
        reached: list[dict[tuple[str, ...], tuple[CallState, bool]]] = [{} for _ in range(pieces + 1)]
        reached[0]["", ""] = begin, False
        for place in range(pieces):
            for (fault, *_), (state, twice) in reached[place].items():
                for after, then, supposed in self._steps(place, state, fault):
                    where = (supposed, then.stack, then.want)
                    reached[after][where] = then, twice or where in reached[after]
        ends = list(reached[pieces].values())
        return ends[0][0]._replace(mended=True) if len(ends) == 1 and not ends[0][1] else None

    def _steps(self, place: int, state: CallState, fault: str) -> Iterator[tuple[int, CallState, str]]:
        """What may follow if piece `place` is outside of strings: the next such piece, and the state before it.

        `fault`, the first and the last of the result: what is supposed to be wrong. "": nothing so far, "marks":
        quotation marks, in pairs, "mark": also one that is alone in its string, "begin": strings without a beginning.
        """
        last = len(self._pieces) - 1
        if fault in ("", "begin") and place < last:
            yield from ((place + 1, then, "begin") for then in self._without_beginning(place, state))
        try:
            was_mended, state = state.mended, read_outside(state, self._pieces[place], quoted=place < last)
            if place == last:
                yield last + 1, finish(state, closed=self._closed), fault
                return
            # The last token may as well close a word before it that has no quotes.
            if not fault and place + 1 == last and state.mended == was_mended:
                yield last + 1, self._without_end(state), "end"
        except _CallFault:
            return
        if not (state.wants_key or state.wants_value):
            return
        plain = True
        for after in range(place + 2, last + 1):
            marks = after - place - 2
            if marks and (fault == "begin" or self._is_border(after - 1, state)):
                return
            plain &= not marks or self._is_in_prose(after - 1)
            if (marks % 2 == 0 or (plain and fault != "mark")) and self._is_string(place + 1, after, state):
                text = '"'.join(self._pieces[place + 1 : after])
                supposed = "mark" if marks % 2 else (fault or "marks") if marks else fault
                yield after, state.put(text, QUOTED), supposed

    def _is_border(self, place: int, state: CallState) -> bool:
        """Whether the token before piece `place` may open or close a string, so that it is no quotation mark in one."""
        _, comma, before = self._pieces[place - 1].rpartition(",")
        behind, in_array = self._pieces[place], state.want in ("first element", "element")
        opens = comma and (_OPENS_ELEMENT if in_array else _OPENS_VALUE).fullmatch(before)
        return bool(opens or _CLOSES_VALUE.match(behind) or (in_array and _CLOSES_ELEMENT.match(behind)))

    def _is_in_prose(self, place: int) -> bool:
        """Whether no punctuation of a call is beside the token before piece `place`."""
        before, behind = self._pieces[place - 1].rstrip(), self._pieces[place].lstrip()
        return before[-1:] not in set(":,{[") and behind[:1] not in set(":,}]")

    def _is_string(self, first: int, after: int, state: CallState) -> bool:
        """Whether the pieces before `after` may be one string, and not strings side by side or in quotes twice."""
        follows = "colon" if state.wants_key else "[" if state.stack[-1] == "[" else "{"
        if not _AFTER[follows].match(self._pieces[after]):
            return False
        parts = self._pieces[first:after]
        return len(parts) == 1 or bool((parts[0] or parts[-1]) and "".join(parts[1::2]).strip())

    def _without_beginning(self, place: int, state: CallState) -> Iterator[CallState]:
        """The states after strings that end with piece `place` and begin in it, without a token there."""
        piece = self._pieces[place]
        inside = max([piece.rfind(char) for char in "{}["] + [entry.start() for entry in _ENTRY.finditer(piece)])
        begins = [begin.end() for begin in _BEFORE_VALUE.finditer(piece, max(0, inside))]
        for begin in begins[:_MOST_BEGINS]:
            text = piece[begin:]
            plain = text[:1] if text[:1] in ("'", '"') else ""
            if not text or "]" in text or (plain and (text.count(plain) != 2 or text[-1] != plain)):
                continue
            try:
                before = read_outside(state, piece[:begin], quoted=False)
            except _CallFault:
                continue
            # With a word before it that has no quotes either, the string might begin there.
            if before.mended == state.mended and (before.want == "value" or (before.wants_value and "," not in text)):
                yield before.put(unescaped(text[1:-1]) if plain else text, QUOTED)

    def _without_end(self, state: CallState) -> CallState:
        """The end of the call, if its last piece is a string with what closes the containers behind it."""
        text, body = self._pieces[-1], self._pieces[-1]
        if not (self._closed and state.wants_value) or _ENTRY.search(text) or (state.want != "value" and "," in text):
            raise _CallFault("a string is not closed")
        ends = [ENDS[char] for char in reversed(state.stack)]
        for number in range(1, len(ends) + 1):
            found = re.search(r"\s*".join(map(re.escape, ends[:number])) + r"\s*\Z", text)
            body = text[: found.start()] if found else body
        if not _is_balanced(body) or not (body or state.want == "value"):
            raise _CallFault("a string is not closed")
        return finish(read_outside(state.put(body, QUOTED), text[len(body) :], quoted=False), closed=True)


def _is_balanced(text: str) -> bool:
    """Whether every bracket in it has its partner."""
    waiting: list[str] = []
    for char in text:
        if char in "{[":
            waiting.append(ENDS[char])
        elif char in "}]" and (not waiting or waiting.pop() != char):
            return False
    return not waiting
