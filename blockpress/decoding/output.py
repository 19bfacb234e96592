"""How an answer's tokens are read: as one text, or by somebody who knows more about them.

Invariant: a turn belongs to one row and is told each of its returned tokens once, in order.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Protocol, final, runtime_checkable

from blockpress.chat import Piece, TextDelta


@runtime_checkable
class Decoder(Protocol):
    """Text of a growing list of tokens; `text.StreamDecoder` is one."""

    @property
    def stopped(self) -> str | None: ...

    @property
    def tokens_used(self) -> int: ...

    def feed(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


@runtime_checkable
class OutputProcessor(Protocol):
    """What is special about an answer: how its tokens are read, and where it goes another way than the model would.

    `TextOutputProcessor` reads them as one text; `chat.ChatOutputProcessor` knows thoughts and tool calls.
    """

    @property
    def stopped(self) -> str | None:
        """The stop text that ended the answer."""
        ...

    @property
    def has_text(self) -> bool:
        """Whether the tokens become text at all."""
        ...

    @property
    def tokens_used(self) -> int:
        """How many of the taken tokens the answer needs; fewer than all behind a stop text."""
        ...

    @property
    def banned_ids(self) -> Mapping[int, Container[int]]:
        """Ids that the next canvas must not hold, and at which places."""
        ...

    @property
    def counts(self) -> tuple[int, bool]:
        """Tokens inside thoughts so far, and whether one was closed by its budget."""
        ...

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens of a canvas that count. Where they are not all, the answer goes on behind them, with a canvas."""
        ...

    def should_retry(self, tokens: list[int]) -> bool:
        """Whether a canvas that ended the answer, with these tokens, is to be written once more."""
        ...

    def take(self, tokens: list[int]) -> list[Piece]:
        """Tokens that are returned; what they say that is newly certain."""
        ...

    def finish(self) -> list[Piece]:
        """No more tokens come; the rest of what they say."""
        ...


@final
class TextOutputProcessor:
    """An answer that is one text, or, without a decoder, tokens alone."""

    def __init__(self, decoder: Decoder | None) -> None:
        self._decoder = decoder
        self.has_text = decoder is not None
        self.banned_ids: Mapping[int, Container[int]] = {}
        self.counts = (0, False)

    @property
    def stopped(self) -> str | None:
        return None if self._decoder is None else self._decoder.stopped

    @property
    def tokens_used(self) -> int:
        return 0 if self._decoder is None else self._decoder.tokens_used

    def cut(self, tokens: list[int]) -> list[int]:
        return tokens

    def should_retry(self, tokens: list[int]) -> bool:
        return False

    def take(self, tokens: list[int]) -> list[Piece]:
        text = "" if self._decoder is None else self._decoder.feed(tokens)
        return [TextDelta("answer", text)] if text else []

    def finish(self) -> list[Piece]:
        text = "" if self._decoder is None else self._decoder.finish()
        return [TextDelta("answer", text)] if text else []
