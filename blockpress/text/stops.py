"""Stop strings: the text before the first of them, found while the text is still being streamed.

Why: a stop string may be spread over many tokens, and its beginning must not be released before it is known to be
something else.

Invariant: the released text is the whole text up to the earliest start of a stop string, or all of it, however the text
was split into pieces.

Run: python -m pytest tests/text/test_stops.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from blockpress.errors import RequestError

__all__ = ["StopFinder"]


@final
class StopFinder:
    """Takes text, returns the part that is certain to precede any stop string.

    The stop string that starts earliest wins, and of those with the same start the shortest. One matching automaton per
    stop string (Knuth, Morris, Pratt), so the cost of a character does not grow with the length of the stop strings.

    ::

        stops  "abcd" and "bc"
        text   x a b c ...        "bc" is complete, but "abcd" would start earlier: wait one more character

    >>> finder = StopFinder(["abcd", "bc"])
    >>> [finder.feed(char) for char in "xabce"], finder.found
    (['x', '', '', '', 'a'], 'bc')
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError, which names a stop string that is empty or not a string."""
        self._stops = _checked(stops)
        self._fallbacks = [_fallback(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._position = 0
        self._candidate: tuple[int, int] | None = None
        self.released = 0
        """Characters returned so far."""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Take more text; return what is newly safe. After a stop string was found, always ""."""
        if self.found is not None:
            return ""
        for char in text if self._stops else "":
            self._held += char
            self._advance(char)
            if self._candidate and not self._earlier_possible(self._candidate[0]):
                return self._stop(self._candidate)
        if not self._stops:
            self._held = text
        return self._release(len(self._held) - max(self._matched, default=0))

    def finish(self) -> str:
        """End the text: return the rest, up to a stop string that was complete while an earlier one was possible."""
        if self.found is None and self._candidate:
            return self._stop(self._candidate)
        return self._release(len(self._held))

    def _advance(self, char: str) -> None:
        self._position += 1
        for number, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            matched = self._matched[number]
            while matched and stop[matched] != char:
                matched = fallback[matched]
            matched += stop[matched] == char
            if matched == len(stop):
                match = (self._position - matched, matched)
                self._candidate = min(self._candidate or match, match)
                matched = fallback[matched]
            self._matched[number] = matched

    def _earlier_possible(self, start: int) -> bool:
        return any(self._position - matched < start for matched in self._matched if matched)

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
    """`[n]`: the length of the longest proper prefix of `stop[:n]` that is also its suffix."""
    table = [0, 0]
    for char in stop[1:]:
        length = table[-1]
        while length and stop[length] != char:
            length = table[length]
        table.append(length + (stop[length] == char))
    return table
