"""The model's turn in a conversation: the thinking budget, and the retry of an empty answer.

    turn     <|channel>thought\\n....... <channel|> The answer. <turn|>
                             |-- budget --|                              closed at the token where it is spent

Both override what the model wrote, and depend on token ids alone:

- thinking budget: where the reasoning has used up its tokens, its canvas is cut, the closing token is committed there,
  and the next canvas begins the answer; no other reasoning can be opened from there on;
- empty answer: a canvas that ends the turn without any content is denoised again from new noise, and at the position
  where the answer should have begun, the ids that end a turn and the blank token that was there are banned.

Invariant: the result is a function of the turn's own tokens, so a chat in a batch equals the same chat alone.
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
"""How many retries the canvases of one answer have in total."""


@final
@dataclass(frozen=True)
class ThinkingProgress:
    """The state of a turn: the open section, reasoning tokens so far, and whether the answer has any content."""

    section: Section = "answer"
    spent: int = 0
    has_content: bool = False


@final
class ChatOutputProcessor:
    """A `decoding.OutputProcessor`: its parser reads the tokens; its progress decides on cuts and retries.

    `budget`: most reasoning tokens. `may_call`: whether a call may begin. `retries`: most canvases that are denoised
    again.
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
        may_call: bool = True,
        retries: int,
    ) -> None:
        self._tokenizer, self._controls, self._parser, self._progress = tokenizer, controls, parser, progress
        self._stop_ids, self._budget, self._may_call, self._retries = stop_ids, budget, may_call, retries
        self._too_early: dict[int, set[int]] = {}
        self._cut_at: int | None = None
        self._thought_cut = self._ended = False

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
        """Banned ids and their positions: of a retry, and everywhere calls that may not be, and new reasoning once its
        budget is spent."""
        banned: dict[int, Container[int]] = dict(self._too_early)
        if self._controls.thought is not None and self._is_spent(self._progress):
            banned[self._controls.thought] = range(sys.maxsize)
        if self._controls.call is not None and not self._may_call:
            banned[self._controls.call] = range(sys.maxsize)
        return banned

    def cut(self, tokens: list[int]) -> list[int]:
        """All tokens; or those up to the budget's end, then the closing token; or those before another reasoning."""
        progress, end = self._progress, self._controls.thought_end
        self._cut_at = None
        for position, token in enumerate(tokens):
            after = self._after(progress, token)
            if after.section == "thought" and self._is_spent(progress):
                # Outside of reasoning this token would open one: it is banned in the next canvas, which starts here.
                return self._closed(tokens[:position], end) if progress.section == "thought" else tokens[:position]
            progress = after
        return self._closed(tokens, end) if progress.section == "thought" and self._is_spent(progress) else tokens

    def should_retry(self, tokens: list[int]) -> bool:
        """Whether the answer is empty so far; then ids that end a turn, and the blank there, may not begin it."""
        progress, opening = self._progress, len(tokens) - 1
        for position, token in enumerate(tokens):
            progress = self._after(progress, token)
            if progress.section != "thought" and token != self._controls.thought_end:
                opening = min(opening, position)
        if progress.has_content or not self._retries:
            return False
        self._retries -= 1
        for token in {*self._stop_ids, tokens[opening]}:
            self._too_early.setdefault(token, set()).add(opening)
        return True

    def take(self, tokens: list[int]) -> list[Piece]:
        before = self._parser.tokens_used
        pieces = self._parser.feed(tokens)
        self._ended = bool(tokens) and tokens[-1] in self._stop_ids
        # A stop string may have begun in an earlier canvas; then none of these tokens are used.
        used = tokens[: max(0, self._parser.tokens_used - before)]
        for token in used:
            self._progress = self._after(self._progress, token)
        self._thought_cut |= self._cut_at == len(used)
        self._too_early, self._cut_at = {}, None
        return pieces

    def finish(self) -> list[Piece]:
        return self._parser.finish(cut=not self._ended)

    def _closed(self, tokens: list[int], end: int | None) -> list[int]:
        assert end is not None
        self._cut_at = len(tokens) + 1
        return [*tokens, end]

    def _is_spent(self, progress: ThinkingProgress) -> bool:
        return self._budget is not None and progress.spent >= self._budget

    def _after(self, progress: ThinkingProgress, token: int) -> ThinkingProgress:
        section = self._controls.section_after([token], progress.section)
        # An id that ends the turn inside reasoning does not count as part of it.
        inside = progress.section == section == "thought" and token not in self._stop_ids
        has_content = progress.has_content or (section != "thought" and self._is_content(token))
        return ThinkingProgress(section, progress.spent + inside, has_content)

    def _is_content(self, token: int) -> bool:
        """Whether a token outside of reasoning is content: text that is not blank, or the beginning of a call."""
        if token == self._controls.call:
            return True
        return token not in self._stop_ids and bool(self._tokenizer.decode([token]).strip())
