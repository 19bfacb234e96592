"""The application: its routes, its checks, what an error becomes, and how it starts and stops.

    client --HTTP--> Guard (Host, Origin, key, size) --> a route of one API --Job--> Service --> engine

Invariant: every error has a status and a body that its client can read; a traceback never leaves the process.
Run it:  blockpress serve
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from blockpress import __version__
from blockpress.engine import EngineOptions
from blockpress.errors import BlockpressError, one_line
from blockpress.lm import LM
from blockpress.serve import (
    anthropic,
    canvas,
    completions,
    decisions,
    infill,
    info,
    ollama,
    openai,
    page,
    responses,
)
from blockpress.serve.errors import (
    RETRY_AFTER,
    _ClientGone,
    _FieldError,
    _mistake,
    _Refused,
    error_body,
    error_schema,
    status_of,
)
from blockpress.serve.guard import Guard
from blockpress.serve.options import ServeOptions
from blockpress.serve.service import Service
from blockpress.serve.tracing import telemetry

logger = logging.getLogger("blockpress.serve")


def create_app(lm: LM, name: str, options: ServeOptions | None = None, engine: EngineOptions | None = None) -> FastAPI:
    """An ASGI application that serves a model. It takes the model over: when it stops, the model is closed.

    Args:
        name: what clients call the model. engine: limits of the engine that answers.
    """
    options = ServeOptions() if options is None else options
    service = Service(lm, name, options, EngineOptions() if engine is None else engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.warm_up()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        telemetry=telemetry(service.tracer_provider),
        title="blockpress",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for room in (openai, completions, infill, responses, decisions, anthropic, ollama, canvas, info, page):
        app.include_router(room.router)
    app.mount("/page", page.page_files())
    app.add_exception_handler(BlockpressError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(_ClientGone, lambda http, error: Response(status_code=499))
    app.add_exception_handler(RecursionError, _too_deep)
    app.add_exception_handler(Exception, _broken)
    if options.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, options=options)
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the errors that the routes have in place of FastAPI's own."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path, methods in document["paths"].items():
            content = {"application/json": {"schema": error_schema(path)}}
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["responses"]["4XX"] = {"description": "What is wrong, and what to do", "content": content}
    return app.openapi_schema or document


async def _failed(http: Request, error: Exception) -> Response:
    assert isinstance(error, BlockpressError)
    status = status_of(error)
    headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else None
    return JSONResponse(error_body(http.url.path, error, status), status, headers)


async def _invalid(http: Request, error: Exception) -> Response:
    """A body that is not of its shape: the first fault, by the name of its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await _failed(http, _FieldError("body", f"the body is not JSON: {first['ctx']['error']}", "send JSON"))
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place) or "body"
    given = "" if first["type"] == "missing" else f", and is {first.get('input')!r:.80}"
    return await _failed(http, _FieldError(field, f"{field}: {first['msg']}{given}", "docs/server.md lists the fields"))


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = error.__cause__ or error.__context__
    if isinstance(cause, _Refused):
        return await _failed(http, cause)
    refused = _Refused(error.status_code, f"{http.method} {http.url.path}: {error.detail}", "see docs/server.md")
    return JSONResponse(error_body(http.url.path, refused), error.status_code, error.headers)


async def _too_deep(http: Request, error: Exception) -> Response:
    return await _failed(http, _FieldError("body", "the body is nested too deeply", "send fewer levels"))


async def _broken(http: Request, error: Exception) -> Response:
    logger.error("%s %s failed: %s", http.method, http.url.path, one_line(error), exc_info=error)
    return JSONResponse(error_body(http.url.path, _mistake()), 500)
