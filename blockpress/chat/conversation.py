"""A conversation as the model reads it: messages become token ids and pictures, by the checkpoint's own template.

    <|turn>user\\n...<turn|>\\n<|turn>model\\n

Invariant: a conversation is encoded the same alone and in a batch; an error names the field that is wrong.
Run it:  python -m pytest tests/chat
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

from blockpress.chat.messages import Media, check_tools
from blockpress.chat.parser import SpecialTokens, TurnParser
from blockpress.chat.prompt import encode_chat
from blockpress.chat.template import ChatTemplate
from blockpress.chat.turn import RETRIES, ChatOutputProcessor, ThinkingProgress
from blockpress.config import ModelConfig
from blockpress.config.checks import is_count, value_text
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
    """A conversation as the model reads it: token ids, and the pictures whose soft tokens are at `image_spans`."""

    ids: list[int]
    pictures: list[ProcessedImage]
    image_spans: list[ImageSpan]


@final
class Chat:
    """A checkpoint's chat format: its template, its control tokens, and its image settings."""

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
        """For the checkpoint at `path`; `settings` reads its image settings, called with the first image.

        Raises:
            CheckpointError: it has no chat template. TextError: the template is invalid.
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

    def opening(self, prompt: Sequence[int], thinking: bool) -> Literal["answer", "blank", "thought", "open"]:
        """What comes before the answer to a prompt: the rest of a thought that it has begun; a thought, where the model
        is asked to think; otherwise perhaps a blank one, unless the prompt has closed one already."""
        controls = self.controls
        if controls.section_after(prompt) == "thought":
            return "open"
        if thinking:
            return "thought"
        return "answer" if controls.thought is None or prompt[-1] == controls.thought_end else "blank"

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
        """Encode each conversation.

        Raises RequestError, TextError: they name what is wrong and, with `many`, the conversation's number.
        """
        encoded = []
        for number, messages in enumerate(conversations):
            try:
                encoded.append(self.encode(messages, tools=tools, thinking=thinking, soft_tokens=soft_tokens))
            except BlockpressError as error:
                if not many:
                    raise
                raise type(error)(f"conversation {number}: {error.message}", hint=error.hint) from error
        return encoded

    def encode(
        self, messages: Any, *, tools: Any = None, thinking: bool = False, soft_tokens: int | None = None
    ) -> EncodedChat:
        """Encode one conversation. Raises RequestError, TextError: they name what is wrong.

        `soft_tokens`: most tokens of an image, or of a frame of a video; None: the checkpoint's own setting.
        """
        if thinking and self.controls.thought is None:
            raise RequestError("thinking is True", hint="this model has no token for thoughts; leave thinking out")
        if tools and self.controls.call is None:
            raise RequestError(
                f"tools is {tools!r:.60}", hint="this model has no token for tool calls; leave tools out"
            )
        pictures: list[ProcessedImage] = []

        def insert_media(text: str, media: tuple[Media, ...]) -> str:
            if self._config.vision is None or not self._config.has_canvas:
                raise RequestError(
                    f"{media[0].field} is of type {media[0].kind!r}", hint="this model sees nothing: leave pictures out"
                )
            images = [_load_image(item, self._settings, soft_tokens) for item in media if item.kind == "image"]
            videos = [_load_video(item, self._settings, soft_tokens) for item in media if item.kind == "video"]
            text, value_text = insert_placeholders(text, images, videos)
            pictures.extend(value_text)
            return text

        prompt = encode_chat(
            self.tokenizer, self.template, messages, tools=tools, thinking=thinking, insert_media=insert_media
        )
        if not pictures:
            return EncodedChat(ids=prompt.ids, pictures=[], image_spans=[])
        expanded = expand(prompt.ids, [picture.soft_tokens for picture in pictures], self._config)
        return EncodedChat(ids=expanded.ids, pictures=pictures, image_spans=expanded.image_spans)

    def output_processor(
        self,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int],
        thinking_budget: int | None = None,
        retry_empty: bool = True,
        tools: Any = None,
        may_call: bool = True,
        held: bool = False,
    ) -> ChatOutputProcessor:
        """The processor for the answer after a prompt.

        thinking_budget: most reasoning tokens; None: no limit. tools: as in the prompt; the arguments of a call get the
        types that its tool declares. may_call: False bans the token that begins a call. held: the answer is held to a
        constraint.
        """
        progress = ThinkingProgress(section=self.controls.section_after(prompt))
        functions = [tool["function"] for tool in check_tools(tools) or () if may_call]
        offered = {function["name"]: function.get("parameters", {}) for function in functions}
        parser = TurnParser(
            self.tokenizer, self.controls, stop=stop, section=progress.section, tools=offered, held=held
        )
        return ChatOutputProcessor(
            self.tokenizer,
            self.controls,
            parser,
            progress,
            stop_ids=tuple(stop_ids),
            budget=thinking_budget,
            may_call=may_call,
            retries=RETRIES if retry_empty else 0,
        )


def _load_image(media: Media, settings: PictureSettings, soft_tokens: int | None) -> ProcessedImage:
    with _named(media.field):
        return prepare_images([media.source], settings, soft_tokens)[0]


def _load_video(media: Media, settings: PictureSettings, soft_tokens: int | None) -> Video:
    with _named(media.field):
        return prepare_videos([media.source], settings, soft_tokens)[0]


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Add the field's name to an error from inside the block."""
    try:
        yield
    except BlockpressError as error:
        raise type(error)(f"{field}: {error.message}", hint=error.hint) from error


def check_options(thinking: Any, thinking_budget: Any, retry_empty: Any, soft_tokens: Any) -> None:
    """Raises RequestError: not a boolean, not a valid count, or a thinking budget while thinking is off."""
    if soft_tokens is not None and not (is_count(soft_tokens) and soft_tokens in BUDGETS):
        raise RequestError(
            f"soft_tokens is {value_text(soft_tokens)}",
            hint=f"soft_tokens must be one of {', '.join(map(str, BUDGETS))}, or None",
        )
    for name, value in {"thinking": thinking, "retry_empty": retry_empty}.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name} is {value_text(value)}", hint=f"{name} must be True or False")
    if thinking_budget is None:
        return
    if not is_count(thinking_budget):
        raise RequestError(
            f"thinking_budget is {value_text(thinking_budget)}",
            hint="thinking_budget must be a whole number of at least 1 token, or None",
        )
    if not thinking:
        raise RequestError(
            f"thinking_budget is {value_text(thinking_budget)} and thinking is off",
            hint="set thinking, or leave the budget out",
        )
