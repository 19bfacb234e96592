"""From the messages or the prompt of a client to the requests of the engine.

Invariant: nothing that a client writes reads a file of this machine: images come as `data:` addresses, or from the
network where the server allows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from blockpress import sudoku
from blockpress.engine import Request
from blockpress.errors import PuzzleError, TextError
from blockpress.lm import LM
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import Refusals
from blockpress.serve.images import fetched
from blockpress.serve.options import ServeOptions

_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.I)
_IMAGE_KEYS = {"image_url": "image", "video_url": "video", "image": "image", "video": "video", "input_image": "image"}
_DROPPED = ("name", "refusal", "audio", "function_call", "prefix", "partial", "id", "status")
"""Keys of messages that clients send back and that say nothing to a model; where they do, the client is told."""


def has_template(lm: LM) -> bool:
    """Whether the checkpoint has a chat template; one without is prompted by the last message alone."""
    return lm.tokenizer is not None and lm.tokenizer.chat_template is not None


def chat_requests(
    lm: LM, messages: Sequence[Mapping[str, Any]], refusals: Refusals, options: ServeOptions, **asked: Any
) -> list[Request]:
    """The requests of a chat: a list of seeds gives one for each.

    Raises:
        RequestError: a message, a tool or a field that is wrong; it is named.
    """
    if has_template(lm):
        return lm.build_chat_requests(plain_messages(messages, refusals, options), **asked)
    for name in ("tools", "thinking"):
        if asked.pop(name, None):
            refusals.refuse(name, True, "the model has no chat template")
    for name in ("thinking_budget", "soft_tokens", "retry_empty", "tool_choice", "parallel_tool_calls"):
        asked.pop(name, None)
    seed = asked.pop("seed")
    return lm.build_requests(last_text(lm, messages), seed=seed, **asked)


def last_text(lm: LM, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a model without a chat template: the last message's text, or the Sudoku in it.

    Raises:
        RequestError: there is no text, or the model has no tokens for it.
    """
    texts = [_text(message.get("content")) for message in messages if message.get("role") in ("user", "developer")]
    if not texts or not texts[-1].strip():
        raise _FieldError("messages", "messages has no text of a user", "add a message of role user with a text")
    return puzzle_or_text(lm, texts[-1])


def puzzle_or_text(lm: LM, text: str) -> str:
    """The text, or the Sudoku in it where the model has no tokens for the rest. Raises _FieldError: neither."""
    try:
        lm.encode(text)
        return text
    except TextError as error:
        found = re.search(r"(?:[\d._*][\s|+-]*){81}", text)
        try:
            return sudoku.layout(sudoku.parse_puzzle(found[0] if found else text))
        except PuzzleError:
            raise _FieldError("messages", f"the prompt cannot be read: {error.message}", error.hint) from error


def plain_messages(
    messages: Sequence[Mapping[str, Any]], refusals: Refusals, options: ServeOptions
) -> list[dict[str, Any]]:
    """Messages as `LM.chat` takes them: images as data, and without what says nothing to a model."""
    images = 0
    plain = []
    for number, message in enumerate(messages):
        kept = {key: value for key, value in message.items() if value is not None or key == "content"}
        for key in _DROPPED:
            if key in kept and not (key == "name" and kept.get("role") == "tool"):
                value = kept.pop(key)
                if value not in (None, "", {}, []) and key in ("name", "refusal", "audio", "function_call"):
                    refusals.warnings.append(f"messages[{number}].{key} is not shown to the model")
        if kept.get("role") == "function":
            raise _FieldError(f"messages[{number}].role", "the role function is no longer used", "use role tool")
        content = kept.get("content")
        if isinstance(content, list):
            kept["content"] = [
                _part(part, f"messages[{number}].content[{place}]", options) for place, part in enumerate(content)
            ]
            shown = (part.get("type") for part in kept["content"] if isinstance(part, Mapping))
            images += sum(kind in ("image_url", "video_url") for kind in shown)
        plain.append(kept)
    if images > options.max_images:
        raise _FieldError("messages", f"messages have {images} images", f"send at most {options.max_images}")
    return plain


def _part(part: Any, at: str, options: ServeOptions) -> Any:
    """A part of a content; an image's source must be data, never a path of this machine."""
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if not isinstance(kind, str) or kind not in _IMAGE_KEYS:
        return dict(part)
    field = str(kind) if kind != "input_image" else "image_url"
    source = part.get(field)
    address = source.get("url") if isinstance(source, Mapping) else source
    if not isinstance(address, str):
        raise _FieldError(f"{at}.{field}", f"{at}.{field} has no address", "give data:image/png;base64,...")
    if not _DATA.match(address[:100]):
        address = fetched(address, f"{at}.{field}", options)
    plural = _IMAGE_KEYS[field]
    return {"type": f"{plural}_url", f"{plural}_url": {"url": address}}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def prompt_of(lm: LM, prompt: Any, field: str) -> str | list[int]:
    """One prompt of a completion: text or token ids. Raises RequestError: it is neither, or empty."""
    if isinstance(prompt, str):
        return puzzle_or_text(lm, prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return prompt
    raise _FieldError(field, f"{field} is {prompt!r:.80}", "give a text or a list of token ids")
