"""Where a hole meets the text around it: which of its tokens are re-cut, so that the joined text is cut as any other.

    before   ... inter na |hole        tokens at the end that begin longer ones are given as bytes, not as tokens
    after    hole| foo bar (x) ...     so are the first ones after the hole: a token may lie across the seam

Invariant: no text that a caller gives becomes a control token.
Run it:  python -m pytest tests/lm/test_infill.py
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cached_property
from typing import final

from blockpress.constrain.automaton import Expression
from blockpress.constrain.filling import region
from blockpress.constrain.tokens import TokenAutomaton, TokenBytes
from blockpress.text import Tokenizer

RECUT = 2
"""Tokens after a hole that may be cut otherwise next to it: with the published tokenizer one does not suffice in 7 % of
places in source code, two did in all of 400."""

KEPT = 16
"""Compiled regions that are kept."""


@final
class Seams:
    """The seams of one tokenizer. pieces: the bytes of its tokens, None for control tokens."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: TokenBytes, pieces: list[bytes | None]) -> None:
        self._tokenizer, self.vocabulary, self.pieces = tokenizer, vocabulary, pieces
        self._regions: dict[tuple[bytes, Expression, bytes], TokenAutomaton] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without control tokens. Raises TextError: the vocabulary cannot write it."""
        parts = [text] if self._controls is None else self._controls.split(text)
        return [token for part in parts for token in self._tokenizer.encode(part, add_special=False)]

    def before(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens before a hole, and those at their end that the hole may go on: together they begin longer ones."""
        ids, count, ending = self.encode(text), 0, b""
        for number, token in enumerate(reversed(ids), 1):
            ending = (self.pieces[token] or b"") + ending
            if not self._begins_another(ending):
                break
            count = number
        return ids[: len(ids) - count], ids[len(ids) - count :]

    def after(self, text: str) -> tuple[list[int], list[int]]:
        """The first tokens after a hole, whose bytes alone are given, and the others."""
        ids = self.encode(text)
        return ids[:RECUT], ids[RECUT:]

    def region(self, heal: list[int], hole: Expression, seam: list[int]) -> TokenAutomaton:
        """The automaton of a hole with its seams; the last few are kept."""
        first, last = (b"".join(self.pieces[token] or b"" for token in ids) for ids in (heal, seam))
        key = (first, hole, last)
        found = self._regions.pop(key, None) or region(first, hole, last, self.vocabulary)
        self._regions[key] = found
        if len(self._regions) > KEPT:
            self._regions.pop(next(iter([*self._regions])), None)  # another thread may do the same
        return found

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted(piece for piece in self.pieces if piece)

    @cached_property
    def _controls(self) -> re.Pattern[str] | None:
        """Splits a text after the first character of each control token that is written out in it."""
        backend = self._tokenizer.backend
        texts = [backend.id_to_token(token) or "" for token in sorted(self._tokenizer.special_ids)]
        longer = [re.escape(text[0]) + ")(?=" + re.escape(text[1:]) for text in texts if len(text) > 1]
        return re.compile("|".join(f"(?<={each})" for each in longer)) if longer else None

    def _begins_another(self, piece: bytes) -> bool:
        """Whether some token begins with these bytes and is longer."""
        place = bisect_right(self._sorted, piece)
        return place < len(self._sorted) and self._sorted[place].startswith(piece)
