"""Holes in texts: llama.cpp's `/infill`, Mistral's `/v1/fim/completions`, and our own `/v1/edits`.

OpenAI's completions with a `suffix` are in `completions.py`, and run the same way.

Invariant: only what stands in the hole is returned; the text around it is the client's own.
Source: llama.cpp's server (`/infill`), Mistral's API reference (FIM).
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from blockpress.config import Sampling
from blockpress.decoding import Done, Event, Reply, Text
from blockpress.lm.arguments import AnySampling
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import BodyRoute, Count, Fields, Positive, Refusals, SamplingFields, read_sampling, seeds
from blockpress.serve.openai import FINISH, Job, answered, usage_of
from blockpress.serve.openai_types import ConstrainedFields, constraint_of
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import DONE, event_stream

router = APIRouter(route_class=BodyRoute)


class FimBody(ConstrainedFields):
    """The body of /v1/fim/completions."""

    prompt: str
    suffix: str = ""
    max_tokens: Positive | None = None
    random_seed: Count | None = None
    min_tokens: Count | None = None


class ExtraFile(Fields):
    filename: str = ""
    text: str


class InfillBody(ConstrainedFields):
    """The body of llama.cpp's /infill. input_extra: files shown before the prefix. prompt: stands after the prefix."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraFile] | None = None
    prompt: str = ""
    n_predict: Annotated[int, Field(ge=-1)] | None = None


class EditBody(ConstrainedFields):
    """The body of /v1/edits. span: of the input, in characters. noise: how much of it is replaced at first."""

    input: str
    span: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    instruction: str | None = None
    noise: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Positive | None = None


def hole_sampling(service: Service, body: SamplingFields, refusals: Refusals) -> AnySampling:
    """The sampling of a hole, which needs a canvas. Raises _FieldError: another mode, or stop texts."""
    sampling, _ = read_sampling(service, body, refusals)
    if not isinstance(sampling, Sampling):
        raise _FieldError("mode", f"mode is {body.mode!r}, which fills no holes", "leave it out")
    if sampling.stop:
        refusals.refuse("stop", list(sampling.stop), "a hole ends where the text after it begins")
    return sampling.with_(stop=(), release=0)


async def begin_fill(
    service: Service,
    body: ConstrainedFields,
    prefix: str,
    suffix: str,
    most: int | None,
    kind: str = "chat.completion",
) -> tuple[Running, Job]:
    """Begin to fill the hole between two texts, once for each choice. kind: as of `Job.of`.

    Raises:
        BlockpressError: whatever is wrong.
    """

    def make(**how: Any) -> Iterator[Event]:
        return service.lm.infill_stream(prefix, suffix, most, **how)

    return await _begin(service, body, kind, make)


async def _begin(
    service: Service, body: ConstrainedFields, kind: str, make: Callable[..., Iterator[Event]]
) -> tuple[Running, Job]:
    """`make` begins the stream, given seed, sampling, constraint and the flag that ends it."""
    service.check_model(body.model)
    refusals = Refusals.of(service, body.lenient)
    options: dict[str, Any] = {"sampling": hole_sampling(service, body, refusals), **constraint_of(body)}
    numbers = seeds(body)
    running = await service.begin_stream(lambda gone: make(seed=numbers, cancel=gone, **options), len(numbers))
    return running, Job.of(service, body, refusals, "fim", kind, requests=())


@router.post("/v1/fim/completions", response_model=None)
async def fim(body: FimBody, http: Request) -> Response:
    """The text between a prompt and a suffix, as Mistral's clients read it."""
    service: Service = http.app.state.service
    if body.seed is None:
        body.seed = body.random_seed
    running, job = await begin_fill(service, body, body.prompt, body.suffix, body.max_tokens)
    if body.stream:
        return event_stream(http, running, _fim_chunks(running, job))
    replies = await running.replies(http)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": FINISH[reply.finish_reason],
        }
        for index, reply in enumerate(replies)
    ]
    return answered(job, choices, replies)


async def _fim_chunks(running: Running, job: Job) -> AsyncIterator[str]:
    replies: list[Reply] = []
    head = job.head("chat.completion.chunk")
    async for index, event in running.events():
        if isinstance(event, Text) and event.text:
            delta = {"role": "assistant", "content": event.text}
            yield json.dumps({**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]})
        elif isinstance(event, Done):
            replies.append(event.reply)
            last = {"index": index, "delta": {}, "finish_reason": FINISH[event.reply.finish_reason]}
            yield json.dumps({**head, "choices": [last], "usage": usage_of(replies)})
    yield DONE


@router.post("/infill", response_model=None)
async def infill(body: InfillBody, http: Request) -> Response:
    """The text between a prefix and a suffix, as llama.cpp's clients read it."""
    service: Service = http.app.state.service
    extra = "".join(f"{file.text}\n" for file in body.input_extra or ())
    most = body.n_predict if body.n_predict is not None and body.n_predict > 0 else None
    started = time.monotonic()
    running, _ = await begin_fill(service, body, extra + body.input_prefix + body.prompt, body.input_suffix, most)

    def last(reply: Reply) -> dict[str, Any]:
        usage, seconds = reply.usage, time.monotonic() - started
        ended = reply.finish_reason == "length"
        return {
            "content": reply.text,
            "tokens": reply.tokens,
            "stop": True,
            "stop_type": "limit" if ended else "eos",
            "stopping_word": "",
            "model": service.name,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "truncated": False,
            "generation_settings": {"n_ctx": service.lm.config.context_length, "n_predict": body.n_predict or -1},
            "timings": {
                "prompt_n": usage.prompt_tokens,
                "predicted_n": usage.completion_tokens,
                "predicted_ms": 1000 * seconds,
                "predicted_per_second": usage.completion_tokens / max(seconds, 1e-9),
            },
        }

    async def chunks() -> AsyncIterator[str]:
        async for _, event in running.events():
            if isinstance(event, Text) and event.text:
                yield json.dumps({"content": event.text, "tokens": [], "stop": False})
            elif isinstance(event, Done):
                yield json.dumps({**last(event.reply), "content": ""})

    if body.stream:
        return event_stream(http, running, chunks())
    [reply, *_] = await running.replies(http)
    return JSONResponse(last(reply))


@router.post("/v1/edits", response_model=None)
async def edits(body: EditBody, http: Request) -> Response:
    """A span of a text written anew; `text` is what stands in it now, `whole` the whole text."""
    service: Service = http.app.state.service
    start, stop = body.span or (0, len(body.input))
    noise = 0.5 if body.noise is None else body.noise

    def make(**how: Any) -> Iterator[Event]:
        edited = service.lm.edit_stream
        return edited(body.input, (start, stop), body.instruction, noise, max_tokens=body.max_tokens, **how)

    running, job = await _begin(service, body, "edit", make)
    if body.stream:
        return event_stream(http, running, _fim_chunks(running, job))
    replies = await running.replies(http)
    choices = [
        {"index": index, "text": reply.text, "whole": reply.whole, "finish_reason": FINISH[reply.finish_reason]}
        for index, reply in enumerate(replies)
    ]
    return answered(job, choices, replies)
