"""Ollama's API: chat and generate, which stream lines of JSON unless told otherwise, and what clients ask about models.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md (the types of ollama 0.6.3).
Every field: docs/apis.md.
Run it:  python -m pytest tests/serve/test_ollama.py
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from blockpress import __version__
from blockpress.checkpoints.hub.cache import HubName
from blockpress.costs import parameters
from blockpress.decoding import Committed, Done
from blockpress.errors import HubError
from blockpress.serve.dialects import part_of
from blockpress.serve.errors import _FieldError, _Refused, _UnknownModel
from blockpress.serve.fields import BodyRoute, Fields
from blockpress.serve.infill import begin_fill
from blockpress.serve.ollama_types import GenerateBody, OllamaBody, OllamaChatBody, hole_body, ollama_job, plain_name
from blockpress.serve.openai import Job, call_id, token_logprob
from blockpress.serve.prompts import has_template
from blockpress.serve.pull import pulled
from blockpress.serve.service import Running, Service
from blockpress.serve.sse import JSONAnswer, ndjson_stream, unless_gone

API_VERSION = "0.13.5"
"""The version of Ollama whose API this is: some clients ask for a least one."""
LOADED = "9999-12-31T23:59:59Z"
"""Until when the model stays loaded: as long as the server runs."""
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class _JsonRoute(BodyRoute):
    """Reads a body as JSON whatever its Content-Type: Ollama does, and `curl -d` sends another."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(http: Request) -> Response:
            others = [(name, value) for name, value in http.scope["headers"] if name != b"content-type"]
            headers = [*others, (b"content-type", b"application/json")]
            return await handle(Request({**http.scope, "headers": headers}, http.receive))

        return handled


router = APIRouter(route_class=_JsonRoute)


class NameBody(Fields):
    """A model's name, in its newer or its older field."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    insecure: bool | None = None
    verbose: bool | None = None


@router.post("/api/chat", response_model=None)
async def chat(body: OllamaChatBody, http: Request) -> Response:
    """A chat's answer, as lines of JSON unless `stream` is false."""
    if not body.messages:
        return _loaded(http, body, {"message": {"role": "assistant", "content": ""}})
    return await _answer(http, body)


@router.post("/api/generate", response_model=None)
async def generate(body: GenerateBody, http: Request) -> Response:
    """What follows a prompt, as lines of JSON unless `stream` is false."""
    if not (body.prompt or body.images or body.suffix):
        return _loaded(http, body, {"response": ""})
    return await _answer(http, body)


def _loaded(http: Request, body: OllamaBody, empty: dict[str, Any]) -> Response:
    """Without a prompt a client only wants the model to be loaded, or unloaded, which it stays."""
    service: Service = http.app.state.service
    service.check_model(plain_name(body.model))
    reason = "unload" if body.keep_alive in (0, "0") else "load"
    return JSONAnswer({"model": body.model, "created_at": _now(), **empty, "done": True, "done_reason": reason})


async def _answer(http: Request, body: OllamaChatBody | GenerateBody) -> Response:
    service: Service = http.app.state.service
    started = time.monotonic_ns()
    if isinstance(body, GenerateBody) and body.suffix:
        hole, most = hole_body(service, body)
        running, job = await begin_fill(service, hole, body.prompt or "", body.suffix, most)
    else:
        job = await service.build(lambda: ollama_job(service, body))
        running = service.begin(job.requests)
    chunks = _chunks(service, job, running, body, started)
    if body.stream is not False:
        return ndjson_stream(http, running, chunks)
    return JSONAnswer(await unless_gone(_whole(chunks), http))


async def _chunks(
    service: Service, job: Job, running: Running, body: OllamaChatBody | GenerateBody, started: int
) -> AsyncIterator[dict[str, Any]]:
    """The stream of an answer: an object for each line."""
    first, calls = 0, 0
    chat = isinstance(body, OllamaChatBody)

    def chunk(content: str = "", thinking: str = "", call: Any = None, **more: Any) -> dict[str, Any]:
        said: dict[str, Any] = {"content" if chat else "response": content}
        said |= ({"thinking": thinking} if thinking else {}) | ({"tool_calls": [call]} if call else {})
        said = {"message": {"role": "assistant", **said}} if chat else said
        return {"model": body.model, "created_at": _now(), **said, "done": False, **more}

    async for _, event in running.events():
        first = first or time.monotonic_ns()
        part = part_of(event)
        if part is not None and part.call is not None:
            function = {"index": calls, "name": part.call.name, "arguments": part.call.arguments}
            yield chunk(call={"id": call_id(job, 0, calls), "function": function})
            calls += 1
        elif part is not None:
            yield chunk(thinking=part.text) if part.kind == "thinking" else chunk(part.text)
        elif isinstance(event, Committed) and event.logprobs:
            yield chunk(logprobs=[token_logprob(service.lm, one) for one in event.logprobs])
        elif isinstance(event, Done):
            yield chunk(done=True, **_end(job, event, started, first))


def _end(job: Job, event: Done, started: int, first: int) -> dict[str, Any]:
    """How the answer ended and what it took; durations are nanoseconds."""
    usage, now = event.reply.usage, time.monotonic_ns()
    ended = {
        "done_reason": "length" if event.reply.finish_reason == "length" else "stop",
        "total_duration": now - started,
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": first - started,
        "eval_count": usage.completion_tokens,
        "eval_duration": now - first,
    }
    return ended | ({"warnings": job.warnings} if job.warnings else {})


async def _whole(chunks: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """The chunks of a stream as one."""
    whole: dict[str, Any] = {}
    async for chunk in chunks:
        for name, value in chunk.items():
            if name == "message":
                _join(whole.setdefault("message", {}), value)
            elif name in ("response", "thinking", "logprobs"):
                _join(whole, {name: value})
            else:
                whole[name] = value
    return whole


def _join(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        whole[name] = whole[name] + value if name in whole and name != "role" else value


@router.get("/api/tags")
async def tags(http: Request) -> dict[str, Any]:
    """The models that are here: the served one."""
    return {"models": [_card(http.app.state.service)]}


@router.get("/api/ps")
async def loaded_models(http: Request) -> dict[str, Any]:
    """The models in memory: the served one."""
    service: Service = http.app.state.service
    card = _card(service)
    on_card = card["size"] if service.lm.network.device.type != "cpu" else 0
    more = {"expires_at": LOADED, "size_vram": on_card, "context_length": service.lm.config.context_length}
    return {"models": [{**card, **more}]}


@router.get("/api/version")
async def api_version() -> dict[str, str]:
    return {"version": API_VERSION, "blockpress": __version__}


@router.post("/api/show")
async def show(body: NameBody, http: Request) -> dict[str, Any]:
    """What the model is and can do."""
    service: Service = http.app.state.service
    service.check_model(plain_name(body.model or body.name or ""))
    config, family = service.lm.config, service.lm.config.family
    card = _card(service)
    info = {
        "general.architecture": family,
        "general.parameter_count": sum(parameters(config).values()),
        f"{family}.block_count": len(config.layers),
        f"{family}.context_length": config.context_length,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.vocab_size": config.vocab_size,
    }
    tokenizer = service.lm.tokenizer
    return {
        "modelfile": f"FROM {service.name}\n",
        "parameters": "",
        "template": (tokenizer and tokenizer.chat_template) or "",
        "details": card["details"],
        "model_info": info,
        "capabilities": card["capabilities"],
        "modified_at": card["modified_at"],
    }


@router.post("/api/pull", response_model=None)
async def pull(body: NameBody, http: Request) -> Response:
    """Fetch a model from the hub into the cache, where the server allows it; the served one is here already."""
    service: Service = http.app.state.service
    name = plain_name(body.model or body.name or "")
    try:
        service.check_model(name)
        states = _already_here()
    except _UnknownModel:
        states = pulled(service, _on_hub(name, service.options.allow_pull))
    if body.stream is not False:
        return ndjson_stream(http, None, states)
    last = await unless_gone(_last(states), http)
    return JSONAnswer(last)


def _on_hub(name: str, allowed: bool) -> HubName:
    """Raises _Refused: the server fetches none. _FieldError: there is no such name on a hub."""
    if not allowed:
        why = f"model {name!r:.200} is not here, and this server fetches none"
        hint = "start it with --allow-pull, or run `blockpress pull` and `blockpress serve` with it"
        raise _Refused(403, why, hint)
    wanted = HubName.parse(name)
    if wanted is None:
        raise _FieldError("model", f"model is {name!r:.200}, no name on the hub", "give owner/name")
    return wanted


async def _already_here() -> AsyncIterator[dict[str, Any]]:
    for status in ("pulling manifest", "success"):
        yield {"status": status}


async def _last(states: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """Raises _Refused (502): the hub does not have it, or does not answer."""
    last: dict[str, Any] = {}
    try:
        async for state in states:
            last = state
    except HubError as error:
        raise _Refused(502, error.message, error.hint) from error
    finally:
        await states.aclose()  # type: ignore[attr-defined]
    return last


def _card(service: Service) -> dict[str, Any]:
    """The served model, as Ollama lists one; its digest is of name, size and date, not of all its bytes."""
    lm = service.lm
    files = [lm.path] if lm.path.is_file() else [each for each in lm.path.glob("*") if each.is_file()]
    size = sum(each.stat().st_size for each in files)
    when = _date(max((each.stat().st_mtime for each in files), default=service.created))
    name = service.name if ":" in service.name else f"{service.name}:latest"
    details = {
        "parent_model": "",
        "format": "gguf" if lm.path.suffix == ".gguf" else "safetensors",
        "family": lm.config.family,
        "families": [lm.config.family],
        "parameter_size": _rounded(sum(parameters(lm.config).values())),
        "quantization_level": TYPES.get(str(lm.network.storage_dtype).removeprefix("torch."), ""),
    }
    return {
        "name": name,
        "model": name,
        "modified_at": when,
        "size": size,
        "digest": hashlib.sha256(json.dumps([name, size, when]).encode()).hexdigest(),
        "details": details,
        "capabilities": _capabilities(service),
    }


def _capabilities(service: Service) -> list[str]:
    """What the chat template has a place for."""
    lm = service.lm
    template = (has_template(lm) and lm.tokenizer and lm.tokenizer.chat_template) or ""
    words = {"tools": "tools", "thinking": "enable_thinking"}
    vision = ["vision"] if template and lm.config.vision is not None else []
    holes = ["insert"] if lm.config.has_canvas else []
    return ["completion", *holes, *(name for name, word in words.items() if word in template), *vision]


def _rounded(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _now() -> str:
    return _date(time.time())
