"""One model that is served: requests are built on threads, answered by one engine, and reported as they go.

    route --> build (a thread: templates, images, shapes) --requests--> engine --events--> route, in its API's form

Invariant: whatever ends a job (an answer, an error, a client that leaves), its requests leave the engine within a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final

import anyio.to_thread

from blockpress.decoding import Done, Event, Failed, ReasoningDelta, Reply, Text
from blockpress.engine import EngineCore, EngineOptions, Request, ThreadedEngine
from blockpress.errors import BlockpressError, Overloaded
from blockpress.lm import LM
from blockpress.serve.errors import _ClientGone, _Refused, _UnknownModel
from blockpress.serve.metrics import Metrics
from blockpress.serve.options import ServeOptions

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest

Made = TypeVar("Made")
logger = logging.getLogger("blockpress.serve")


@final
class Service:
    """A model, its engine, and what is counted. `name`: what clients call the model."""

    def __init__(self, lm: LM, name: str, options: ServeOptions, engine: EngineOptions) -> None:
        self.lm, self.name, self.options = lm, name, options
        self.created = int(time.time())
        self.metrics = Metrics(name)
        self.engine = ThreadedEngine(EngineCore(lm.network, engine))
        self.ready = self.stopping = False
        self._open = 0
        self._drain: asyncio.Task[None] | None = None

    @property
    def open_requests(self) -> int:
        """Requests of clients that are answered or wait now."""
        return self._open

    async def warm_up(self) -> None:
        """One short answer, so that no client waits for what is built and measured at the first one."""
        ids = [self.lm.config.bos_id if self.lm.config.bos_id is not None else 0]
        requests = await self.build(lambda: self.lm.build_requests(ids, max_tokens=1))
        async for _ in self.events(requests):
            pass
        self.ready = True

    def drain(self) -> None:
        """Take no more requests, and end those that are not answered within `patience` with an error. Called once."""
        self.stopping = True
        self._drain = asyncio.get_running_loop().create_task(self._end_late())

    async def _end_late(self) -> None:
        await asyncio.sleep(self.options.patience)
        await anyio.to_thread.run_sync(self.engine.close)

    def close(self) -> None:
        """End what is still answered, and free the model's memory."""
        self.stopping = True
        if self._drain is not None:
            self._drain.cancel()
        self.engine.close()
        self.lm.close()

    async def build(self, make: Callable[[], Made]) -> Made:
        """Run `make` on a thread, as reading images and compiling shapes take long."""
        return await anyio.to_thread.run_sync(make)

    def begin(self, requests: Sequence[Request]) -> Running:
        """Hand requests to the engine, to be answered side by side.

        Raises:
            Overloaded: too many are open. EngineError: the engine broke. BlockpressError (503): the server stops.
        """
        if self.stopping:
            raise _Refused(503, "the server stops", "send the request again, or to another one")
        if self._open + len(requests) > self.options.max_streams:
            raise Overloaded(f"{self._open} requests are open", hint="send it again later")
        return Running(self, requests)

    async def events(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Event]]:
        """Begin, and give the events; leaving the loop early cancels the requests. Errors as in `begin`."""
        running = self.begin(requests)
        try:
            async for number, event in running.events():
                yield number, event
        finally:
            running.close()

    def log(self, request: Request, reply: Reply, seconds: float) -> None:
        """Note an answer in the log."""
        usage = reply.usage
        logger.info(
            "answered in %.3f s: %d prompt tokens, %d tokens, %d steps, %s",
            seconds,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.steps,
            reply.finish_reason,
        )
        if self.options.log_prompts:
            texts = (self.lm.tokenizer and self.lm.decode(request.row.prompt), reply.text)
            logger.info("prompt: %r answer: %r", *texts)

    async def replies(self, requests: Sequence[Request], http: HTTPRequest) -> list[Reply]:
        """The whole answers, in the order of the requests.

        Raises:
            _ClientGone: the client left, and the requests are cancelled. BlockpressError: as `events`.
        """
        replies: dict[int, Reply] = {}

        async def collect() -> None:
            async for number, event in self.events(requests):
                if isinstance(event, Done):
                    replies[number] = event.reply

        await unless_gone(collect(), http)
        return [replies[number] for number in range(len(requests))]

    def check_model(self, name: str | None) -> None:
        """Raises RequestError: the client asks for a model that is not served here."""
        if name not in (None, "", self.name, "default"):
            raise _UnknownModel(f"model is {name!r:.200}, which is not served here", hint=f"give {self.name!r}")


@final
class Running:
    """Requests that the engine answers side by side, until they have ended, or this is closed or forgotten."""

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        self._service, self._requests = service, requests
        self._loop, self._started = asyncio.get_running_loop(), time.monotonic()
        self._events: asyncio.Queue[tuple[int, Event | BlockpressError]] = asyncio.Queue()
        self._closed = False
        service._open += len(requests)
        try:
            for number, request in enumerate(requests):
                service.engine.submit(request, self._deliver_to(number))
        except BaseException:
            self.close()
            raise

    def _deliver_to(self, number: int) -> Callable[[Event | BlockpressError], None]:
        loop, events = self._loop, self._events  # not this object, which ends the requests when nobody holds it

        def deliver(event: Event | BlockpressError) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (number, event))

        return deliver

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all requests as they occur, each with its request's number.

        Raises:
            BlockpressError: what one of them ended with; the others go on until this is closed.
        """
        service, left, silent = self._service, len(self._requests), set(range(len(self._requests)))
        while left:
            number, event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, BlockpressError):
                raise event
            seconds = time.monotonic() - self._started
            service.metrics.event(event, seconds)
            if service.stopping and isinstance(event, Done) and event.reply.finish_reason == "cancelled":
                raise _Refused(503, "the server stops, and the answer is not whole", "send the request again")
            if number in silent and isinstance(event, Text | ReasoningDelta):
                silent.remove(number)
                service.metrics.first_text(seconds)
            if isinstance(event, Done):
                left -= 1
                service.log(self._requests[number], event.reply, seconds)
            yield number, event

    def close(self) -> None:
        """Cancel what has not ended. It may be called again."""
        if not self._closed:
            self._closed = True
            self._service._open -= len(self._requests)
            for request in self._requests:
                self._service.engine.cancel(request)

    __del__ = close  # a client may leave before its stream has begun, and then nobody closes it


async def unless_gone(work: Coroutine[Any, Any, Made], http: HTTPRequest) -> Made:
    """Await `work`, but cancel it when the client closes its connection. Raises _ClientGone: it has."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
