"""OpenAI's chat completions and completions: the bodies, the answers, and their streams.

Source: https://platform.openai.com/docs/api-reference (the types of openai 3.57), with vLLM's further fields.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from blockpress.decoding import (
    Committed,
    Denoised,
    Done,
    Event,
    MalformedToolCallEvent,
    ReasoningDelta,
    Reply,
    Text,
    TokenLogprob,
    ToolCallEvent,
)
from blockpress.engine import Request as EngineRequest
from blockpress.lm import LM
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import BodyRoute, Refusals, has_frames, read_sampling, seeds
from blockpress.serve.frames import frame, written_bytes
from blockpress.serve.openai_types import ChatBody, ConstrainedFields, constraint_of, thinking_of
from blockpress.serve.prompts import chat_requests
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import DONE, JSONAnswer, event_stream, to_json

router = APIRouter(route_class=BodyRoute)

FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "cancelled": "stop"}


@dataclass
class Job:
    """What a route asks of the engine, and how its answer is written."""

    requests: Sequence[EngineRequest]
    id: str
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    warnings: list[str] = field(default_factory=list)
    frames: bool = False
    usage_chunk: bool = False
    reasoning: bool = True
    draft: Sequence[int] = ()

    @classmethod
    def of(
        cls, service: Service, body: ConstrainedFields, refusals: Refusals, prefix: str, kind: str, **more: Any
    ) -> Job:
        """The job of a body. prefix: of its id. kind: the `object` of its answer. more: further fields."""
        return cls(
            id=f"{prefix}-{uuid.uuid4().hex}",
            object=kind,
            model=service.name,
            warnings=refusals.warnings,
            usage_chunk=bool(body.stream_options and body.stream_options.include_usage),
            **more,
        )

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def chat_job(service: Service, body: ChatBody) -> Job:
    """Check a chat, and make its requests. Raises BlockpressError: whatever is wrong with it."""
    service.check_model(body.model)
    refusals = Refusals.of(service, body.lenient)
    sampling, mode = read_sampling(service, body, refusals)
    thinking, budget = thinking_of(body, refusals)
    asked: dict[str, Any] = {"seed": seeds(body), "sampling": sampling, "mode": mode, "tools": body.tools}
    asked |= {"max_tokens": body.max_completion_tokens or body.max_tokens}
    asked |= {"thinking": thinking, "thinking_budget": budget, **constraint_of(body)}
    if body.logprobs:
        asked["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise _FieldError("top_logprobs", "top_logprobs is given without logprobs", "set logprobs to true")
    asked |= {"tool_choice": body.tool_choice, "parallel_tool_calls": body.parallel_tool_calls}
    draft: Sequence[int] = ()
    if body.prediction is not None and body.prediction.text:
        asked["draft"] = body.prediction.text
        draft = (
            [] if service.lm.tokenizer is None else service.lm.tokenizer.encode(body.prediction.text, add_special=False)
        )
    requests = chat_requests(service.lm, body.messages, refusals, service.options, **asked)
    how = {"frames": has_frames(body), "reasoning": body.include_reasoning is not False, "draft": draft}
    return Job.of(service, body, refusals, "chatcmpl", "chat.completion", requests=requests, **how)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatBody, http: Request) -> Response:
    """A chat's answer, whole or as a stream of server-sent events."""
    service: Service = http.app.state.service
    job = await service.build(lambda: chat_job(service, body))
    if body.stream:
        running = service.begin(job.requests, steps=job.frames)
        return event_stream(http, running, chat_chunks(service, job, running))
    replies = await service.begin(job.requests).replies(http)
    choices = [chat_choice(service.lm, job, index, reply) for index, reply in enumerate(replies)]
    if body.return_token_ids:
        for choice, reply in zip(choices, replies, strict=True):
            choice["token_ids"] = reply.tokens
    return answered(job, choices, replies)


def answered(job: Job, choices: list[dict[str, Any]], replies: Sequence[Reply]) -> JSONAnswer:
    """The whole body of an answer."""
    body = {**job.head(job.object), "choices": choices, "usage": usage_of(replies, job)}
    body["system_fingerprint"] = None
    if job.warnings:
        body["warnings"] = job.warnings
    return JSONAnswer(body)


def chat_choice(lm: LM, job: Job, index: int, reply: Reply) -> dict[str, Any]:
    """One choice of a chat's answer."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": None}
    if not reply.tool_calls:
        message["content"] = reply.text or ""
    if reply.thinking is not None and job.reasoning:
        message |= {"reasoning": reply.thinking, "reasoning_content": reply.thinking}
    if reply.tool_calls:
        message["tool_calls"] = [
            {
                "id": call_id(job, index, n),
                "type": "function",
                "function": {"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)},
            }
            for n, c in enumerate(reply.tool_calls)
        ]
    if reply.broken_calls:
        message["broken_tool_calls"] = [asdict(call) for call in reply.broken_calls]
    logprobs = None if reply.logprobs is None else _logprobs(lm, reply.logprobs)
    choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": FINISH[reply.finish_reason]}
    if reply.invalid is not None:
        choice["invalid"] = reply.invalid
    return choice


def _logprobs(lm: LM, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": [token_logprob(lm, one) for one in logprobs], "refusal": None}


def call_id(job: Job, index: int, number: int) -> str:
    """The id of a tool call, which no other call of this server has."""
    return f"call_{job.id[-24:]}_{index}_{number}"


def token_logprob(lm: LM, one: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability, as OpenAI has it."""
    top = [{**_token(lm, token), "logprob": value} for token, value in one.top]
    return {**_token(lm, one.token), "logprob": one.logprob, "top_logprobs": top}


def _token(lm: LM, token: int) -> dict[str, Any]:
    text = written_bytes(lm, token)
    return {"token": text.decode("utf-8", "replace"), "bytes": list(text)}


def usage_of(replies: Sequence[Reply], job: Job | None = None) -> dict[str, Any]:
    """Usage over all choices; the prompt, which they share, is counted once.

    With a `job`, also how many tokens of its prompt were found in cached pages, and of its prediction in the answers.
    """
    usages = [reply.usage for reply in replies]
    completion = sum(usage.completion_tokens for usage in usages)
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    cached = 0 if job is None else min((request.num_cached_tokens for request in job.requests), default=0)
    details = {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)}
    if job is not None and job.draft:
        kept = sum(a == b for reply in replies for a, b in zip(reply.tokens, job.draft, strict=False))
        details |= {"accepted_prediction_tokens": kept}
        details |= {"rejected_prediction_tokens": len(replies) * len(job.draft) - kept}
    forwards = sum(usage.forwards for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": details,
        "diffusion": {
            "steps": sum(usage.steps for usage in usages),
            "forwards": forwards,
            "canvases": sum(usage.canvases for usage in usages),
            "tokens_per_forward": completion / forwards if forwards else 0.0,
            "empty_retries": sum(usage.empty_retries for usage in usages),
            "verifications": sum(usage.verifications for usage in usages),
            "redos": sum(usage.redos for usage in usages),
            "thought_cut": any(usage.thought_cut for usage in usages),
        },
    }


async def chat_chunks(service: Service, job: Job, running: Running) -> AsyncIterator[str]:
    """The stream of a chat: JSON texts, one for each event."""
    head = job.head("chat.completion.chunk")
    calls = [0] * len(job.requests)
    replies: list[Reply] = []

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": more.pop("logprobs", None),
            "finish_reason": finish,
            **more,
        }
        return to_json({**head, "choices": [choice], **({"usage": None} if job.usage_chunk else {})})

    for index in range(len(job.requests)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in running.events():
        for delta in _deltas(job, index, event, calls):
            yield chunk(index, delta)
        if isinstance(event, Denoised) and job.frames:
            yield json.dumps(
                {**head, "choices": [{"index": index, "delta": {}, "finish_reason": None}], **frame(service.lm, event)}
            )
        elif isinstance(event, Committed) and event.logprobs:
            yield chunk(index, {}, logprobs=_logprobs(service.lm, event.logprobs))
        elif isinstance(event, Done):
            replies.append(event.reply)
            more = {} if event.reply.invalid is None else {"invalid": event.reply.invalid}
            yield chunk(index, {}, FINISH[event.reply.finish_reason], **more)
    if job.usage_chunk:
        yield json.dumps({**head, "choices": [], "usage": usage_of(replies, job)})
    yield DONE


def _deltas(job: Job, index: int, event: Event, calls: list[int]) -> list[dict[str, Any]]:
    """What an event adds to a message."""
    if isinstance(event, Text) and event.text:
        return [{"content": event.text}]
    if isinstance(event, ReasoningDelta) and event.text and job.reasoning:
        return [{"reasoning": event.text, "reasoning_content": event.text}]
    if isinstance(event, ToolCallEvent):
        number, calls[index] = calls[index], calls[index] + 1
        opened = {
            "id": call_id(job, index, number),
            "type": "function",
            "function": {"name": event.call.name, "arguments": ""},
        }
        arguments = json.dumps(event.call.arguments, ensure_ascii=False)
        return [
            {"tool_calls": [{"index": number, **opened}]},
            {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]},
        ]
    if isinstance(event, MalformedToolCallEvent):
        return [{"broken_tool_calls": [asdict(event.call)]}]
    return []
