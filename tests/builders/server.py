"""A server on a thread, or replicas in processes, for clients that know nothing but an address."""

from __future__ import annotations

import asyncio
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import uvicorn

from blockpress.decoding import Event
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.errors import BlockpressError, EngineError, one_line
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.serve import ServeOptions, create_app
from blockpress.serve.connection import uvicorn_config
from blockpress.serve.service import Service
from tests.forks import python

STEPS = 16


class ReferenceEngine:
    """The reference loop behind the doors of a `ThreadedEngine`: networks of tests run in no other.

    cancelled: the requests that were cancelled before their end.
    """

    broken = False

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.cancelled: list[Request] = []
        self._flags: dict[Request, threading.Event] = {}
        self._threads: list[threading.Thread] = []

    def submit(self, request: Request, deliver: Callable[[Event | BlockpressError], None]) -> None:
        flag = self._flags[request] = threading.Event()

        def work() -> None:
            try:
                for event in run_reference(self.core.network, [request], flag):
                    deliver(event)
            except BlockpressError as error:
                deliver(error)
            except Exception as error:
                deliver(EngineError(f"the engine broke: {one_line(error)}", hint="look at the test"))
            finally:
                self._flags.pop(request, None)

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def cancel(self, request: Request) -> None:
        flag = self._flags.get(request)
        if flag is not None:
            self.cancelled.append(request)
            flag.set()

    def close(self) -> None:
        for flag in list(self._flags.values()):
            flag.set()
        for thread in self._threads:
            thread.join()


@dataclass(frozen=True)
class Served:
    """A running server. engine: its engine, or the stand-in. loop: its event loop."""

    url: str
    service: Service
    engine: Any
    loop: asyncio.AbstractEventLoop

    def idle(self, seconds: float = 5) -> bool:
        """Wait until no request is open; False if one still is after that time."""
        until = time.monotonic() + seconds
        while self.service.open_requests and time.monotonic() < until:
            time.sleep(0.01)
        return not self.service.open_requests


class _Server(uvicorn.Server):
    loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


@contextmanager
def serving(
    lm: LM, name: str, options: ServeOptions | None = None, *, reference: bool = False, **engine: Any
) -> Iterator[Served]:
    """Serve a model on a free port. reference: by the reference loop. engine: further `EngineOptions`.

    Its canvases take at most `STEPS`: a puzzle needs fewer, and all else would take all that a checkpoint allows.
    """
    sampling = lm.generation.sampling
    lm.generation = replace(lm.generation, sampling=sampling.with_(steps=min(sampling.steps, STEPS)))
    app = create_app(lm, name, options, EngineOptions(**{"memory": 32 << 20, **engine}))
    service: Service = app.state.service
    if reference:
        service.engine.close()
        service.engine = ReferenceEngine(service.engine.core)  # type: ignore[assignment]
    config = uvicorn_config(app, service.options, log_level="error", timeout_graceful_shutdown=5)
    server = _Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            until = time.monotonic() + 60
            while not server.started:
                assert thread.is_alive() and time.monotonic() < until, "the server did not start"
                time.sleep(0.01)
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, service.engine, server.loop)
        finally:
            server.should_exit = True
            thread.join()


FRONT = """
import sys
from blockpress.cli.main import main
sys.executable, *arguments = sys.argv[1:]
sys.exit(main(arguments))
"""


@contextmanager
def fronting(model: str, *options: str) -> Iterator[str]:
    """The address of `blockpress serve --replicas 2`, once both are ready. All three processes are forks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        executable = Path(folder) / "python"
        executable.write_text(f'#!/bin/sh\nexec {shlex.join(python())} "$@"\n')
        executable.chmod(0o755)
        command = [*python(), "-c", FRONT, str(executable), "serve", model, "--replicas", "2", "--port", str(port)]
        with ready([*command, *options], port) as url:
            yield url


@contextmanager
def ready(command: list[str], port: int) -> Iterator[str]:
    """The address of a front that is started by a command, once its two replicas are ready."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until, ready = time.monotonic() + 120, 0
            while ready < 2:
                assert time.monotonic() < until and process.poll() is None, "the replicas do not start"
                time.sleep(0.1)
                with suppress(httpx.HTTPError):
                    ready = httpx.get(f"http://127.0.0.1:{port}/health").json()["ready"]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
