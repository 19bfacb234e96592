"""A conversation and the model's turn in it: messages to rows, and what is special about a turn.

    prompt   <|turn>user\\n...<turn|>\\n<|turn>model\\n                     by the checkpoint's own template
    turn     <|channel>thought\\n....... <channel|> The answer. <turn|>
                             |-- budget --|                              closed at the token where it is spent

Two things go another way than the model would have it, both decided by token ids alone:

- the thinking budget: where a thought has as many tokens as it may, its canvas is cut, the closing token is committed
  there, and the next canvas begins the answer; no other thought can be opened from there on;
- the empty answer: a canvas that ends the turn before it said anything is written again from fresh noise, and the place
  where its answer should have begun is denied the ids that end a turn, and the blank that stood there.

Invariant: what a turn does is a function of its own tokens, so a chat in a batch is the chat alone.
Run it:  python -m pytest tests/test_chat.py
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from blockpress.config import ModelConfig
from blockpress.config.checks import is_count
from blockpress.config.vision import BUDGETS, PictureSettings
from blockpress.errors import BlockpressError, CheckpointError, RequestError
from blockpress.sight import Picture, Run, Video, expand, lay_out, prepare, prepare_videos
from blockpress.text import ChatTemplate, Controls, Media, Piece, Section, Tokenizer, TurnParser, encode_chat
from blockpress.weights import load_picture_settings

RETRIES = 3
"""How many times in all the canvases of one answer are begun again."""


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation as the model reads it: token ids, and the pictures whose soft tokens stand at `runs`."""

    ids: list[int]
    pictures: list[Picture]
    runs: list[Run]


@final
class Chat:
    """How a checkpoint talks: its template, its control tokens, and how pictures are put before it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, path: Path, config: ModelConfig) -> None:
        self.tokenizer, self.template, self._path, self._config = tokenizer, template, path, config

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, path: Path, config: ModelConfig) -> Chat:
        """Of the checkpoint in `path`. CheckpointError if it has no chat template; TextError for a bad one."""
        template = None if tokenizer is None else ChatTemplate.of(tokenizer)
        if tokenizer is None or template is None:
            raise CheckpointError(
                f"{path} has no chat template", hint="give the whole prompt to generate, or add chat_template.jinja"
            )
        return cls(tokenizer, template, path, config)

    @cached_property
    def controls(self) -> Controls:
        return Controls.of(self.tokenizer)

    @cached_property
    def _settings(self) -> PictureSettings:
        return load_picture_settings(self._path, self._config)

    def questions(
        self,
        conversations: Sequence[Any],
        many: bool = True,
        *,
        tools: Any = None,
        thinking: bool = False,
        soft_tokens: int | None = None,
    ) -> list[Question]:
        """Each conversation as the model reads it.

        RequestError, TextError: what is wrong with one, by name, and where there are `many`, by its number.
        """
        asked = []
        for number, messages in enumerate(conversations):
            try:
                asked.append(self.question(messages, tools=tools, thinking=thinking, soft_tokens=soft_tokens))
            except BlockpressError as error:
                if not many:
                    raise
                raise type(error)(f"conversation {number}: {error.message}", hint=error.hint) from error
        return asked

    def question(
        self, messages: Any, *, tools: Any = None, thinking: bool = False, soft_tokens: int | None = None
    ) -> Question:
        """One conversation as the model reads it. RequestError, TextError: what is wrong with it, by name.

        `soft_tokens`: most tokens that an image, or a frame of a video, becomes; None: as the checkpoint says.
        """
        if thinking and self.controls.thought is None:
            raise RequestError("thinking is True", hint="this model has no token for thoughts; leave thinking out")
        if tools and self.controls.call is None:
            raise RequestError(
                f"tools is {tools!r:.60}", hint="this model has no token for tool calls; leave tools out"
            )
        pictures: list[Picture] = []

        def show(text: str, media: tuple[Media, ...]) -> str:
            if self._config.vision is None or not self._config.has_canvas:
                raise RequestError(
                    f"{media[0].field} is of type {media[0].kind!r}", hint="this model sees nothing: leave pictures out"
                )
            images = [_opened(one, self._settings, soft_tokens) for one in media if one.kind == "image"]
            videos = [_played(one, self._settings, soft_tokens) for one in media if one.kind == "video"]
            text, shown = lay_out(text, images, videos)
            pictures.extend(shown)
            return text

        prompt = encode_chat(self.tokenizer, self.template, messages, tools=tools, thinking=thinking, lay_out=show)
        if not pictures:
            return Question(ids=prompt.ids, pictures=[], runs=[])
        placed = expand(prompt.ids, [picture.soft_tokens for picture in pictures], self._config)
        return Question(ids=placed.ids, pictures=pictures, runs=placed.runs)

    def turn(
        self,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int],
        thinking_budget: int | None = None,
        retry_empty: bool = True,
    ) -> ChatTurn:
        """What reads the answer behind a prompt. `thinking_budget`: most tokens inside thoughts; None: any number."""
        begin = _Progress(section=self.controls.section_after(prompt))
        parser = TurnParser(self.tokenizer, self.controls, stop=stop, section=begin.section)
        return ChatTurn(
            self.tokenizer,
            self.controls,
            parser,
            begin,
            stop_ids=tuple(stop_ids),
            budget=thinking_budget,
            retries=RETRIES if retry_empty else 0,
        )


def _opened(media: Media, settings: PictureSettings, soft_tokens: int | None) -> Picture:
    with _named(media.field):
        return prepare([media.source], settings, soft_tokens)[0]


def _played(media: Media, settings: PictureSettings, soft_tokens: int | None) -> Video:
    with _named(media.field):
        return prepare_videos([media.source], settings, soft_tokens)[0]


@contextmanager
def _named(field: str) -> Iterator[None]:
    """An error from inside tells the field that it is about."""
    try:
        yield
    except BlockpressError as error:
        raise type(error)(f"{field}: {error.message}", hint=error.hint) from error


def check_options(thinking: Any, thinking_budget: Any, retry_empty: Any, soft_tokens: Any) -> None:
    """Raises RequestError: no truth value, no count, or a budget for thoughts that are switched off."""
    if soft_tokens is not None and not (is_count(soft_tokens) and soft_tokens in BUDGETS):
        raise RequestError(
            f"soft_tokens is {soft_tokens!r}",
            hint=f"soft_tokens must be one of {', '.join(map(str, BUDGETS))}, or None",
        )
    for name, value in {"thinking": thinking, "retry_empty": retry_empty}.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name} is {value!r}", hint=f"{name} must be True or False")
    if thinking_budget is None:
        return
    if not is_count(thinking_budget):
        raise RequestError(
            f"thinking_budget is {thinking_budget!r}",
            hint="thinking_budget must be a whole number of at least 1 token, or None",
        )
    if not thinking:
        raise RequestError(
            f"thinking_budget is {thinking_budget} and thinking is off", hint="set thinking, or leave the budget out"
        )


@final
@dataclass(frozen=True)
class _Progress:
    """Where a turn is: what is open, tokens inside thoughts so far, and whether anything has been said."""

    section: Section = "answer"
    spent: int = 0
    said: bool = False


@final
class ChatTurn:
    """A `reply.Turn`: its parser reads the tokens, its progress decides. `retries`: how often it may begin again."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        controls: Controls,
        parser: TurnParser,
        progress: _Progress,
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
    def denied(self) -> Mapping[int, Container[int]]:
        """What stood where the answer should have begun; and everywhere, once the budget is spent, another thought."""
        denied: dict[int, Container[int]] = dict(self._too_early)
        if self._controls.thought is not None and self._is_spent(self._progress):
            denied[self._controls.thought] = range(sys.maxsize)
        return denied

    def cut(self, tokens: list[int]) -> list[int]:
        """All tokens, or those up to the budget's end with the thought closed behind them, or up to another thought."""
        progress, end = self._progress, self._controls.thought_end
        self._cut_at = None
        for place, token in enumerate(tokens):
            after = self._after(progress, token)
            if after.section == "thought" and self._is_spent(progress):
                # Outside of a thought this token would open one: the next canvas is denied it, and goes on from here.
                return self._closed(tokens[:place], end) if progress.section == "thought" else tokens[:place]
            progress = after
        return self._closed(tokens, end) if progress.section == "thought" and self._is_spent(progress) else tokens

    def begins_again(self, tokens: list[int]) -> bool:
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

    def _is_spent(self, progress: _Progress) -> bool:
        return self._budget is not None and progress.spent >= self._budget

    def _after(self, progress: _Progress, token: int) -> _Progress:
        section = self._controls.section_after([token], progress.section)
        # The id that ends the turn inside a thought is no part of it.
        inside = progress.section == section == "thought" and token not in self._stop_ids
        said = progress.said or (section != "thought" and self._says(token))
        return _Progress(section, progress.spent + inside, said)

    def _says(self, token: int) -> bool:
        """Whether a token outside of thoughts is content: text that is not blank, or the beginning of a call."""
        if token == self._controls.call:
            return True
        return token not in self._stop_ids and bool(self._tokenizer.decode([token]).strip())
