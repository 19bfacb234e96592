"""Holes in texts: llama.cpp's `/infill`, Mistral's `/v1/fim/completions`, and our own `/v1/edits`.

OpenAI's completions with a `suffix` are in `completions.py`, and run the same way.

Invariant: only what stands in the hole is returned; the text around it is the client's own.
Source: llama.cpp's server (`/infill`), Mistral's API reference (FIM).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from blockpress.config import Sampling
from blockpress.decoding import Done, Reply, Text
from blockpress.lm.arguments import AnySampling
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import Count, Fields, Positive, Refusals, SamplingFields, read_sampling, seeds
from blockpress.serve.openai import FINISH, Job, answered, usage_of
from blockpress.serve.openai_types import ConstrainedFields, constraint_of
from blockpress.serve.service import Running, Service, unless_gone
from blockpress.serve.sse import DONE, event_stream

router = APIRouter()


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
    service: Service, body: ConstrainedFields, prefix: str, suffix: str, most: int | None
) -> tuple[Running, Job]:
    """Begin to fill the hole between two texts, once for each choice. Raises BlockpressError: whatever is wrong."""
    service.check_model(body.model)
    refusals = Refusals(service.options.lenient if body.lenient is None else body.lenient)
    options: dict[str, Any] = {"sampling": hole_sampling(service, body, refusals), **constraint_of(body)}
    numbers = seeds(body)

    def make(gone: Any) -> Any:
        return service.lm.infill_stream(prefix, suffix, most, numbers, cancel=gone, **options)

    return await service.begin_stream(make, len(numbers)), _job(service, body, refusals)


def _job(service: Service, body: ConstrainedFields, refusals: Refusals) -> Job:
    return Job(
        requests=(),
        id=f"fim-{uuid.uuid4().hex}",
        object="chat.completion",
        model=service.name,
        warnings=refusals.warnings,
        usage_chunk=bool(body.stream_options and body.stream_options.include_usage),
    )


async def filled(running: Running, http: Request) -> list[Reply]:
    """The whole answers, in the order of their seeds. Errors as `Running.events`."""
    replies: dict[int, Reply] = {}

    async def collect() -> None:
        async for number, event in running.events():
            if isinstance(event, Done):
                replies[number] = event.reply

    try:
        await unless_gone(collect(), http)
    finally:
        running.close()
    return [replies[number] for number in sorted(replies)]


@router.post("/v1/fim/completions", response_model=None)
async def fim(body: FimBody, http: Request) -> Response:
    """The text between a prompt and a suffix, as Mistral's clients read it."""
    service: Service = http.app.state.service
    if body.seed is None:
        body.seed = body.random_seed
    running, job = await begin_fill(service, body, body.prompt, body.suffix, body.max_tokens)
    if body.stream:
        return event_stream(http, _fim_chunks(running, job))
    replies = await filled(running, http)
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
    running.close()
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
        running.close()

    if body.stream:
        return event_stream(http, chunks())
    [reply, *_] = await filled(running, http)
    return JSONResponse(last(reply))


@router.post("/v1/edits", response_model=None)
async def edits(body: EditBody, http: Request) -> Response:
    """A span of a text written anew; `text` is what stands in it now, `whole` the whole text."""
    service: Service = http.app.state.service
    service.check_model(body.model)
    refusals = Refusals(service.options.lenient if body.lenient is None else body.lenient)
    sampling, numbers = hole_sampling(service, body, refusals), seeds(body)
    start, stop = body.span or (0, len(body.input))
    options: dict[str, Any] = {"sampling": sampling, "max_tokens": body.max_tokens, **constraint_of(body)}
    noise = 0.5 if body.noise is None else body.noise

    def make(gone: Any) -> Any:
        edited = service.lm.edit_stream
        return edited(body.input, (start, stop), body.instruction, noise, numbers, cancel=gone, **options)

    job = _job(service, body, refusals)
    job.object = "edit"
    running = await service.begin_stream(make, len(numbers))
    if body.stream:
        return event_stream(http, _fim_chunks(running, job))
    replies = await filled(running, http)
    choices = [
        {"index": index, "text": reply.text, "whole": reply.whole, "finish_reason": FINISH[reply.finish_reason]}
        for index, reply in enumerate(replies)
    ]
    return answered(job, choices, replies)
