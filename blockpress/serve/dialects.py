"""What the dialects of Anthropic, Ollama and OpenAI's responses share: a body becomes a chat, its events become parts.

    body --a dialect--> Talk --chat_job--> requests --events--> parts, reply --the dialect--> answer or stream

A dialect only translates: what a chat may hold is checked where OpenAI's route has it checked, and an error that comes
from there is told in the words of the client's body, since a `Talk` knows where each message came from.

Invariant: the parts of a stream, joined, are those of the whole answer, in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import Request
from pydantic import Field

from blockpress.chat import ToolCall
from blockpress.decoding import Done, Event, MalformedToolCallEvent, ReasoningDelta, Reply, Text, ToolCallEvent
from blockpress.errors import BlockpressError
from blockpress.lm.arguments import Mode
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import MOST_SEED, DiffusionFields, Fields, Refusals, TopK, TopP
from blockpress.serve.openai import Job, chat_job
from blockpress.serve.openai_types import ChatBody
from blockpress.serve.service import Running, Service, unless_gone


class DialectBody(Fields):
    """The fields that mean the same in every dialect; `seed`, `mode`, `diffusion` and `lenient` are our own."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED)] | None = None
    mode: Mode | None = None
    diffusion: DiffusionFields | None = None
    lenient: bool | None = None
    stream: bool | None = None


SHARED = ("model", "temperature", "top_p", "top_k", "seed", "mode", "diffusion", "lenient")


@dataclass
class Talk:
    """Messages in the shape of OpenAI's chats.

    places: where each came from in the client's body, such as input[3]. names: our names of fields, as patterns, and
    the client's.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, place: str, role: str, content: Any, **more: Any) -> None:
        """Add a message."""
        self.messages.append({"role": role, "content": content, **more})
        self.places.append(place)

    def told(self, text: str) -> str:
        """A text about our fields, in the words of the client's body."""

        def place(found: re.Match[str]) -> str:
            number = int(found[1])
            return self.places[number] if number < len(self.places) else found[0]

        text = re.sub(r"\bmessages\[(\d+)\]", place, text)
        for ours, theirs in self.names.items():
            text = re.sub(rf"(?<![\w.]){ours}(?=$|[:.\[]| is | must )", theirs, text)
        return text


def dialect_job(service: Service, body: DialectBody, talk: Talk, refusals: Refusals, **asked: Any) -> Job:
    """The job of a chat. asked: further fields of `ChatBody`.

    Raises:
        BlockpressError: whatever is wrong with it, in the client's words.
    """
    shared = {name: getattr(body, name) for name in SHARED}
    try:
        job = chat_job(service, ChatBody(messages=talk.messages, **{**shared, **asked}))
    except BlockpressError as error:
        error.message, error.hint = talk.told(error.message), talk.told(error.hint)
        if isinstance(error, _FieldError):
            error.field = talk.told(error.field)
        raise
    job.warnings = [*refusals.warnings, *map(talk.told, job.warnings)]
    return job


class AnswerPart(NamedTuple):
    """A piece of an answer, or the whole of one: text, a thought's text, or a call."""

    kind: Literal["thinking", "text", "call"]
    text: str = ""
    call: ToolCall | None = None


def part_of(event: Event) -> AnswerPart | None:
    """What an event adds to an answer. A call that cannot be read is text, so that nothing is lost."""
    if isinstance(event, ReasoningDelta) and event.text:
        return AnswerPart("thinking", event.text)
    if isinstance(event, Text) and event.text:
        return AnswerPart("text", event.text)
    if isinstance(event, MalformedToolCallEvent):
        return AnswerPart("text", event.call.raw)
    return AnswerPart("call", call=event.call) if isinstance(event, ToolCallEvent) else None


async def parts(running: Running) -> AsyncIterator[AnswerPart | Reply]:
    """The pieces of an answer as they come, and at last its reply. Errors as `Running.events`."""
    try:
        async for _, event in running.events():
            part = part_of(event)
            if part is not None:
                yield part
            elif isinstance(event, Done):
                yield event.reply
    finally:
        running.close()


async def whole_parts(service: Service, job: Job, http: Request) -> tuple[list[AnswerPart], Reply]:
    """The parts of a whole answer, its pieces joined. Errors as `Service.replies` has them."""
    joined: list[AnswerPart] = []
    replies: list[Reply] = []

    async def collect() -> None:
        async for part in parts(service.begin(job.requests)):
            if isinstance(part, Reply):
                replies.append(part)
            elif joined and part.call is None and joined[-1].kind == part.kind:
                joined[-1] = part._replace(text=joined[-1].text + part.text)
            else:
                joined.append(part)

    await unless_gone(collect(), http)
    return joined, replies[0]


def prompt_tokens(job: Job) -> tuple[int, int]:
    """How many tokens the prompt has, and how many of them were read before."""
    request = job.requests[0]
    return len(request.row.prompt), request.num_cached_tokens


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def texts(parts: Sequence[Any]) -> str:
    """The text of parts that are texts alone, each on lines of its own."""
    return "\n".join(str(part["text"]) for part in parts)


def joined_content(parts: Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """A content of parts; neighbouring texts are one, each on lines of its own, and a content of texts is a text."""
    merged: list[Mapping[str, Any]] = []
    for part in parts:
        if merged and part["type"] == merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": f"{merged[-1]['text']}\n{part['text']}"}
        else:
            merged.append(part)
    if not merged:
        return ""
    return merged[0]["text"] if len(merged) == 1 and merged[0]["type"] == "text" else merged
