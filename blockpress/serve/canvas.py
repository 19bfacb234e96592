"""Our own route: an answer with every step of its canvases, as the page shows it.

    canvas.start    what was asked: seed, prompt tokens, canvas length, most steps
    canvas.frame    a step: the positions that differ from the step before (`frames.FrameDiffs`)
    canvas.commit   a canvas is finished: its tokens, and the text that is final with it
    canvas.done     the whole answer and its usage
    canvas.error    what went wrong; nothing follows

Invariant: the frames of a canvas, applied one after another, give its tokens as they are committed; the texts of an
answer's events, joined, are its text. Each event has the number of its answer (`index`).
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field

from blockpress.config import Sampling
from blockpress.decoding import Committed, Denoised, Done, Event, ReasoningDelta, Reply, Text
from blockpress.errors import BlockpressError
from blockpress.lm import LM
from blockpress.serve.errors import _FieldError, openai_error
from blockpress.serve.fields import BodyRoute, Count, Positive, Refusals, SamplingFields, read_sampling, seeds
from blockpress.serve.frames import FrameDiffs
from blockpress.serve.openai import Job, usage_of
from blockpress.serve.prompts import chat_requests, prompt_of
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import event_stream, named

router = APIRouter(route_class=BodyRoute)


class CanvasBody(SamplingFields):
    """The body of /v1/canvas. Fields that it does not have are refused.

    messages or prompt: a chat, or a text or token ids as they stand. thinking, thinking_budget: as in `LM.chat`, for
    messages. regex, choice, schema: what the answer must be; one of them. pins, draft, noise: what is given of the
    answer, as in `LM.generate`, positions as texts; in a chat only a draft's text. diffusion.frames: false leaves out
    the steps.
    """

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    max_tokens: Positive | None = None
    thinking: bool | None = None
    thinking_budget: Positive | None = None
    regex: str | None = None
    choice: list[str] | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    pins: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Count] | None = None
    draft: str | list[Count] | None = None
    noise: Annotated[float, Field(ge=0, le=1)] | None = None


def canvas_job(service: Service, body: CanvasBody) -> tuple[Job, list[dict[str, Any]]]:
    """Check what is asked, and make its requests; with them the body of each one's `canvas.start`.

    Raises:
        BlockpressError: whatever is wrong with it.
    """
    service.check_model(body.model)
    refusals = Refusals.of(service, body.lenient)
    sampling, mode = read_sampling(service, body, refusals)
    if not isinstance(sampling, Sampling):
        raise _FieldError("mode", "mode is 'autoregressive', which has no canvas", "ask /v1/completions or /v1/chat")
    if body.stream is False:
        refusals.refuse("stream", False, "a canvas is always a stream")
    asked: dict[str, Any] = {"seed": seeds(body), "sampling": sampling, "mode": mode, "max_tokens": body.max_tokens}
    constraint = {"regex": body.regex, "choice": body.choice, "schema": body.schema_}
    asked |= {name: value for name, value in constraint.items() if value is not None}
    if (body.messages is None) == (body.prompt is None):
        raise _FieldError("messages", "a canvas needs messages or a prompt", "give one of them")
    parts: dict[str, Any] = {"pins": body.pins, "draft": body.draft, "noise": body.noise}
    given = {name: value for name, value in parts.items() if value is not None}
    if body.messages is not None:
        for name, value in given.items():
            if name == "pins" or isinstance(value, list):
                refusals.refuse(name, value, "in a chat only a draft's text is given; send a prompt")
        asked |= {name: value for name, value in given.items() if name != "pins" and not isinstance(value, list)}
        thoughts = {"thinking": bool(body.thinking), "thinking_budget": body.thinking_budget}
        requests = chat_requests(service.lm, body.messages, refusals, service.options, **asked, **thoughts)
    else:
        for name in ("thinking", "thinking_budget"):
            if getattr(body, name):
                refusals.refuse(name, getattr(body, name), "a prompt is read as it stands; send messages")
        if body.pins is not None:
            given["pins"] = {int(place): token for place, token in body.pins.items()}
        requests = service.lm.build_requests(prompt_of(service.lm, body.prompt, "prompt"), **asked, **given)
    frames = body.diffusion is None or "frames" not in body.diffusion.model_fields_set or body.diffusion.frames
    job = Job(requests, f"canvas-{uuid.uuid4().hex}", "canvas", service.name, warnings=refusals.warnings, frames=frames)
    starts = [
        {
            "seed": seed,
            "mode": mode,
            "prompt_tokens": len(request.row.prompt),
            "canvas_length": service.lm.config.canvas_length,
            "steps": sampling.steps,
        }
        for seed, request in zip(asked["seed"], requests, strict=True)
    ]
    return job, starts


@router.post("/v1/canvas", response_model=None)
async def canvas(body: CanvasBody, http: Request) -> Response:
    """An answer as a stream of named server-sent events, with every step of its canvases."""
    service: Service = http.app.state.service
    job, starts = await service.build(lambda: canvas_job(service, body))
    running = service.begin(job.requests, steps=job.frames)
    return event_stream(http, running, canvas_events(service, job, starts, running), _failed)


def _failed(error: BlockpressError) -> bytes:
    return named("canvas.error", openai_error(error))


async def canvas_events(
    service: Service, job: Job, starts: list[dict[str, Any]], running: Running
) -> AsyncIterator[bytes]:
    """The events of all answers of a job, as they come."""
    answers = [_Answer(service.lm, index, job.frames) for index in range(len(starts))]
    try:
        for index, start in enumerate(starts):
            yield named("canvas.start", {**job.head("canvas"), "index": index, **start, "warnings": job.warnings})
        async for index, event in running.events():
            for each in answers[index].events(event):
                yield each
    except BlockpressError:
        for answer in answers:
            for each in answer.held():
                yield each
        raise
    finally:
        running.close()


class _Answer:
    """Turns the events of one answer into ours. A commit is held until the text that is final with it is known."""

    def __init__(self, lm: LM, index: int, frames: bool) -> None:
        self._index, self._frames = index, frames
        self._diffs = FrameDiffs(lm)
        self._commit: dict[str, Any] | None = None
        self._texts = {"text": "", "reasoning": ""}

    def events(self, event: Event) -> list[bytes]:
        if isinstance(event, Text):
            self._texts["text"] += event.text
            return []
        if isinstance(event, ReasoningDelta):
            self._texts["reasoning"] += event.text
            return []
        sent = self.held() if isinstance(event, Denoised | Committed | Done) else []
        if isinstance(event, Denoised) and self._frames:
            sent.append(self._named("canvas.frame", self._diffs.frame(event)))
        elif isinstance(event, Committed):
            self._commit = {"canvas": event.canvas, "tokens": event.tokens, "steps": event.steps}
        elif isinstance(event, Done):
            sent.append(self._named("canvas.done", _whole(event.reply)))
        return sent

    def held(self) -> list[bytes]:
        """The commit that waits for its text, if there is one."""
        commit, self._commit = self._commit, None
        return [] if commit is None else [self._named("canvas.commit", commit)]

    def _named(self, kind: str, body: dict[str, Any]) -> bytes:
        """An event, and with it the text that became final since the last one."""
        texts = {} if kind == "canvas.done" else {name: text for name, text in self._texts.items() if text}
        self._texts = {"text": "", "reasoning": ""}
        return named(kind, {"index": self._index, **body, **texts})


def _whole(reply: Reply) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    return {
        "finish_reason": reply.finish_reason,
        "text": reply.text,
        "reasoning": reply.thinking,
        "tool_calls": calls,
        "invalid": reply.invalid,
        "usage": usage_of([reply]),
    }
