"""The model's turn in a conversation: what is special about how it is written.

    turn     <|channel>thought\\n....... <channel|> The answer. <turn|>
                             |-- budget --|                              closed at the token where it is spent

Two things go another way than the model would have it, both decided by token ids alone:

- the thinking budget: where a thought has as many tokens as it may, its canvas is cut, the closing token is committed
  there, and the next canvas begins the answer; no other thought can be opened from there on;
- the empty answer: a canvas that ends the turn before it said anything is written again from fresh noise, and the place
  where its answer should have begun may not take the ids that end a turn, and the blank that stood there.

Invariant: what a turn does is a function of its own tokens, so a chat in a batch is the chat alone.
Run it:  python -m pytest tests/chat
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import final

from blockpress.chat.parser import Piece, Section, SpecialTokens, TurnParser
from blockpress.text import Tokenizer

RETRIES = 3
"""How many times in all the canvases of one answer are begun again."""


@final
@dataclass(frozen=True)
class ThinkingProgress:
    """Where a turn is: what is open, tokens inside thoughts so far, and whether anything has been said."""

    section: Section = "answer"
    spent: int = 0
    said: bool = False


@final
class ChatOutputProcessor:
    """A `decoding.OutputProcessor`: its parser reads the tokens, its progress decides.

    `retries`: how often it may begin again.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        controls: SpecialTokens,
        parser: TurnParser,
        progress: ThinkingProgress,
        *,
        stop_ids: tuple[int, ...],
        budget: int | None,
        retries: int,
    ) -> None:
        self._tokenizer, self._controls, self._parser, self._progress = tokenizer, controls, parser, progress
        self._stop_ids, self._budget, self._retries = stop_ids, budget, retries
        self._too_early: dict[int, set[int]] = {}
        self._cut_at: int | None = None
        self._thought_cut = False

    @property
    def has_text(self) -> bool:
        return True

    @property
    def stopped(self) -> str | None:
        return self._parser.stopped

    @property
    def tokens_used(self) -> int:
        return self._parser.tokens_used

    @property
    def counts(self) -> tuple[int, bool]:
        return self._progress.spent, self._thought_cut

    @property
    def banned_ids(self) -> Mapping[int, Container[int]]:
        """What stood where the answer should have begun; and everywhere, once the budget is spent, another thought."""
        banned: dict[int, Container[int]] = dict(self._too_early)
        if self._controls.thought is not None and self._is_spent(self._progress):
            banned[self._controls.thought] = range(sys.maxsize)
        return banned

    def cut(self, tokens: list[int]) -> list[int]:
        """All tokens, or those up to the budget's end with the thought closed behind them, or up to another thought."""
        progress, end = self._progress, self._controls.thought_end
        self._cut_at = None
        for place, token in enumerate(tokens):
            after = self._after(progress, token)
            if after.section == "thought" and self._is_spent(progress):
                # Outside of a thought this token would open one: the next canvas is banned it, and goes on from here.
                return self._closed(tokens[:place], end) if progress.section == "thought" else tokens[:place]
            progress = after
        return self._closed(tokens, end) if progress.section == "thought" and self._is_spent(progress) else tokens

    def should_retry(self, tokens: list[int]) -> bool:
        """If nothing has been said; then neither a turn's end nor the blank that stood there may open the answer."""
        progress, opening = self._progress, len(tokens) - 1
        for place, token in enumerate(tokens):
            progress = self._after(progress, token)
            if progress.section != "thought" and token != self._controls.thought_end:
                opening = min(opening, place)
        if progress.said or not self._retries:
            return False
        self._retries -= 1
        for token in {*self._stop_ids, tokens[opening]}:
            self._too_early.setdefault(token, set()).add(opening)
        return True

    def take(self, tokens: list[int]) -> list[Piece]:
        before = self._parser.tokens_used
        pieces = self._parser.feed(tokens)
        # A stop text may have begun in an earlier canvas; then none of these are needed.
        used = tokens[: max(0, self._parser.tokens_used - before)]
        for token in used:
            self._progress = self._after(self._progress, token)
        self._thought_cut |= self._cut_at == len(used)
        self._too_early, self._cut_at = {}, None
        return pieces

    def finish(self) -> list[Piece]:
        return self._parser.finish()

    def _closed(self, tokens: list[int], end: int | None) -> list[int]:
        assert end is not None
        self._cut_at = len(tokens) + 1
        return [*tokens, end]

    def _is_spent(self, progress: ThinkingProgress) -> bool:
        return self._budget is not None and progress.spent >= self._budget

    def _after(self, progress: ThinkingProgress, token: int) -> ThinkingProgress:
        section = self._controls.section_after([token], progress.section)
        # The id that ends the turn inside a thought is no part of it.
        inside = progress.section == section == "thought" and token not in self._stop_ids
        said = progress.said or (section != "thought" and self._says(token))
        return ThinkingProgress(section, progress.spent + inside, said)

    def _says(self, token: int) -> bool:
        """Whether a token outside of thoughts is content: text that is not blank, or the beginning of a call."""
        if token == self._controls.call:
            return True
        return token not in self._stop_ids and bool(self._tokenizer.decode([token]).strip())
