"""Several servers of one model on one machine, behind one address: each conversation stays with the server that has it.

    client --> front --+--> replica 0 (a process of its own, on a loopback port)
                       +--> replica 1

A request goes to the replica that the beginning of its prompt hashes to (rendezvous hashing: when one is lost, only its
own requests move), so what a conversation has in the KV cache is found again; a replica that is much busier than the
others passes it on.

Invariant: a request that no replica has begun to answer is sent to another one; a stream whose replica dies ends with
an error event. A replica that has died, or whose engine has broken, is started again.
Run it:  blockpress serve --replicas 2
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, final

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from blockpress.serve.errors import RETRY_AFTER, _ClientGone, _Refused, error_body
from blockpress.serve.guard import Guard
from blockpress.serve.options import ServeOptions
from blockpress.serve.sse import cut_off, unless_gone

logger = logging.getLogger("blockpress.serve")

KEY_LENGTH = 512
"""Characters of a prompt by which its replica is chosen."""
SLACK = 4
"""How many more open requests than the least busy replica one may have before it passes new ones on."""
PATIENCE = 5.0
"""Seconds that a replica may take to say what it does."""
CHECK_EVERY = 2.0
"""Seconds from one question to a replica whether its engine still runs to the next."""
TOGETHER = ("/metrics", "/load", "/slots", "/props", "/api/ps")
"""Paths that tell of one server: asked of all replicas, whose answers are joined."""
_SUMS = ("server_load", "total_slots", "kv_cache_bytes", "size", "size_vram")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "accept-encoding"}
"""Headers that are of one connection, and are not passed on."""


@dataclass(eq=False)
class Replica:
    """One server process. `open`: its requests now. stopping: it is not started again."""

    number: int
    command: Sequence[str]
    port: int = 0
    open: int = 0
    ready: bool = False
    stopping: bool = False
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def keep_running(self) -> None:
        """Start the process whenever there is none, and wait until it is ready; until cancelled."""
        pause = 1.0
        try:
            while True:
                self.port = _free_port()
                self.process = await asyncio.create_subprocess_exec(*self.command, "--port", str(self.port))
                self.ready = await self._wait()
                logger.info("replica %d %s at %s", self.number, "is ready" if self.ready else "failed", self.url)
                pause = 1.0 if self.ready else min(2 * pause, 60.0)
                watch = asyncio.create_task(self._end_if_broken(self.process))
                try:
                    code = await self.process.wait()
                finally:
                    watch.cancel()
                self.ready = False
                if self.stopping:
                    return
                logger.warning("replica %d ended with status %s, and is started again", self.number, code)
                await asyncio.sleep(pause)
        finally:
            self.stop()
            if self.process is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.process.wait(), 60)

    def stop(self) -> None:
        """Let the process end what it answers, in its own time."""
        self.stopping = True
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()

    async def _end_if_broken(self, process: asyncio.subprocess.Process) -> None:
        """End the process once it says that its engine has broken: all that it could answer from then on are errors."""
        async with httpx.AsyncClient(trust_env=False) as client:
            state = None
            while state != "broken":
                await asyncio.sleep(CHECK_EVERY)
                with suppress(httpx.HTTPError, ValueError):
                    state = (await client.get(f"{self.url}/health", timeout=PATIENCE)).json().get("status")
        self.ready = False
        logger.error("the engine of replica %d has broken", self.number)
        with suppress(ProcessLookupError):
            process.terminate()

    async def _wait(self) -> bool:
        assert self.process is not None
        async with httpx.AsyncClient(trust_env=False) as client:
            while self.process.returncode is None:
                with suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/health", timeout=5)).status_code == 200:
                        return True
                await asyncio.sleep(0.1)
        return False


@final
class Front:
    """Chooses a replica for each request, and passes bytes on."""

    def __init__(self, replicas: Sequence[Replica], options: ServeOptions) -> None:
        self.replicas, self.options = replicas, options
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5), limits=httpx.Limits(max_connections=None), trust_env=False
        )

    def order(self, key: bytes) -> list[Replica]:
        """The ready replicas, the best for that key first."""
        ready = {str(replica.number): replica for replica in self.replicas if replica.ready}
        return [ready[name] for name in rendezvous(key, {name: each.open for name, each in ready.items()})]

    def drain(self) -> None:
        """Take no more requests; those that run end as their replicas stop."""
        for replica in self.replicas:
            replica.stop()

    async def health(self, http: Request) -> Response:
        ready = sum(replica.ready for replica in self.replicas)
        state = {"status": "ok" if ready else "warming up", "replicas": len(self.replicas), "ready": ready}
        return JSONResponse(state, 200 if ready else 503)

    async def together(self, http: Request) -> Response:
        """One answer of what all replicas say."""
        path, ready = http.url.path, [replica for replica in self.replicas if replica.ready]

        async def ask(replica: Replica) -> httpx.Response:
            return await self.client.get(replica.url + path, headers=_passed(http), timeout=PATIENCE)

        answers = await asyncio.gather(*map(ask, ready), return_exceptions=True)
        said = {
            str(replica.number): answer.content
            for replica, answer in zip(ready, answers, strict=True)
            if isinstance(answer, httpx.Response) and answer.status_code == 200
        }
        return joined_answer(path, said)

    async def forward(self, http: Request) -> Response:
        """Pass a request to its replica, and the answer back as it comes."""
        body = await http.body()
        for replica in self.order(routing_key(body)):
            answer = await unless_gone(self._begin(replica, http, body), http)
            if answer is not None:
                headers = {name: value for name, value in answer.headers.items() if name not in _HOP}
                headers["x-blockpress-replica"] = str(replica.number)
                rest = self._rest(replica, answer, http.url.path)
                return StreamingResponse(rest, answer.status_code, headers)
        return none_ready(http.url.path)

    async def _begin(self, replica: Replica, http: Request, body: bytes) -> httpx.Response | None:
        """The head of a replica's answer; None if it was lost before it gave one."""
        path = http.url.path + (f"?{http.url.query}" if http.url.query else "")
        request = self.client.build_request(http.method, replica.url + path, content=body, headers=_passed(http))
        replica.open += 1
        try:
            return await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            replica.open -= 1
            logger.warning("replica %d does not answer: %s", replica.number, error)
            return None
        except BaseException:
            replica.open -= 1
            raise

    async def _rest(self, replica: Replica, answer: httpx.Response, path: str) -> AsyncIterator[bytes]:
        sent = 0
        try:
            async for chunk in answer.aiter_raw():
                sent += chunk.count(b"\n\n")
                yield chunk
        except httpx.HTTPError:
            last = cut_off(path, answer.headers.get("content-type", ""), sent)
            if not last:
                raise
            yield last
        finally:
            replica.open -= 1
            await answer.aclose()


def rendezvous(key: bytes, load: Mapping[str, int]) -> list[str]:
    """The names of replicas, the best for that key first; those with many more open requests than another come last.

    When one is lost, the others keep their order, so only the keys that were its own move.

    Args:
        load: the open requests of each.

    >>> rendezvous(b"once upon", {"0": 0, "1": 0, "2": 0}), rendezvous(b"once upon", {"0": 0, "1": 0})
    (['0', '1', '2'], ['0', '1'])
    >>> rendezvous(b"once upon", {"0": 5, "1": 0, "2": 0})
    ['1', '2', '0']
    """
    most = min(load.values(), default=0) + SLACK
    return sorted(load, key=lambda name: (load[name] > most, hashlib.blake2b(key + name.encode()).digest()))


def joined_answer(path: str, said: Mapping[str, bytes]) -> Response:
    """The answer of `TOGETHER`'s path, given the bodies of the replicas' answers by their names; 503 without any."""
    if path == "/metrics":
        figures = joined_figures({name: body.decode() for name, body in said.items()})
        return Response(figures, media_type="text/plain; version=0.0.4; charset=utf-8")
    if not said:
        return none_ready(path)
    return JSONResponse(joined_facts({name: json.loads(body) for name, body in said.items()}))


def joined_facts(said: Mapping[str, Any]) -> Any:
    """What several replicas say of themselves, as one server would: amounts are summed, slots listed one after another.

    >>> joined_facts({"0": {"server_load": 2}, "1": {"server_load": 1}})
    {'server_load': 3}
    >>> joined_facts({"a": [{"id": 0, "n_ctx": 8}], "b": [{"id": 0, "n_ctx": 8}]})
    [{'id': 0, 'n_ctx': 8, 'replica': 'a'}, {'id': 1, 'n_ctx': 8, 'replica': 'b'}]
    """
    first = next(iter(said.values()))
    if isinstance(first, list):
        slots = [(name, slot) for name, listed in said.items() for slot in listed]
        return [{**slot, "id": number, "replica": name} for number, (name, slot) in enumerate(slots)]
    if "models" in first:  # of the one that all of them have in memory
        models = joined_facts({name: facts["models"][0] for name, facts in said.items()})
        return {**first, "models": [models]}
    return first | {name: sum(facts[name] for facts in said.values()) for name in _SUMS if name in first}


def none_ready(path: str) -> Response:
    """The answer to a request for which there is no replica, in the form of its API."""
    refused = _Refused(503, "no replica is ready", "send the request again later")
    return JSONResponse(error_body(path, refused), 503, {"Retry-After": str(RETRY_AFTER)})


def joined_figures(texts: Mapping[str, str]) -> str:
    """The figures of all replicas in Prometheus' text form, each line with its replica's name as a label.

    >>> one = "# HELP steps Steps.\\n# TYPE steps counter\\nsteps{model=\\"m\\"} 1.0\\n"
    >>> print(joined_figures({"0": one, "1": one}), end="")
    # HELP steps Steps.
    # TYPE steps counter
    steps{replica="0",model="m"} 1.0
    steps{replica="1",model="m"} 1.0
    """
    families: dict[str, str] = {}
    for replica, text in texts.items():
        for family in re.findall(r"(?m)^# HELP .*\n# TYPE .*\n(?:[^#].*\n)*", text):
            head, samples = re.fullmatch(r"((?:#.*\n)*)((?:.*\n)*)", family).groups()  # type: ignore[union-attr]
            families[head] = families.get(head, "") + re.sub(r"(?m)^([\w:]+)\{", rf'\1{{replica="{replica}",', samples)
    return "".join(head + samples for head, samples in families.items())


def routing_key(body: bytes) -> bytes:
    """The beginning of a request's prompt: of a chat its first two messages, which stay the same over its turns.

    >>> routing_key(b'{"prompt": "once upon a time"}')
    b'once upon a time'
    """
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        return body[:KEY_LENGTH]
    if not isinstance(fields, dict):
        return body[:KEY_LENGTH]
    given = [fields.get(name) for name in ("system", "instructions", "prompt", "input", "input_prefix", "state")]
    messages = fields.get("messages")
    given += messages[:2] if isinstance(messages, list) else []
    texts = [each if isinstance(each, str) else json.dumps(each) for each in given if each is not None]
    return "".join(texts)[:KEY_LENGTH].encode(errors="surrogatepass")


def create_front(command: Sequence[str], count: int, options: ServeOptions) -> Starlette:
    """An ASGI application in front of `count` servers, each started by `command` and a `--port`."""
    replicas = [Replica(number, command) for number in range(count)]
    front = Front(replicas, options)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(replica.keep_running()) for replica in replicas]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await front.client.aclose()

    methods = ["GET", "POST", "PUT", "DELETE", "HEAD"]
    routes = [
        Route("/health", front.health),
        *(Route(path, front.together, methods=["GET"]) for path in TOGETHER),
        Route("/{path:path}", front.forward, methods=methods),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.add_exception_handler(_ClientGone, lambda http, error: Response(status_code=499))
    app.add_middleware(Guard, options=options)
    app.state.front = front
    return app


def _passed(http: Request) -> dict[str, str]:
    return {name: value for name, value in http.headers.items() if name not in (*_HOP, "origin")}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
