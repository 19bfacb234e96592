"""`blockpress serve`: a model behind HTTP, for whatever client speaks OpenAI's, Anthropic's or Ollama's API.

Invariant: without flags it serves this machine alone, and says so; it is ready only after its first answer.
Run it:  blockpress serve
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.cli import options
from blockpress.cli.hub import opened_or_pulled
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.serve import ServeOptions

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIB = 1 << 20
GRACE = 5
"""Seconds for streams to write their last event when the server stops."""
GARBAGE = 10_000
"""How many objects are made, less those freed, before Python looks for garbage: a request makes some hundred."""

Names = list[str]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="As for `blockpress run`. Default: the shipped one.")]
Host = Annotated[str, typer.Option(metavar="H", help="Address to listen at; 0.0.0.0 for all.")]
Port = Annotated[int, typer.Option(metavar="N", help="Port; 0 takes a free one.")]
Called = Annotated[str | None, typer.Option("--name", metavar="NAME", help="What clients call the model.")]
Keys = Annotated[
    Names | None, typer.Option(metavar="KEY", help="Ask for this key; repeatable. Also BLOCKPRESS_API_KEY.")
]
Origins = Annotated[Names | None, typer.Option(metavar="URL", help="Let pages of this origin call (CORS); repeatable.")]
Hosts = Annotated[Names | None, typer.Option(metavar="NAME", help="Another name of this machine; repeatable.")]
Running = Annotated[int, typer.Option(metavar="N", help="Requests in one forward.")]
Waiting = Annotated[int, typer.Option(metavar="N", help="Requests in the queue; more get status 429.")]
Memory = Annotated[
    int | None, typer.Option(metavar="MIB", help="Memory for the KV cache. Default: half of what is free.")
]
Body = Annotated[int, typer.Option(metavar="MIB", help="Most of one request.")]
Replicas = Annotated[
    int, typer.Option(metavar="N", help="Processes that serve the model; a conversation stays with one.")
]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="List fields that cannot be honoured as warnings; do not refuse them.")
]
Fetch = Annotated[bool, typer.Option("--fetch-images", help="Fetch images by address; never from private networks.")]
Traces = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Send a span of each request there by OTLP; the extra otel. Also OTEL_ variables."
    ),
]
Pull = Annotated[bool, typer.Option("--allow-pull", help="Let clients fetch models from the hub (Ollama's pull).")]
Log = Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers into the log.")]


def serve(
    model: Model = options.SHIPPED,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Called = None,
    api_key: Keys = None,
    allow_origin: Origins = None,
    allow_host: Hosts = None,
    max_running: Running = 32,
    max_waiting: Waiting = 1024,
    memory: Memory = None,
    max_body: Body = 32,
    replicas: Replicas = 1,
    lenient: Lenient = False,
    fetch_images: Fetch = False,
    allow_pull: Pull = False,
    log_prompts: Log = False,
    otlp_traces_endpoint: Traces = None,
    dtype: options.Dtype = None,
    compute_dtype: options.ComputeDtype = None,
    device: options.Device = "cpu",
    yes: options.Yes = False,
) -> None:
    """Serve a model over HTTP: OpenAI's, Anthropic's and Ollama's APIs, and a page to watch it think.

    \b
    Examples:
      blockpress serve
      blockpress serve google/diffusiongemma-26B-A4B-it --device cuda --port 8080
      blockpress serve --host 0.0.0.0 --api-key "$KEY"
    """
    _need_extras(otlp_traces_endpoint)
    from blockpress.engine import EngineOptions
    from blockpress.serve import ServeOptions

    _check_counts({"--max-body": max_body, "--memory": memory, "--replicas": replicas})
    shared: dict[str, Any] = {"lenient": lenient, "fetch_images": fetch_images, "log_prompts": log_prompts}
    shared |= {"allow_pull": allow_pull, "otlp_traces_endpoint": otlp_traces_endpoint}
    rules = ServeOptions(
        api_keys=tuple(api_key or filter(None, os.environ.get("BLOCKPRESS_API_KEY", "").split(","))),
        origins=tuple(allow_origin or ()),
        hosts=tuple(allow_host or ()),
        max_body=max_body * MIB,
        max_streams=max_running + max_waiting,
        **shared,
    )
    called = name or (Path(model).name if os.path.exists(model) else model)
    types: dict[str, Any] = {"dtype": dtype, "compute_dtype": compute_dtype, "device": device}
    if replicas > 1:
        limits = {"max_running": max_running, "max_waiting": max_waiting, "memory": memory, "max_body": max_body}
        _serve_replicas(model, replicas, {"name": called, **limits, **types, **shared}, rules, host, port)
        return
    from blockpress.lm import load
    from blockpress.serve import create_app

    engine = EngineOptions(max_running=max_running, max_waiting=max_waiting, memory=memory and memory * MIB)
    app = create_app(opened_or_pulled(lambda: load(model, **types), model, yes), called, rules, engine)
    _run(app, app.state.service.drain, rules, host, port)


def _serve_replicas(
    model: str, count: int, given: Mapping[str, Any], rules: ServeOptions, host: str, port: int
) -> None:
    """Several processes, each started with the options of `given`: a flag is True, and None is left out."""
    from blockpress.serve.replicas import create_front

    command = [sys.executable, "-m", "blockpress", "serve", model]
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            command += [option]
        elif value is not None and value is not False:
            command += [option, str(value)]
    os.environ["BLOCKPRESS_API_KEY"] = ",".join(rules.api_keys)  # not on the command line, which all may read
    front = create_front(command, count, rules)
    _run(front, front.state.front.drain, rules, host, port)


def _run(app: Any, drain: Callable[[], None], rules: ServeOptions, host: str, port: int) -> None:
    """Answer until a signal comes; then `drain` is called, and what runs may end."""
    import uvicorn

    from blockpress.serve.connection import uvicorn_config

    if host not in LOOPBACK and not rules.api_keys:
        open_to = f"anybody who reaches {host}:{port} may use the model; --api-key asks for a key"
        print(f"blockpress: {open_to}", file=sys.stderr)
    config = uvicorn_config(
        app, rules, host=host, port=port, log_level="info", timeout_graceful_shutdown=int(rules.patience) + GRACE
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            gc.freeze()  # the model and its modules stay: searching them for garbage stops all streams for 0.1 s
            gc.set_threshold(GARBAGE)

        async def shutdown(self, sockets: Any = None) -> None:
            drain()
            await super().shutdown(sockets)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # what no line shows
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        Server(config).run()
    except SystemExit as error:  # uvicorn could not bind, and has said why
        raise RequestError(f"--port is {port}, and {host} cannot be listened at", hint="give another --port") from error


def _check_counts(given: Mapping[str, int | None]) -> None:
    for option, value in given.items():
        options.positive(value, option)


def _need_extras(endpoint: str | None) -> None:
    """The packages of the server and, for traces, what sends them: said before the weights are read."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"serve needs the package {error.name}, which is not installed", hint="pip install 'blockpress[serve]'"
        ) from None
    from blockpress.serve.tracing import span_exporter

    span_exporter(endpoint)
