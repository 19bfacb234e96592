"""OpenAI's completions: a prompt as it stands, text or token ids, and what follows it.

Source: https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from blockpress.decoding import Denoised, Done, Reply, Text
from blockpress.lm import LM
from blockpress.serve.errors import FieldError
from blockpress.serve.fields import Positive, Refusals, read_sampling, seeds
from blockpress.serve.frames import frame
from blockpress.serve.infill import begin_fill, filled
from blockpress.serve.openai import FINISH, Job, answered, token_logprob, usage_of
from blockpress.serve.openai_types import ConstrainedFields, constraint_of
from blockpress.serve.prompts import prompt_of
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import DONE, event_stream

router = APIRouter()


class CompletionBody(ConstrainedFields):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Positive | None = 16
    logprobs: Annotated[int, Field(ge=0, le=128)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Positive | None = None


def completion_job(service: Service, body: CompletionBody) -> tuple[Job, list[str]]:
    """Check a completion, and make its requests; with them what each answer is put after (`echo`).

    Raises:
        BlockpressError: whatever is wrong with it.
    """
    service.check_model(body.model)
    refusals = Refusals(service.options.lenient if body.lenient is None else body.lenient)
    sampling, mode = read_sampling(service, body, refusals)
    count = body.n or 1
    if body.best_of is not None and body.best_of != count:
        refusals.refuse("best_of", body.best_of, f"all answers are returned, and n is {count}")
    asked: dict[str, Any] = {"sampling": sampling, "mode": mode, "max_tokens": body.max_tokens, **constraint_of(body)}
    asked["logprobs"] = body.logprobs
    many = isinstance(body.prompt, list) and not all(isinstance(token, int) for token in body.prompt)
    prompts = list(body.prompt) if many else [body.prompt]
    if len(prompts) * count > service.options.max_choices:
        most = service.options.max_choices
        raise FieldError("n", f"{len(prompts)} prompts with n of {count} ask for too many answers", f"at most {most}")
    requests, echoes = [], []
    for number, given in enumerate(prompts):
        prompt = prompt_of(service.lm, given, f"prompt[{number}]" if many else "prompt")
        requests += service.lm.build_requests(prompt, seed=seeds(body), **asked)
        text = given if isinstance(given, str) else service.lm.decode(given)  # type: ignore[arg-type]
        echoes += [text if body.echo else ""] * count
    job = Job(
        requests=requests,
        id=f"cmpl-{uuid.uuid4().hex}",
        object="text_completion",
        model=service.name,
        warnings=refusals.warnings,
        frames=body.diffusion is not None and body.diffusion.frames,
        usage_chunk=bool(body.stream_options and body.stream_options.include_usage),
    )
    return job, echoes


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionBody, http: Request) -> Response:
    """What follows a prompt, whole or as a stream of server-sent events."""
    service: Service = http.app.state.service
    if body.suffix is not None:
        return await _between(service, body, body.suffix, http)
    job, echoes = await service.build(lambda: completion_job(service, body))
    if body.stream:
        return event_stream(http, completion_chunks(service, job, service.begin(job.requests), echoes))
    replies = await service.replies(job.requests, http)
    choices = [_choice(service.lm, n, reply, echoes[n]) for n, reply in enumerate(replies)]
    return answered(job, choices, replies)


async def _between(service: Service, body: CompletionBody, suffix: str, http: Request) -> Response:
    """A completion with a suffix: what stands between the two."""
    if not isinstance(body.prompt, str):
        raise FieldError("prompt", "prompt is not one text, and there is a suffix", "send one text")
    if body.logprobs is not None:
        raise FieldError("logprobs", "logprobs are given with a suffix", "leave one of them out")
    running, job = await begin_fill(service, body, body.prompt, suffix, body.max_tokens)
    job.object = "text_completion"
    echoes = [body.prompt if body.echo else ""] * (body.n or 1)
    if body.stream:
        return event_stream(http, completion_chunks(service, job, running, echoes))
    replies = await filled(running, http)
    return answered(job, [_choice(service.lm, n, reply, echoes[n]) for n, reply in enumerate(replies)], replies)


def _choice(lm: LM, index: int, reply: Reply, echo: str) -> dict[str, Any]:
    logprobs = None if reply.logprobs is None else _logprobs(lm, reply, len(echo))
    choice = {"index": index, "text": echo + (reply.text or ""), "logprobs": logprobs}
    choice["finish_reason"] = FINISH[reply.finish_reason]
    if reply.invalid is not None:
        choice["invalid"] = reply.invalid
    return choice


def _logprobs(lm: LM, reply: Reply, offset: int) -> dict[str, Any]:
    listed = [token_logprob(lm, one) for one in reply.logprobs or ()]
    offsets = []
    for one in listed:
        offsets.append(offset)
        offset += len(one["token"])
    return {
        "tokens": [one["token"] for one in listed],
        "token_logprobs": [one["logprob"] for one in listed],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in listed],
        "text_offset": offsets,
    }


async def completion_chunks(service: Service, job: Job, running: Running, echoes: list[str]) -> AsyncIterator[str]:
    """The stream of a completion: JSON texts, one for each event."""
    replies: list[Reply] = []

    def chunk(index: int, text: str, finish: str | None = None, **more: Any) -> str:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, **more}
        return json.dumps({**job.head("text_completion"), "choices": [choice]}, ensure_ascii=False)

    for index, echo in enumerate(echoes):
        if echo:
            yield chunk(index, echo)
    async for index, event in running.events():
        if isinstance(event, Text) and event.text:
            yield chunk(index, event.text)
        elif isinstance(event, Denoised) and job.frames:
            empty = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
            yield json.dumps({**job.head("text_completion"), "choices": [empty], **frame(service.lm, event)})
        elif isinstance(event, Done):
            reply = event.reply
            replies.append(reply)
            more: dict[str, Any] = {} if reply.invalid is None else {"invalid": reply.invalid}
            if reply.logprobs is not None:
                more["logprobs"] = _logprobs(service.lm, reply, len(echoes[index]))
            yield chunk(index, "", FINISH[reply.finish_reason], **more)
    if job.usage_chunk:
        yield json.dumps({**job.head("text_completion"), "choices": [], "usage": usage_of(replies, job)})
    yield DONE
