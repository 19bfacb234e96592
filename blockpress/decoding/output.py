"""How an answer's tokens become output: as one text, or by a processor that knows more about them.

Invariant: an output processor belongs to one row and is given each of its returned tokens once, in order.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Protocol, final, runtime_checkable

from blockpress.chat import Piece, TextDelta


@runtime_checkable
class Decoder(Protocol):
    """Decodes a growing list of tokens into text; `text.StreamDecoder` is one."""

    @property
    def stopped(self) -> str | None: ...

    @property
    def tokens_used(self) -> int: ...

    def feed(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


@runtime_checkable
class OutputProcessor(Protocol):
    """What is specific to one answer: how its tokens become output, and where it departs from what the model wrote.

    `TextOutputProcessor` makes one text of them; `chat.ChatOutputProcessor` knows thoughts and tool calls.
    """

    @property
    def stopped(self) -> str | None:
        """The stop text that ended the answer."""
        ...

    @property
    def has_text(self) -> bool:
        """Whether the tokens are decoded to text at all."""
        ...

    @property
    def tokens_used(self) -> int:
        """How many of the taken tokens belong to the answer; fewer than all if a stop text cut it."""
        ...

    @property
    def banned_ids(self) -> Mapping[int, Container[int]]:
        """Ids that the next canvas must not hold, and at which positions."""
        ...

    @property
    def counts(self) -> tuple[int, bool]:
        """Tokens inside thoughts so far, and whether one was closed by its budget."""
        ...

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens of a canvas that count; if some are dropped, the answer continues after them with a new canvas."""
        ...

    def should_retry(self, tokens: list[int]) -> bool:
        """Whether a canvas that ended the answer, with these tokens, should be written again."""
        ...

    def take(self, tokens: list[int]) -> list[Piece]:
        """Take returned tokens; gives the output that is now final."""
        ...

    def finish(self) -> list[Piece]:
        """No more tokens follow; gives the rest of the output."""
        ...


@final
class TextOutputProcessor:
    """An answer that is one text, or just tokens if there is no decoder."""

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


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common prefix.

    >>> common_prefix([5, 6, 7], [5, 6, 8, 9])
    2
    """
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
