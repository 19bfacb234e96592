"""OpenAI's completions: a prompt as it stands, text or token ids, and what follows it.

    echo, logprobs, max_tokens 0     the log-probabilities of the prompt, and no answer: a score of a text

Source: https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from blockpress.decoding import Cancel, Denoised, Done, Event, Reply, Text, TokenLogprob, Usage
from blockpress.engine import Request as EngineRequest
from blockpress.lm import LM
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import BodyRoute, Count, Positive, Refusals, has_frames, read_sampling, seeds
from blockpress.serve.frames import frame
from blockpress.serve.infill import begin_fill
from blockpress.serve.openai import FINISH, Job, answered, token_logprob, usage_of
from blockpress.serve.openai_types import ConstrainedFields, constraint_of
from blockpress.serve.prompts import prompt_of
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import DONE, event_stream

router = APIRouter(route_class=BodyRoute)


class CompletionBody(ConstrainedFields):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=128)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Positive | None = None


@dataclass(frozen=True)
class Echo:
    """What stands before an answer: a prompt that is sent back, or nothing. ids: of its tokens.

    scored: its log-probabilities, from the second token on; None: they were not asked for.
    """

    text: str = ""
    ids: Sequence[int] = ()
    scored: Sequence[TokenLogprob] | None = None


def completion_job(service: Service, body: CompletionBody) -> tuple[Job, list[Echo]]:
    """Check a completion, and make its requests; with them what stands before each answer.

    Raises:
        BlockpressError: whatever is wrong with it.
    """
    service.check_model(body.model)
    refusals = Refusals.of(service, body.lenient)
    sampling, mode = read_sampling(service, body, refusals)
    count = body.n or 1
    if body.best_of is not None and body.best_of != count:
        refusals.refuse("best_of", body.best_of, f"all answers are returned, and n is {count}")
    asked: dict[str, Any] = {"sampling": sampling, "mode": mode, "max_tokens": body.max_tokens, **constraint_of(body)}
    asked["logprobs"] = body.logprobs
    if body.max_tokens == 0 and not body.echo:
        raise _FieldError("max_tokens", "max_tokens is 0, and echo is not set", "ask for a token, or for an echo")
    many = isinstance(body.prompt, list) and not all(isinstance(token, int) for token in body.prompt)
    prompts = list(body.prompt) if many else [body.prompt]
    if len(prompts) * count > service.options.max_choices:
        most = service.options.max_choices
        raise _FieldError("n", f"{len(prompts)} prompts with n of {count} ask for too many answers", f"at most {most}")
    requests: list[EngineRequest] = []
    echoes: list[Echo] = []
    for number, given in enumerate(prompts):
        prompt = prompt_of(service.lm, given, f"prompt[{number}]" if many else "prompt")
        made = service.lm.build_requests(prompt, seed=seeds(body), **{**asked, "max_tokens": body.max_tokens or 1})
        requests += made if body.max_tokens != 0 else ()
        text = given if isinstance(given, str) else service.lm.decode(given)  # type: ignore[arg-type]
        echoes += [Echo(text, made[0].row.prompt) if body.echo else Echo()] * count
    how = {"requests": requests, "frames": has_frames(body)}
    return Job.of(service, body, refusals, "cmpl", "text_completion", **how), echoes


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionBody, http: Request) -> Response:
    """What follows a prompt, whole or as a stream of server-sent events."""
    service: Service = http.app.state.service
    if body.suffix is not None:
        return await _between(service, body, body.suffix, http)
    job, echoes = await service.build(lambda: completion_job(service, body))
    if body.echo and body.logprobs is not None:
        score = partial(_scored, service.lm, echoes, body.n or 1, body.logprobs)
        echoes = await service.build_unless_gone(score, http)
    if body.stream:
        running = service.begin(job.requests, steps=job.frames) if job.requests else None
        return event_stream(http, running, completion_chunks(service, job, running, echoes))
    replies = [_no_answer(echo) for echo in echoes]
    if job.requests:
        replies = await service.begin(job.requests).replies(http)
    choices = [_choice(service.lm, n, reply, echoes[n]) for n, reply in enumerate(replies)]
    return answered(job, choices, replies)


async def _between(service: Service, body: CompletionBody, suffix: str, http: Request) -> Response:
    """A completion with a suffix: what stands between the two."""
    if not isinstance(body.prompt, str):
        raise _FieldError("prompt", "prompt is not one text, and there is a suffix", "send one text")
    if body.logprobs is not None:
        raise _FieldError("logprobs", "logprobs are given with a suffix", "leave one of them out")
    running, job = await begin_fill(service, body, body.prompt, suffix, body.max_tokens, "text_completion")
    echoes = [Echo(body.prompt) if body.echo else Echo()] * (body.n or 1)
    if body.stream:
        return event_stream(http, running, completion_chunks(service, job, running, echoes))
    replies = await running.replies(http)
    return answered(job, [_choice(service.lm, n, reply, echoes[n]) for n, reply in enumerate(replies)], replies)


def _scored(lm: LM, echoes: Sequence[Echo], count: int, top: int, cancel: Cancel) -> list[Echo]:
    """Score each prompt once; `count` echoes in a row are of the same."""
    scored: list[Echo] = []
    for echo in echoes[::count]:
        scored += [replace(echo, scored=lm.token_logprobs(echo.ids, top, cancel))] * count
    return scored


def _no_answer(echo: Echo) -> Reply:
    read = len(echo.ids)
    usage = Usage(read, completion_tokens=0, canvases=0, steps=0, forwards=0, tokens_per_forward=0)
    return Reply(text="", tokens=[], finish_reason="length", usage=usage)


def _choice(lm: LM, index: int, reply: Reply, echo: Echo) -> dict[str, Any]:
    logprobs = None
    if reply.logprobs is not None or echo.scored is not None:
        logprobs = _logprobs(lm, echo, reply.logprobs or ())
    choice = {"index": index, "text": echo.text + (reply.text or ""), "logprobs": logprobs}
    choice["finish_reason"] = FINISH[reply.finish_reason]
    if reply.invalid is not None:
        choice["invalid"] = reply.invalid
    return choice


def _logprobs(lm: LM, echo: Echo, answer: Sequence[TokenLogprob], *, echoed: bool = True) -> dict[str, Any]:
    """Log-probabilities of an echo that was scored, and of the answer after it. The first token of a text has none.

    text_offset: the character in which a token begins; control tokens are not part of the text.
    """
    assert lm.tokenizer is not None
    tokens = list(answer)
    first = echo.scored is not None and echoed
    if echo.scored is not None and echoed:
        tokens = [TokenLogprob(echo.ids[0], 0.0), *echo.scored, *tokens]
    listed = [token_logprob(lm, one) for one in tokens]
    decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0 if first else len(echo.text), []
    for one, scored in zip(listed, tokens, strict=True):
        offsets.append(offset)
        if scored.token not in lm.tokenizer.special_ids:
            offset += len(decoder.decode(bytes(one["bytes"])))
    tops: list[Any] = [{top["token"]: top["logprob"] for top in reversed(one["top_logprobs"])} for one in listed]
    values = [one["logprob"] for one in listed]
    if first:
        values[0] = tops[0] = None
    return {
        "tokens": [one["token"] for one in listed],
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


async def _no_answers(echoes: Sequence[Echo]) -> AsyncIterator[tuple[int, Event]]:
    for number, echo in enumerate(echoes):
        yield number, Done(number, _no_answer(echo))


async def completion_chunks(
    service: Service, job: Job, running: Running | None, echoes: Sequence[Echo]
) -> AsyncIterator[str]:
    """The stream of a completion: JSON texts, one for each event. Without `running` it is the echoes alone."""
    replies: list[Reply] = []

    def chunk(index: int, text: str, finish: str | None = None, **more: Any) -> str:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, **more}
        return json.dumps({**job.head("text_completion"), "choices": [choice]}, ensure_ascii=False)

    for index, echo in enumerate(echoes):
        if echo.ids or echo.text:
            scored: dict[str, Any] = {} if echo.scored is None else {"logprobs": _logprobs(service.lm, echo, ())}
            yield chunk(index, echo.text, **scored)
    async for index, event in _no_answers(echoes) if running is None else running.events():
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
                more["logprobs"] = _logprobs(service.lm, echoes[index], reply.logprobs, echoed=False)
            yield chunk(index, "", FINISH[reply.finish_reason], **more)
    if job.usage_chunk:
        yield json.dumps({**job.head("text_completion"), "choices": [], "usage": usage_of(replies, job)})
    yield DONE
