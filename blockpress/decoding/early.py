"""Text before its canvas ends: the first tokens that have stopped changing are pinned, and their text is released.

    step      3    The cat sat ~~ mat .     argmax
    step      4    The cat sat on mat .
    step      5    The cat sat on the .     "The cat sat" was the same for `release` steps: pinned, and given out

A later step could change any token, also an accepted one; so what is given out is pinned, and nothing is taken back.
It is a rule of the sampler (`Sampling.release`), the same whether anybody listens to the events: an answer does not
depend on how it is read. Canvases with verifications or repairs release nothing early: the causal pass may change them.

Invariant: released pieces followed by those of the commit are those that the processor alone would give for the tokens.
Run it:  python -m pytest tests/decoding/test_early.py
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from typing import final

from blockpress.chat import Piece
from blockpress.decoding.events import Denoised
from blockpress.decoding.output import OutputProcessor, common_prefix


@final
class EarlyText:
    """An output processor that gives the output of a canvas's first tokens before the canvas ends.

    Args:
        processor: of the answer; it takes whole canvases. preview: another one like it, which takes tokens as they are
            released, and gives the output.
        steps: how many steps in a row a token must have stayed. entropy: nats that it may have at most, in the last.
    """

    def __init__(self, processor: OutputProcessor, preview: OutputProcessor, steps: int, entropy: float) -> None:
        self._processor, self._preview = processor, preview
        self._steps, self._entropy = steps, entropy
        self._stayed: list[int] = []
        self.released: list[int] = []
        """Tokens of the current canvas whose output has been given."""

    def step(self, denoised: Denoised, most: int, stop_ids: Collection[int]) -> list[Piece] | None:
        """The output that a step releases; None if it releases no token. `released` then holds its tokens too.

        Args:
            most: how many tokens of the canvas the answer has room for.
        """
        argmax, entropy, changed = (x.tolist() for x in (denoised.argmax, denoised.entropy, denoised.changed))
        before = self._stayed or [0] * len(argmax)
        self._stayed = [0 if new else count + 1 for new, count in zip(changed, before, strict=True)]
        end = start = len(self.released)
        while (
            end < most
            and self._stayed[end] >= self._steps
            and entropy[end] <= self._entropy
            and argmax[end] not in stop_ids
        ):
            end += 1
        if end == start:
            return None
        prefix = [*self.released, *argmax[start:end]]
        kept = prefix[: common_prefix(prefix, self._processor.cut(prefix))]
        if len(kept) <= start:
            return None
        self.released = kept
        return self._preview.take(kept[start:])

    @property
    def pins(self) -> Mapping[int, int]:
        """The tokens that the canvas must hold, also when it is denoised again: those whose output has been given."""
        return dict(enumerate(self.released))

    @property
    def stopped(self) -> str | None:
        return self._processor.stopped

    @property
    def has_text(self) -> bool:
        return self._processor.has_text

    @property
    def tokens_used(self) -> int:
        return self._processor.tokens_used

    @property
    def banned_ids(self) -> Mapping[int, Container[int]]:
        return self._processor.banned_ids

    @property
    def counts(self) -> tuple[int, bool]:
        return self._processor.counts

    def cut(self, tokens: list[int]) -> list[int]:
        return self._processor.cut(tokens)

    def should_retry(self, tokens: list[int]) -> bool:
        return self._processor.should_retry(tokens)

    def take(self, tokens: list[int]) -> list[Piece]:
        rest = tokens[len(self.released) :]
        self._stayed, self.released = [], []
        self._processor.take(tokens)
        return self._preview.take(rest)

    def finish(self) -> list[Piece]:
        self._processor.finish()
        return self._preview.finish()
