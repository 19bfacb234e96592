"""Where code stands in an answer: the tokens between lines of backticks or tildes, as Markdown fences it.

    Run this:        outside
    ```sh            the fence
    ls -l            code          the span
    ```              the fence

It is a rule for `Sampling.checked_spans`: what is verified or repaired may be code alone, where two tokens that do not
fit together cost most.

Source: CommonMark 0.31, fenced code blocks.
Run it:  python -m pytest tests/text/test_fences.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from blockpress.text.stream import StreamDecoder
from blockpress.text.tokenizer import Tokenizer

__all__ = ["CodeSpans"]

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")


@final
@dataclass(frozen=True)
class CodeSpans:
    """The code in fenced blocks, as (start, stop) pairs of places in the tokens; a block without an end goes to theirs.

    A token that holds the end of a fence's line and the beginning of the code is part of the code.
    """

    tokenizer: Tokenizer

    def __call__(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """TextError: an id outside of the vocabulary."""
        text, ends = self._decoded(ids)
        spans: list[tuple[int, int]] = []
        fence, begin, at = "", 0, 0
        for line in text.splitlines(keepends=True):
            found = _FENCE.match(line.rstrip("\r\n"))
            if found and not fence:
                fence, begin = found[1], at + len(line)
            elif found and found[1].startswith(fence) and not found[2].strip():
                spans.append((begin, at))
                fence = ""
            at += len(line)
        if fence:
            spans.append((begin, at))
        return [(_token_at(ends, start), _token_at(ends, stop - 1) + 1) for start, stop in spans if start < stop]

    def _decoded(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text, and for each token the length of the text that is final with it."""
        decoder, text, ends = StreamDecoder(self.tokenizer), "", list[int]()
        for token in ids:
            text += decoder.feed([token])
            ends.append(len(text))
        text += decoder.finish()
        return text, [*ends[:-1], len(text)] if ends else []


def _token_at(ends: Sequence[int], place: int) -> int:
    """The token that the character at a place came out with."""
    return next(token for token, end in enumerate(ends) if end > place)
