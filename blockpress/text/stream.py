"""Streaming decoding: token ids in, text out.

Why: a reader wants text as soon as it is final, never half a character, and nothing of a stop string.

Invariant: the joined output is `tokenizer.decode(all ids)`, cut before the first stop string, however ids were split.

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

    Each id is decoded once, together with one other, so the cost of a stream is linear in its length. Held back are at
    most an unfinished character, a run of byte tokens, and the beginning of a stop string. (The text of decoders that
    may rewrite all of it at the end, such as CTC, is held back to the end.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special: bool = True) -> None:
        """`stop`: strings that end the text. `skip_special`: skip control tokens, as `Tokenizer.decode` does.

        Raises RequestError, which names a stop string that is empty or not a string.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._detokenizer = detokenizer_for(tokenizer.backend)
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
        """How many of the ids taken so far the text needs.

        Without a stop: all of them. After a stop: the length of the shortest prefix of the ids that decodes to the text
        before the stop string, and possibly more (0 if there is no text before it). Only whole characters count: where
        that text ends in replacement characters for broken bytes, it is the prefix after which those are final.
        """
        return self._fed if self._used is None else self._used

    def feed(self, ids: Sequence[int]) -> str:
        """Take the next ids, any number of them; return the text that is newly final. After a stop that is "".

        Raises TextError, which names an id that is not in the vocabulary; then none of `ids` was taken. RequestError
        after `finish`.
        """
        if self._finished and self.stopped is None:
            raise RequestError(f"{len(ids)} ids were fed to a finished stream", hint="make a new StreamDecoder")
        text = ""
        for token in self._tokenizer.checked_ids(ids):
            if self.stopped is not None:
                break
            self._fed += 1
            if token not in self._skipped:
                text += self._write(self._detokenizer.push(token, self._fed))
        return text

    def finish(self) -> str:
        """End the stream: return the rest. An unfinished character is decoded as `Tokenizer.decode` does."""
        if self._finished:
            return ""
        self._finished = True
        text = self._write(self._detokenizer.flush()) + self._finder.finish()
        self._count_used()
        return text

    def _write(self, chunks: list[TextChunk]) -> str:
        text = ""
        for chunk in chunks:
            if self.stopped is not None or not chunk.text:
                continue
            self._written += len(chunk.text)
            self._ends.append((self._written, chunk.token_index))
            text += self._finder.feed(chunk.text)
            # The text before a stop string is never shorter than the released text.
            while self._ends[0][0] < self._finder.released:
                self._ends.popleft()
        self._count_used()
        return text

    def _count_used(self) -> None:
        if self.stopped is not None and self._used is None:
            length = self._finder.released
            self._used = next(index for end, index in self._ends if end >= length) if length else 0
