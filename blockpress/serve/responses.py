"""OpenAI's responses, of which none is stored: items in, items out, and a stream that says how each item grows.

    response.created  response.in_progress
        output_item.added  (content_part.added  ...text.delta*  ...text.done  content_part.done)  output_item.done
    response.completed | response.incomplete | response.failed

Source: https://platform.openai.com/docs/api-reference/responses (the types of openai 3.57).
Every field: docs/apis.md.
Run it:  python -m pytest tests/serve/test_responses.py
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from blockpress.decoding import Reply
from blockpress.errors import BlockpressError
from blockpress.lm import LM
from blockpress.serve.dialects import AnswerPart, as_json, parts, prompt_tokens, whole_parts
from blockpress.serve.errors import _Refused, code_of, status_of
from blockpress.serve.fields import BodyRoute
from blockpress.serve.openai import Job, call_id, token_logprob
from blockpress.serve.responses_types import ResponsesBody, custom_tools, responses_job, sealed
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import JSONAnswer, event_stream, named

router = APIRouter(route_class=BodyRoute)

ECHOED = {"prompt_cache_key": None, "safety_identifier": None, "service_tier": "default", "user": None}
"""Fields without a meaning that an answer repeats, and what it has without them."""


@router.post("/v1/responses", response_model=None)
async def create_response(body: ResponsesBody, http: Request) -> Response:
    """An answer, whole or as a stream of server-sent events."""
    service: Service = http.app.state.service
    job = await service.build(lambda: responses_job(service, body))
    answer = _Answer(service.lm, body, job)
    if body.stream:
        running = service.begin(job.requests)
        return event_stream(http, running, _events(running, answer))
    pieces, reply = await whole_parts(service, job, http)
    for part in pieces:
        answer.begin(part)
        answer.grow(part)
        answer.end(reply.finish_reason == "length" and part is pieces[-1])
    return JSONAnswer(answer.response(reply))


@router.post("/v1/responses/input_tokens")
async def input_tokens(body: ResponsesBody, http: Request) -> dict[str, Any]:
    """How many tokens the prompt of this input has."""
    service: Service = http.app.state.service
    job = await service.build(lambda: responses_job(service, body))
    return {"object": "response.input_tokens", "input_tokens": prompt_tokens(job)[0]}


@router.get("/v1/responses/{name}", include_in_schema=False)
@router.delete("/v1/responses/{name}", include_in_schema=False)
async def stored(name: str) -> None:
    """Raises a refusal: no response is stored."""
    raise _Refused(404, f"there is no response {name!r:.80}: none is stored", "send the whole input")


@final
class _Answer:
    """The answer as far as it is written: its items, of which the last may be open."""

    def __init__(self, lm: LM, body: ResponsesBody, job: Job) -> None:
        self._lm, self._body, self.job = lm, body, job
        self._custom = custom_tools(body)
        self._sealed = "reasoning.encrypted_content" in (body.include or ())
        self.items: list[dict[str, Any]] = []
        self.kind = ""

    @property
    def item(self) -> dict[str, Any]:
        return self.items[-1]

    def begin(self, part: AnswerPart) -> None:
        """Open an item of the part's kind, empty."""
        self.kind, place = part.kind, len(self.items)
        name = f"{self.job.id.removeprefix('resp_')}{place}"
        if part.kind == "text":
            item: dict[str, Any] = {"type": "message", "id": f"msg_{name}", "role": "assistant", "content": []}
        elif part.kind == "thinking":
            item = {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": []}
        else:
            assert part.call is not None
            called = {"call_id": call_id(self.job, 0, place), "name": part.call.name}
            if part.call.name in self._custom:
                item = {"type": "custom_tool_call", "id": f"ctc_{name}", **called, "input": ""}
            else:
                item = {"type": "function_call", "id": f"fc_{name}", **called, "arguments": ""}
        self.items.append({**item, "status": "in_progress"})

    def blank(self) -> dict[str, Any]:
        """An empty part of the open item's content."""
        if self.kind == "thinking":
            return {"type": "reasoning_text", "text": ""}
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}

    def grow(self, part: AnswerPart) -> str:
        """Add a piece to the open item; returns what is added."""
        if part.call is None:
            if not self.item["content"]:
                self.item["content"] = [self.blank()]
            self.item["content"][0]["text"] += part.text
            return part.text
        if self.item["type"] == "custom_tool_call":
            given = part.call.arguments.get("input")
            self.item["input"] = given if isinstance(given, str) else as_json(part.call.arguments)
            return str(self.item["input"])
        self.item["arguments"] = as_json(part.call.arguments)
        return str(self.item["arguments"])

    def end(self, cut: bool = False) -> None:
        """Close the open item."""
        self.item["status"] = "incomplete" if cut else "completed"
        if self.kind == "thinking" and self._sealed:
            self.item["encrypted_content"] = sealed(self.item["content"][0]["text"])
        self.kind = ""

    def response(self, reply: Reply | None = None, error: BlockpressError | None = None) -> dict[str, Any]:
        """The answer as an object; without a reply or an error, as it begins."""
        body, given = self._body, self._body.model_extra or {}
        cut = reply is not None and reply.finish_reason == "length"
        status = "failed" if error else "in_progress" if reply is None else "incomplete" if cut else "completed"
        self._add_logprobs(reply)
        answer: dict[str, Any] = {
            "id": self.job.id,
            "object": "response",
            "created_at": self.job.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error and {"code": _code(error), "message": str(error)},
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": given.get("max_tool_calls"),
            "metadata": body.metadata or {},
            "model": self.job.model,
            "output": self.items if reply or error else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": _whole((body.text and body.text.format) or {"type": "text"})},
            "tool_choice": body.tool_choice or "auto",
            "tools": [_whole(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "truncation": "disabled",
            "usage": None if reply is None else self._usage(reply),
            **{name: given.get(name, other) for name, other in ECHOED.items()},
        }
        return answer | ({"warnings": self.job.warnings} if self.job.warnings else {})

    def _add_logprobs(self, reply: Reply | None) -> None:
        """The log-probabilities, which are of all tokens of the answer, belong to its last message."""
        said = [item for item in self.items if item["type"] == "message"]
        if reply is not None and reply.logprobs is not None and said:
            said[-1]["content"][0]["logprobs"] = [token_logprob(self._lm, one) for one in reply.logprobs]

    def _usage(self, reply: Reply) -> dict[str, Any]:
        prompt, cached = prompt_tokens(self.job)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": reply.usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reply.usage.reasoning_tokens},
            "total_tokens": prompt + reply.usage.completion_tokens,
        }


def _whole(given: dict[str, Any]) -> dict[str, Any]:
    """A tool or a format as the answer repeats it: with all keys that Open Responses wants to see."""
    if given.get("type") == "function":
        return {"description": None, "parameters": None, "strict": None, **given}
    if given.get("type") == "json_schema":
        return {"description": None, **given, "strict": bool(given.get("strict"))}
    return given


def _code(error: BlockpressError) -> str:
    status = status_of(error)
    if code_of(error) == "context_length_exceeded":
        return "context_length_exceeded"
    return "rate_limit_exceeded" if status == 429 else "invalid_prompt" if status < 500 else "server_error"


NAMES = {
    "text": ("output_text", "text"),
    "thinking": ("reasoning_text", "text"),
    "function_call": ("function_call_arguments", "arguments"),
    "custom_tool_call": ("custom_tool_call_input", "input"),
}
"""By the kind of a part, or the type of a call: how events are named, and the field that holds all of it."""


async def _events(running: Running, answer: _Answer) -> AsyncIterator[bytes]:
    """The stream of an answer. What fails is its last event."""
    sent = 0

    def event(kind: str, **more: Any) -> bytes:
        nonlocal sent
        sent += 1
        return named(f"response.{kind}", {"type": f"response.{kind}", "sequence_number": sent - 1, **more})

    def at(content: bool = True) -> dict[str, Any]:
        place = {"item_id": answer.item["id"], "output_index": len(answer.items) - 1}
        return place | ({"content_index": 0} if content and "content" in answer.item else {})

    def opened(part: AnswerPart) -> Iterator[bytes]:
        answer.begin(part)
        yield event("output_item.added", output_index=len(answer.items) - 1, item=answer.item)
        if part.call is None:
            yield event("content_part.added", **at(), part=answer.blank())

    def closed(cut: bool = False) -> Iterator[bytes]:
        if not answer.kind:
            return
        text = answer.kind != "call"
        name, field = NAMES[answer.kind if text else answer.item["type"]]
        held = answer.item["content"][0] if text else answer.item
        more = {"logprobs": []} if name == "output_text" else {} if text else {"name": answer.item["name"]}
        yield event(f"{name}.done", **at(), **{field: held[field]}, **more)
        if text:
            yield event("content_part.done", **at(), part=held)
        answer.end(cut)
        yield event("output_item.done", output_index=len(answer.items) - 1, item=answer.item)

    try:
        yield event("created", response=answer.response())
        yield event("in_progress", response=answer.response())
        async for part in parts(running):
            if isinstance(part, Reply):
                for each in closed(part.finish_reason == "length"):
                    yield each
                finished = answer.response(part)
                yield event(finished["status"], response=finished)
                return
            if part.kind != answer.kind or part.call is not None:
                for each in (*closed(), *opened(part)):
                    yield each
            added = answer.grow(part)
            name = NAMES[part.kind if part.call is None else answer.item["type"]][0]
            yield event(f"{name}.delta", **at(), delta=added, **({"logprobs": []} if name == "output_text" else {}))
    except BlockpressError as error:
        yield event("failed", response=answer.response(error=error))
