"""Messages to the token ids of a prompt, by the checkpoint's template; no text of a message becomes a control token.

    given      {"role": "user", "content": "Type <turn|> to end"}
    marked     Type <#turn|> to end              # is a character that no message contains
    rendered   <|turn>user\\nType <#turn|> to end<turn|>\\n
    encoded    [<|turn>, user, \\n, Type, <]  [turn, |, >, to, end, <turn|>, \\n]

Why: a template renders one text, in which a `<turn|>` that a user typed looks like the one that ends the turn. So every
control token that is written out in a message is split before the template sees it, and encoded in two pieces.

Two things are done before that, and one after it. Thoughts that are written out in an assistant's content are left out,
as the published template does (ADR 0028). Content that this template cannot show, such as a list of texts, becomes one
text. And where the template ends in a closed turn, the model's own is opened.

Invariant: the control tokens of the ids are those that the template wrote, and the model's turn is open at their end.
Messages with none written out are encoded as one text, just as the checkpoint's own processor does.

Run: python -m pytest tests/chat/test_prompt.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from blockpress.chat.messages import Media, check_messages, check_tools
from blockpress.chat.parser import SpecialTokens
from blockpress.chat.schemas import plain_tools
from blockpress.chat.template import ChatTemplate
from blockpress.errors import RequestError, TextError
from blockpress.text.tokenizer import Tokenizer

__all__ = ["ChatPrompt", "encode_chat"]

PLACEHOLDERS = ("<|image|>", "<|video|>")
"""What templates write for an image or a video."""

_OPENED, _CLOSED = "<|turn>", "<turn|>"
_THOUGHT = re.compile(r"<\|channel>.*?(?:<channel\|>|\Z)|<channel\|>", re.DOTALL)

# Code points that Unicode will never assign to a character.
_MARKS = [*map(chr, range(0xFDD0, 0xFDF0)), *(chr(plane << 16 | 0xFFFF) for plane in range(1, 17))]


@final
@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """Token ids, and the images and videos in the order of their placeholders."""

    ids: list[int]
    media: tuple[Media, ...]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Any,
    *,
    tools: Any = None,
    thinking: bool = False,
    insert_media: Callable[[str, tuple[Media, ...]], str] | None = None,
) -> ChatPrompt:
    """The prompt of a conversation, ending where the model's turn begins.

    `insert_media`, called where there are images or videos, rewrites their placeholders in the rendered text; all of
    them are the template's.

    Raises RequestError, which names a field of `messages` or `tools`; TextError: the template refuses the messages, or
    leaves out an image.
    """
    checked, media = check_messages(messages)
    if "tool_calls" in checked[-1]:
        raise RequestError(
            f"messages[{len(checked) - 1}].tool_calls have no results, so there is nothing to go on from",
            hint="after a message with tool_calls comes a message of role tool for each of them",
        )
    declared = plain_tools(check_tools(tools))
    has_thoughts = SpecialTokens.of(tokenizer).thought is not None
    checked = [_fitted(message, template, has_thoughts) for message in checked]
    breaks = _Breaks(tokenizer, [checked, declared], placeholders=PLACEHOLDERS if media else ())
    text = template.render(breaks.apply(checked), tools=breaks.apply(declared), enable_thinking=thinking)
    if tokenizer.backend.token_to_id(_CLOSED) in tokenizer.special_ids:
        text = _opened(text, template, thinking)
    # Frames of a video are images: a video needs no token of its own, and not every vocabulary has one.
    has_placeholder = tokenizer.backend.token_to_id(PLACEHOLDERS[0]) is not None
    for kind, mark in zip(("image", "video"), PLACEHOLDERS, strict=True):
        shown = [item for item in media if item.kind == kind]
        places = text.count(mark) if has_placeholder else 0
        if shown and places != len(shown):
            raise TextError(
                f"{shown[0].field} is one of {len(shown)} {kind}s; the prompt has placeholders for {places}",
                hint=f"leave {kind}s out, or use a model whose chat template takes them",
            )
    if insert_media is not None and media:
        text = insert_media(text, tuple(media))
    ids = [number for part in text.split(breaks.mark) for number in tokenizer.encode(part, add_special=False)]
    return ChatPrompt(ids=ids, media=tuple(media))


def _fitted(message: dict[str, Any], template: ChatTemplate, has_thoughts: bool) -> dict[str, Any]:
    """The message with the content that this template reads."""
    role, content = message["role"], message["content"]
    if role == "assistant" and has_thoughts:
        content = _each_text(content, lambda text: _THOUGHT.sub("", text))
    if content is None:
        content = None if template.takes(role, None, "null") else "null"
    elif not isinstance(content, str) and all(part["type"] == "text" for part in content):
        parts = [{"type": "text", "text": "some words"}]
        content = content if template.takes(role, parts, "some words") else "".join(part["text"] for part in content)
    return {**message, "content": content}


def _each_text(content: str | list[dict[str, Any]], change: Callable[[str], str]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return change(content)
    return [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]


def _opened(text: str, template: ChatTemplate, thinking: bool) -> str:
    """The rendered text, ending in a turn of the model: templates leave it out after a result and text of one turn."""
    before, closed, after = text.rpartition(_CLOSED)
    if not closed or _OPENED in after:
        return text
    opening = template.generation_prompt(enable_thinking=thinking)
    return f"{before}{closed}\n" + (opening if _OPENED in opening else f"{_OPENED}model\n")


@final
class _Breaks:
    """Puts `mark`, a character that `values` do not contain, into control tokens and `placeholders` in their texts.

    A text that ends in the beginning of a control token gets one inside it too, since the next text may hold the rest.
    """

    def __init__(self, tokenizer: Tokenizer, values: Any, placeholders: Sequence[str]) -> None:
        special = (tokenizer.backend.id_to_token(token) for token in tokenizer.special_ids)
        controls = sorted({*placeholders, *(text for text in special if text is not None and len(text) > 1)})
        prefixes = {text[:length] for text in controls for length in range(1, len(text))}
        # A lookahead for each: tokens may overlap, and each is split after its first character.
        whole = "|".join(map(re.escape, controls))
        part = "|".join(map(re.escape, sorted(prefixes)))
        self._pattern = re.compile(f"(?=(?:{whole}))(.)|(?=(?:{part})\\Z)(.)", re.DOTALL) if controls else None
        used = {char for text in _texts(values) for char in text}
        self.mark = next((mark for mark in _MARKS if mark not in used), "")
        if not self.mark:
            raise RequestError(
                f"messages hold all of {len(_MARKS)} code points that stand for no character",
                hint="leave one of them out",
            )

    def apply(self, value: Any) -> Any:
        if isinstance(value, str):
            return value if self._pattern is None else self._pattern.sub(lambda match: match[0] + self.mark, value)
        if isinstance(value, Mapping):
            return {self.apply(key): self.apply(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.apply(entry) for entry in value]
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _texts(entry)
