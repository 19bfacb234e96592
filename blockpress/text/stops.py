"""Stop strings: the text before the first of them, found while the text is still coming.

Why: a stop string may be spread over many tokens, and its beginning must not reach the reader before it is known to be
something else.

Invariant: what is released is the whole text up to the earliest start of a stop string, or all of it, however the text
was cut up.

Run: python -m pytest tests/text/test_stops.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from blockpress.errors import RequestError

__all__ = ["StopFinder"]


@final
class StopFinder:
    """Feed text, get back what surely stands before any stop string.

    The stop string that starts earliest wins, and of those with the same start the shortest. One match automaton per
    stop string (Knuth, Morris, Pratt), so the work for a character does not grow with the length of the stop strings.

    ::

        stops  "abcd" and "bc"
        text   x a b c ...        "bc" is complete, but "abcd" would start earlier: wait one more character

    >>> finder = StopFinder(["abcd", "bc"])
    >>> [finder.feed(sign) for sign in "xabce"], finder.found
    (['x', '', '', '', 'a'], 'bc')
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """RequestError names a stop string that is empty or no string."""
        self._stops = _checked(stops)
        self._fallbacks = [_fallback(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._seen = 0
        self._candidate: tuple[int, int] | None = None
        self.released = 0
        """Characters handed out so far."""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Take more text; return what is newly safe. After a stop string was found that is always nothing."""
        if self.found is not None:
            return ""
        for sign in text if self._stops else "":
            self._held += sign
            self._advance(sign)
            if self._candidate and not self._earlier_possible(self._candidate[0]):
                return self._stop(self._candidate)
        if not self._stops:
            self._held = text
        return self._release(len(self._held) - max(self._matched, default=0))

    def finish(self) -> str:
        """No more text comes: return the rest, up to a stop string that was complete but waiting for an earlier one."""
        if self.found is None and self._candidate:
            return self._stop(self._candidate)
        return self._release(len(self._held))

    def _advance(self, sign: str) -> None:
        self._seen += 1
        for number, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            matched = self._matched[number]
            while matched and stop[matched] != sign:
                matched = fallback[matched]
            matched += stop[matched] == sign
            if matched == len(stop):
                match = (self._seen - matched, matched)
                self._candidate = min(self._candidate or match, match)
                matched = fallback[matched]
            self._matched[number] = matched

    def _earlier_possible(self, start: int) -> bool:
        return any(self._seen - matched < start for matched in self._matched if matched)

    def _stop(self, candidate: tuple[int, int]) -> str:
        start, length = candidate
        at = start - self.released
        self.found = self._held[at : at + length]
        text = self._release(at)
        self._held = ""
        return text

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self.released += len(text)
        return text


def _checked(stops: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stops, str) or not isinstance(stops, Sequence):
        raise RequestError(
            f"stop={stops!r} is not a list of strings", hint="write stop=['...'], also for one stop string"
        )
    for number, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise RequestError(f"stop[{number}]={stop!r} is not a string", hint="every stop string must be text")
        if not stop:
            raise RequestError(
                f"stop[{number}]={stop!r} is empty",
                hint="leave empty stop strings out; they would stop every text at once",
            )
    return tuple(stops)


def _fallback(stop: str) -> list[int]:
    """`[n]`: the length of the longest proper beginning of `stop` that also ends `stop[:n]`."""
    table = [0, 0]
    for sign in stop[1:]:
        length = table[-1]
        while length and stop[length] != sign:
            length = table[length]
        table.append(length + (stop[length] == sign))
    return table
