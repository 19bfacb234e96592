"""Anthropic's messages: a chat of content blocks, its answer and its stream, and how many tokens it has.

    message_start  (content_block_start  content_block_delta*  content_block_stop)*  message_delta  message_stop

Source: https://platform.claude.com/docs/en/api/messages (the types of anthropic 2.14).
Every field: docs/apis.md.
Run it:  python -m pytest tests/serve/test_anthropic.py
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from blockpress.decoding import Reply
from blockpress.serve.anthropic_types import CountBody, MessagesBody, messages_job
from blockpress.serve.dialects import AnswerPart, as_json, parts, prompt_tokens, whole_parts
from blockpress.serve.errors import anthropic_error
from blockpress.serve.fields import BodyRoute
from blockpress.serve.openai import Job, call_id
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import JSONAnswer, event_stream, named

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/messages", response_model=None)
async def messages(body: MessagesBody, http: Request) -> Response:
    """A chat's answer, whole or as a stream of server-sent events."""
    service: Service = http.app.state.service
    job = await service.build(lambda: messages_job(service, body))
    if body.stream:
        running = service.begin(job.requests)
        return event_stream(
            http,
            running,
            _events(running, job, body.max_tokens),
            lambda error: named("error", anthropic_error(error)),
            named("ping", {"type": "ping"}),
        )
    pieces, reply = await whole_parts(service, job, http)
    content = [_written(job, n, part) for n, part in enumerate(pieces)]
    return JSONAnswer(_message(job, content, reply, body.max_tokens))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountBody, http: Request) -> dict[str, int]:
    """How many tokens the prompt of these messages has."""
    service: Service = http.app.state.service
    job = await service.build(lambda: messages_job(service, body))
    return {"input_tokens": prompt_tokens(job)[0]}


def _message(job: Job, content: list[dict[str, Any]], reply: Reply | None, most: int) -> dict[str, Any]:
    """The answer; without a reply, as a stream begins."""
    message: dict[str, Any] = {"id": job.id, "type": "message", "role": "assistant", "model": job.model}
    message |= {"content": content, **_stop(reply, most), "usage": _usage(job, reply)}
    return message | ({"warnings": job.warnings} if job.warnings else {})


def _stop(reply: Reply | None, most: int) -> dict[str, Any]:
    reasons = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "cancelled": "end_turn"}
    if reply is None:
        return {"stop_reason": None, "stop_sequence": None}
    reason = "stop_sequence" if reply.stopped is not None else reasons[reply.finish_reason]
    if reason == "max_tokens" and len(reply.tokens) < most:
        reason = "model_context_window_exceeded"
    return {"stop_reason": reason, "stop_sequence": reply.stopped}


def _usage(job: Job, reply: Reply | None) -> dict[str, Any]:
    """Tokens that were read before are counted apart, as Anthropic does."""
    prompt, cached = prompt_tokens(job)
    used = {"input_tokens": prompt - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
    if reply is None:
        return {**used, "output_tokens": 0}
    thoughts = {"thinking_tokens": reply.usage.reasoning_tokens}
    return {**used, "output_tokens": reply.usage.completion_tokens, "output_tokens_details": thoughts}


def _written(job: Job, number: int, part: AnswerPart) -> dict[str, Any]:
    """A part as a content block."""
    if part.call is not None:
        return {"type": "tool_use", "id": _call_id(job, number), "name": part.call.name, "input": part.call.arguments}
    if part.kind == "text":
        return {"type": "text", "text": part.text}
    return {"type": "thinking", "thinking": part.text if job.reasoning else "", "signature": _signature(part.text)}


def _call_id(job: Job, number: int) -> str:
    return "toolu_" + call_id(job, 0, number).removeprefix("call_")


def _signature(thought: str) -> str:
    """What clients send back with a thought; nothing here depends on it."""
    return hashlib.sha256(thought.encode()).hexdigest()


async def _events(running: Running, job: Job, most: int) -> AsyncIterator[bytes]:
    """The stream of an answer."""
    number, kind, thought = -1, "", ""

    def event(name: str, **more: Any) -> bytes:
        return named(name, {"type": name, **more})

    def closed() -> list[bytes]:
        """The end of the block that is open, if one is."""
        if not kind:
            return []
        signed = {"type": "signature_delta", "signature": _signature(thought)}
        last = [event("content_block_delta", index=number, delta=signed)] if kind == "thinking" else []
        return [*last, event("content_block_stop", index=number)]

    yield event("message_start", message=_message(job, [], None, most))
    async for part in parts(running):
        if isinstance(part, Reply):
            for each in closed():
                yield each
            yield event("message_delta", delta=_stop(part, most), usage=_usage(job, part))
            break
        if part.kind != kind or part.call is not None:
            for each in closed():
                yield each
            number, kind, thought = number + 1, part.kind, ""
            empty = part._replace(text="", call=part.call and type(part.call)(name=part.call.name, arguments={}))
            start = {**_written(job, number, empty), **({"signature": ""} if kind == "thinking" else {})}
            yield event("content_block_start", index=number, content_block=start)
        if part.call is not None:
            delta = {"type": "input_json_delta", "partial_json": as_json(part.call.arguments)}
        elif kind == "thinking":
            thought += part.text
            delta = {"type": "thinking_delta", "thinking": part.text}
        else:
            delta = {"type": "text_delta", "text": part.text}
        if kind != "thinking" or job.reasoning:
            yield event("content_block_delta", index=number, delta=delta)
    yield event("message_stop")
