"""A conversation, as the model reads it: messages become token ids and pictures, by the checkpoint's own template.

    <|turn>user\\n...<turn|>\\n<|turn>model\\n

Invariant: a conversation is read alike alone and among others; what is wrong with it is said by name.
Run it:  python -m pytest tests/chat
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from blockpress.chat.messages import Media
from blockpress.chat.parser import SpecialTokens, TurnParser
from blockpress.chat.prompt import encode_chat
from blockpress.chat.template import ChatTemplate
from blockpress.chat.turn import RETRIES, ChatOutputProcessor, ThinkingProgress
from blockpress.config import ModelConfig
from blockpress.config.checks import is_count
from blockpress.config.vision import BUDGETS, PictureSettings
from blockpress.errors import BlockpressError, CheckpointError, RequestError
from blockpress.multimodal import (
    ImageSpan,
    ProcessedImage,
    Video,
    expand,
    insert_placeholders,
    prepare_images,
    prepare_videos,
)
from blockpress.text import Tokenizer


@final
@dataclass(frozen=True, kw_only=True)
class EncodedChat:
    """A conversation as the model reads it: token ids, and the pictures whose soft tokens stand at `image_spans`."""

    ids: list[int]
    pictures: list[ProcessedImage]
    image_spans: list[ImageSpan]


@final
class Chat:
    """How a checkpoint talks: its template, its control tokens, and how pictures are put before it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        config: ModelConfig,
        settings: Callable[[], PictureSettings],
    ) -> None:
        self.tokenizer, self.template, self._config, self._read_settings = tokenizer, template, config, settings

    @classmethod
    def of(
        cls, tokenizer: Tokenizer | None, path: Path, config: ModelConfig, settings: Callable[[], PictureSettings]
    ) -> Chat:
        """Of the checkpoint in `path`; `settings` reads how its pictures are prepared, once one is shown.

        Raises:
            CheckpointError: it has no chat template. TextError: the template is wrong.
        """
        template = None if tokenizer is None else ChatTemplate.of(tokenizer)
        if tokenizer is None or template is None:
            raise CheckpointError(
                f"{path} has no chat template", hint="give the whole prompt to generate, or add chat_template.jinja"
            )
        return cls(tokenizer, template, config, settings)

    @cached_property
    def controls(self) -> SpecialTokens:
        return SpecialTokens.of(self.tokenizer)

    @cached_property
    def _settings(self) -> PictureSettings:
        return self._read_settings()

    def encode_all(
        self,
        conversations: Sequence[Any],
        many: bool = True,
        *,
        tools: Any = None,
        thinking: bool = False,
        soft_tokens: int | None = None,
    ) -> list[EncodedChat]:
        """Each conversation as the model reads it.

        RequestError, TextError: what is wrong with one, by name, and where there are `many`, by its number.
        """
        asked = []
        for number, messages in enumerate(conversations):
            try:
                asked.append(self.encode(messages, tools=tools, thinking=thinking, soft_tokens=soft_tokens))
            except BlockpressError as error:
                if not many:
                    raise
                raise type(error)(f"conversation {number}: {error.message}", hint=error.hint) from error
        return asked

    def encode(
        self, messages: Any, *, tools: Any = None, thinking: bool = False, soft_tokens: int | None = None
    ) -> EncodedChat:
        """One conversation as the model reads it. RequestError, TextError: what is wrong with it, by name.

        `soft_tokens`: most tokens that an image, or a frame of a video, becomes; None: as the checkpoint says.
        """
        if thinking and self.controls.thought is None:
            raise RequestError("thinking is True", hint="this model has no token for thoughts; leave thinking out")
        if tools and self.controls.call is None:
            raise RequestError(
                f"tools is {tools!r:.60}", hint="this model has no token for tool calls; leave tools out"
            )
        pictures: list[ProcessedImage] = []

        def show(text: str, media: tuple[Media, ...]) -> str:
            if self._config.vision is None or not self._config.has_canvas:
                raise RequestError(
                    f"{media[0].field} is of type {media[0].kind!r}", hint="this model sees nothing: leave pictures out"
                )
            images = [_opened(one, self._settings, soft_tokens) for one in media if one.kind == "image"]
            videos = [_played(one, self._settings, soft_tokens) for one in media if one.kind == "video"]
            text, shown = insert_placeholders(text, images, videos)
            pictures.extend(shown)
            return text

        prompt = encode_chat(self.tokenizer, self.template, messages, tools=tools, thinking=thinking, lay_out=show)
        if not pictures:
            return EncodedChat(ids=prompt.ids, pictures=[], image_spans=[])
        placed = expand(prompt.ids, [picture.soft_tokens for picture in pictures], self._config)
        return EncodedChat(ids=placed.ids, pictures=pictures, image_spans=placed.image_spans)

    def output_processor(
        self,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int],
        thinking_budget: int | None = None,
        retry_empty: bool = True,
    ) -> ChatOutputProcessor:
        """What reads the answer behind a prompt. `thinking_budget`: most tokens inside thoughts; None: any number."""
        begin = ThinkingProgress(section=self.controls.section_after(prompt))
        parser = TurnParser(self.tokenizer, self.controls, stop=stop, section=begin.section)
        return ChatOutputProcessor(
            self.tokenizer,
            self.controls,
            parser,
            begin,
            stop_ids=tuple(stop_ids),
            budget=thinking_budget,
            retries=RETRIES if retry_empty else 0,
        )


def _opened(media: Media, settings: PictureSettings, soft_tokens: int | None) -> ProcessedImage:
    with _named(media.field):
        return prepare_images([media.source], settings, soft_tokens)[0]


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
