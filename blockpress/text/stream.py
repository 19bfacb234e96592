"""Token ids in, readable text out, while the ids are still coming.

Why: a reader wants text as soon as it is certain, never half a character, and nothing of a stop string.

Invariant: the joined output is `tokenizer.decode(all ids)`, cut before the first stop string, whatever the chunks were.

Run: python -m pytest tests/text/test_stream.py
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import final

from blockpress.errors import RequestError
from blockpress.text.detokenizer import TextChunk, detokenizer_for
from blockpress.text.stops import StopFinder
from blockpress.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder"]


@final
class StreamDecoder:
    """One stream of text.

    ::

        stop   ("END",)
        ids    12  <0xE2> <0x82> <0xAC>    7      9
        text   he  |------ euro ------|   x E   NDless
        feed   he     -      -      -    euro x   -       the last "E" may begin the stop string, so it waits

    Work: each id is decoded once, beside one other, so a stream costs time in proportion to its length. Held back are
    at most an unfinished character, a run of byte tokens, and the beginning of a stop string. (Decoders that may
    rewrite their whole text at the end, such as CTC, are held back to the end.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special: bool = True) -> None:
        """`stop`: strings that end the text. `skip_special`: leave control tokens out, as `Tokenizer.decode` does.

        RequestError names a stop string that is empty or no string.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._speller = detokenizer_for(tokenizer.backend)
        self._finder = StopFinder(stop)
        self._ends: deque[tuple[int, int]] = deque()
        self._written = 0
        self._fed = 0
        self._used: int | None = None
        self._finished = False

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, or None. Of several: the earliest start, then the shortest."""
        return self._finder.found

    @property
    def tokens_used(self) -> int:
        """How many of the fed ids the text needs.

        Without a stop: all that were fed. After a stop: the length of the shortest beginning of the ids that decodes to
        the text before the stop string, and possibly more (0 if there is no text before it). Only whole characters
        count: where that text ends in replacement marks for broken bytes, it is the beginning from which those marks
        are certain.
        """
        return self._fed if self._used is None else self._used

    def feed(self, ids: Sequence[int]) -> str:
        """Take the next ids, any number of them; return the text that is newly certain. After a stop that is "".

        TextError names an id that is not in the vocabulary; then none of `ids` was taken. RequestError after `finish`.
        """
        if self._finished and self.stopped is None:
            raise RequestError(f"{len(ids)} ids were fed to a finished stream", hint="make a new StreamDecoder")
        text = ""
        for token in self._tokenizer.checked_ids(ids):
            if self.stopped is not None:
                break
            self._fed += 1
            if token not in self._skipped:
                text += self._write(self._speller.push(token, self._fed))
        return text

    def finish(self) -> str:
        """No more ids come: return the rest. An unfinished character appears as `Tokenizer.decode` has it."""
        if self._finished:
            return ""
        self._finished = True
        text = self._write(self._speller.flush()) + self._finder.finish()
        self._count_used()
        return text

    def _write(self, units: list[TextChunk]) -> str:
        text = ""
        for unit in units:
            if self.stopped is not None or not unit.text:
                continue
            self._written += len(unit.text)
            self._ends.append((self._written, unit.token_index))
            text += self._finder.feed(unit.text)
            # The text before a stop string is never shorter than what was released.
            while self._ends[0][0] < self._finder.released:
                self._ends.popleft()
        self._count_used()
        return text

    def _count_used(self) -> None:
        if self.stopped is not None and self._used is None:
            length = self._finder.released
            self._used = next(place for end, place in self._ends if end >= length) if length else 0
