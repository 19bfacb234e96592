"""What clients ask about the server: whether it is ready, which model it serves, how a text is tokenised, its figures.

Source: OpenAI's models, vLLM's /tokenize, /detokenize, /load and /version, llama.cpp's /props and /slots.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import model_validator

from blockpress import __version__
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import Fields, Refusals
from blockpress.serve.page import solves_sudoku
from blockpress.serve.prompts import chat_requests, has_template
from blockpress.serve.service import Service

router = APIRouter()


def _service(http: Request) -> Service:
    service: Service = http.app.state.service
    return service


@router.get("/health")
@router.get("/ping", include_in_schema=False)
async def health(http: Request) -> JSONResponse:
    """200 once the first answer was given; 503 while the server warms up or stops, and when its engine has broken."""
    service = _service(http)
    state = "stopping" if service.stopping else "ok" if service.ready else "warming up"
    state = "broken" if service.engine.broken else state
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


def model_card(service: Service) -> dict[str, Any]:
    """The served model, as OpenAI, vLLM and Anthropic describe one."""
    config = service.lm.config
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "blockpress",
        "root": str(service.lm.path.name),
        "parent": None,
        "max_model_len": config.context_length,
        "type": "model",
        "display_name": service.name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
        "max_input_tokens": config.context_length,
    }


@router.get("/v1/models")
async def models(http: Request) -> dict[str, Any]:
    card = model_card(_service(http))
    return {"object": "list", "data": [card], "has_more": False, "first_id": card["id"], "last_id": card["id"]}


@router.get("/v1/models/{name:path}")
async def model(name: str, http: Request) -> dict[str, Any]:
    service = _service(http)
    service.check_model(name)
    return model_card(service)


class TokenizeBody(Fields):
    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if sum(value is not None for value in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt, content or messages")
        return self


@router.get("/tokenizer_info")
async def tokenizer_info(http: Request) -> dict[str, Any]:
    """The control tokens by their names, and the chat template, as clients without the tokenizer read them."""
    service = _service(http)
    tokenizer = service.lm.tokenizer
    if tokenizer is None:
        raise _FieldError("model", "the model has no tokenizer", "send token ids")
    ends = service.lm.generation.stop_ids[:1] if tokenizer.eos is None else (tokenizer.eos,)
    first = service.lm.config.bos_id if tokenizer.bos is None else tokenizer.bos
    ids = {"bos_token": first, "eos_token": next(iter(ends), None)}
    names = {name: None if id is None else tokenizer.token(id) for name, id in ids.items()}
    return {"chat_template": tokenizer.chat_template, **names, **tokenizer.special_tokens}


class DetokenizeBody(Fields):
    model: str | None = None
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, http: Request) -> dict[str, Any]:
    """The token ids of a text or of a chat."""
    service = _service(http)
    service.check_model(body.model)
    lm = service.lm
    if lm.tokenizer is None:
        raise _FieldError("model", "the model has no tokenizer", "send token ids")
    text = body.prompt if body.prompt is not None else body.content
    if text is not None:
        ids = lm.tokenizer.encode(text, add_special=body.add_special_tokens)
    else:
        messages = body.messages or []
        [request] = await service.build(lambda: chat_requests(lm, messages, Refusals(True), service.options, seed=[0]))
        ids = list(request.row.prompt)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": lm.config.context_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [lm.tokenizer.token(token) for token in ids]
    return answer


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, http: Request) -> dict[str, Any]:
    """The text of token ids."""
    service = _service(http)
    service.check_model(body.model)
    text = service.lm.decode(body.tokens)
    return {"prompt": text, "content": text}


@router.get("/metrics")
async def metrics(http: Request) -> Response:
    """All figures, as Prometheus reads them."""
    service = _service(http)
    return Response(service.metrics.text(service), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/load")
async def load(http: Request) -> dict[str, int]:
    return {"server_load": _service(http).open_requests}


@router.get("/props")
async def props(http: Request) -> dict[str, Any]:
    """What is served: the context that it really has, the sampler, and what the model can do."""
    service = _service(http)
    lm = service.lm
    stats = service.engine.core.stats
    options = service.engine.core.options
    return {
        "model_alias": service.name,
        "model_path": lm.path.name,
        "total_slots": options.max_running,
        "default_generation_settings": {"n_ctx": lm.config.context_length, **_sampling(lm.generation.sampling)},
        "modes": ["diffusion", "verified", "autoregressive"] if lm.config.has_canvas else ["autoregressive"],
        "canvas_length": lm.config.canvas_length if lm.config.has_canvas else None,
        "vocabulary": lm.config.vocab_size,
        "chat_template": has_template(lm),
        "modalities": {"vision": lm.config.image_id is not None and has_template(lm)},
        "kv_cache_bytes": stats.page_bytes,
        "sudoku": solves_sudoku(lm),
        "routes": sorted(http.app.openapi()["paths"]),
        "build_info": f"blockpress {__version__}",
    }


@router.get("/slots")
async def slots(http: Request) -> list[dict[str, Any]]:
    """One entry for each request that may run at once; as many are busy as run."""
    service = _service(http)
    core = service.engine.core
    running, context = core.stats.scheduler.running, service.lm.config.context_length
    return [{"id": n, "n_ctx": context, "is_processing": n < running} for n in range(core.options.max_running)]


def _sampling(sampling: Any) -> dict[str, Any]:
    names = ("steps", "entropy_bound", "t_min", "t_max", "stability", "confidence", "max_verifications")
    return {name: getattr(sampling, name) for name in names}
