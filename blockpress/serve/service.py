"""One model that is served: requests are built on threads, answered by one engine, and reported as they go.

    route --> build (a thread: templates, images, shapes) --requests--> engine --events--> route, in its API's form

Invariant: whatever ends a job (an answer, an error, a client that leaves), its requests leave the engine within a step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar, final

from blockpress.config import Sampling
from blockpress.decoding import Cancel, Denoised, Done, Event, Failed, ReasoningDelta, Reply, Text
from blockpress.engine import EngineCore, EngineOptions, Request, ThreadedEngine
from blockpress.errors import BlockpressError, EngineError, Overloaded, one_line
from blockpress.lm import LM
from blockpress.model import Network
from blockpress.serve.errors import _Refused, _UnknownModel
from blockpress.serve.metrics import Metrics
from blockpress.serve.options import ServeOptions
from blockpress.serve.sse import _Waker, unless_gone
from blockpress.serve.tracing import AnswerSpan, stop, tracer_provider

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest

Made = TypeVar("Made")
Deliver = Callable[[int, Event | BlockpressError], None]
"""Takes an event of the answer of that number, from any thread; an error is the last thing that it takes."""
BUILDERS = 40
"""Requests that are built at once, most of which wait for the network or the engine."""
POLL = 0.05
"""Seconds between two looks at a flag that may end an answer."""
logger = logging.getLogger("blockpress.serve")


@final
class Service:
    """A model, its engine, and what is counted. `name`: what clients call the model."""

    def __init__(self, lm: LM, name: str, options: ServeOptions, engine: EngineOptions) -> None:
        self.lm, self.name, self.options = lm, name, options
        self.created = int(time.time())
        self.metrics = Metrics(name)
        self.tracer_provider = tracer_provider(options.otlp_traces_endpoint)
        self.engine = ThreadedEngine(EngineCore(lm.network, engine))
        self.ready = self.stopping = False
        lm.answer = self._answer
        self._open = 0
        self._builders = ThreadPoolExecutor(BUILDERS, "blockpress-build")  # half of what anyio's threads cost
        self._computing = ThreadPoolExecutor(1, "blockpress-compute")
        self._drain: asyncio.Task[None] | None = None
        self.pulling = asyncio.Lock()

    @property
    def open_requests(self) -> int:
        """Requests of clients that are answered or wait now."""
        return self._open

    def opened(self, count: int) -> None:
        """Count that many more open requests, or fewer."""
        self._open += count

    def check_room(self, count: int) -> None:
        """Raises Overloaded: there is none for so many more requests."""
        if self._open + count > self.options.max_streams:
            raise Overloaded(f"{self._open} requests are open", hint="send it again later")

    async def warm_up(self) -> None:
        """One short answer, so that no client waits for what is built and measured at the first one."""
        self.waker = _Waker(asyncio.get_running_loop())
        ids = [self.lm.config.bos_id if self.lm.config.bos_id is not None else 0]
        sampling = self.lm.generation.sampling
        if isinstance(sampling, Sampling):  # the first step, and one that reads what the first one drew
            sampling = sampling.with_(steps=min(2, sampling.steps))
        requests = await self.build(lambda: self.lm.build_requests(ids, max_tokens=1, sampling=sampling))
        async for _ in self.begin(requests).events():
            pass
        self.ready = True

    def drain(self) -> None:
        """Take no more requests, and end those that are not answered within `patience` with an error. Called once."""
        self.stopping = True
        self._drain = asyncio.get_running_loop().create_task(self._end_late())

    async def _end_late(self) -> None:
        await asyncio.sleep(self.options.patience)
        await asyncio.to_thread(self.engine.close)

    def close(self) -> None:
        """End what is still answered, and free the model's memory."""
        self.stopping = True
        if self._drain is not None:
            self._drain.cancel()
        self.engine.close()
        for threads in (self._builders, self._computing):
            threads.shutdown(wait=False, cancel_futures=True)
        self.lm.close()
        if self.tracer_provider is not None:
            stop(self.tracer_provider)

    async def build(self, make: Callable[[], Made]) -> Made:
        """Run `make` on a thread, as reading images and compiling shapes take long. Raises Overloaded: a full queue."""
        self.check_room(1)
        return await _run(self._builders, make)

    async def build_unless_gone(self, make: Callable[[Cancel], Made], http: HTTPRequest) -> Made:
        """The same for what computes: one at a time; its flag is set when the client leaves. Raises _ClientGone."""
        gone = threading.Event()
        try:
            return await unless_gone(_run(self._computing, partial(make, gone)), http)
        finally:
            gone.set()

    def begin(self, requests: Sequence[Request], *, steps: bool = False) -> Running:
        """Hand requests to the engine, to be answered side by side.

        Args:
            steps: whether `Denoised` is among the events, which wakes the event loop at every step.

        Raises:
            Overloaded: too many are open. EngineError: the engine broke. BlockpressError (503): the server stops.
        """

        def cancel() -> None:
            for request in requests:
                self.engine.cancel(request)

        def start(deliver: Deliver) -> Callable[[], None]:
            for number, request in enumerate(requests):
                self.engine.submit(request, partial(deliver, number))
            return cancel

        return Running(self, len(requests), start, requests, steps=steps)

    async def begin_stream(self, make: Callable[[Cancel], Iterator[Event]], count: int) -> Running:
        """Begin a stream of the model, such as `LM.infill_stream` with `count` seeds, and read it on a thread.

        Args:
            make: begins the stream; it gets a flag that ends it.

        Raises:
            BlockpressError: what `make` refuses, and as `begin`.
        """
        gone = threading.Event()
        events = await self.build(lambda: make(gone))

        def start(deliver: Deliver) -> Callable[[], None]:
            def read() -> None:
                try:
                    for event in events:
                        deliver(event.row, event)
                except BlockpressError as error:
                    deliver(0, error)
                except Exception as error:
                    deliver(0, EngineError(f"the stream broke: {one_line(error)}", hint="report this line"))

            threading.Thread(target=read, name="blockpress-stream", daemon=True).start()
            return gone.set

        return Running(self, count, start)

    def _answer(self, network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
        """What `LM` runs its own calls with: the engine that answers all others, so that there is one KV cache."""
        events: SimpleQueue[Event | BlockpressError] = SimpleQueue()
        left, cancelled = len(requests), False
        try:
            for request in requests:
                self.engine.submit(request, events.put)
            while left:
                if cancel is not None and cancel.is_set() and not cancelled:
                    cancelled = True
                    for request in requests:
                        self.engine.cancel(request)
                with suppress(Empty):
                    event = events.get(timeout=POLL)
                    if isinstance(event, BlockpressError):
                        raise event
                    if isinstance(event, Failed):
                        raise event.error
                    left -= isinstance(event, Done)
                    yield event
        finally:
            for request in requests:
                self.engine.cancel(request)

    def log(self, request: Request | None, reply: Reply, seconds: float) -> None:
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
            prompt = None if request is None or self.lm.tokenizer is None else self.lm.decode(request.row.prompt)
            logger.info("prompt: %r answer: %r", prompt, reply.text)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError: the client asks for a model that is not served here."""
        if name not in (None, "", self.name, "default"):
            raise _UnknownModel(f"model is {name!r:.200}, which is not served here", hint=f"give {self.name!r}")


async def _run(threads: ThreadPoolExecutor, make: Callable[[], Made]) -> Made:
    return await asyncio.get_running_loop().run_in_executor(threads, copy_context().run, make)


@final
class Running:
    """Answers that are being written side by side, until they have ended, or this is closed or forgotten.

    Args:
        count: how many. start: begins them, given what takes each one's events from any thread by its number; returns
            what ends them. requests: of each, where there is one, for the log. steps: as in `Service.begin`.
    """

    def __init__(
        self,
        service: Service,
        count: int,
        start: Callable[[Deliver], Callable[[], None]],
        requests: Sequence[Request] = (),
        *,
        steps: bool = False,
    ) -> None:
        self._closed = True  # until something has begun
        if service.stopping:
            raise _Refused(503, "the server stops", "send the request again, or to another one")
        service.check_room(count)
        self._service, self._count, self._requests = service, count, requests
        self._started = time.monotonic()
        self._span = AnswerSpan(service.name, count, requests)
        self._stop: Callable[[], None] = lambda: None
        self._arrived: deque[tuple[int, Event | BlockpressError]] = deque()
        self._there = asyncio.Event()
        self.before_waiting: Callable[[], Awaitable[None]] | None = None
        """Awaited before `events` waits: what its reader has made of those before may leave."""
        self._closed = False
        service.opened(count)
        # Not this object, which ends all when nobody holds it.
        wake, arrived, there = service.waker.wake, self._arrived, self._there

        def deliver(number: int, event: Event | BlockpressError) -> None:
            if isinstance(event, Denoised):
                service.metrics.denoised(event)
                if not steps:
                    return
            arrived.append((number, event))
            wake(there)

        try:
            self._stop = start(deliver)
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all requests as they occur, each with its request's number; then this is closed.

        Raises:
            BlockpressError: what one of them ended with; the others are ended, too.
        """
        try:
            async for each in self._until_done():
                yield each
        except Exception as error:
            self._span.error = error
            raise
        finally:
            self.close()

    async def replies(self, http: HTTPRequest) -> list[Reply]:
        """The whole answers, in order. Raises _ClientGone: the client left; BlockpressError: as `events`."""
        replies: dict[int, Reply] = {}

        async def collect() -> None:
            async for number, event in self.events():
                if isinstance(event, Done):
                    replies[number] = event.reply

        await unless_gone(collect(), http)
        return [replies[number] for number in sorted(replies)]

    async def _until_done(self) -> AsyncIterator[tuple[int, Event]]:
        service, left, silent = self._service, self._count, set(range(self._count))
        while left:
            if not self._arrived and self.before_waiting is not None:
                await self.before_waiting()
            while not self._arrived:
                self._there.clear()
                await self._there.wait()
            number, event = self._arrived.popleft()
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
                self._span.first_text = self._span.first_text or seconds
            if isinstance(event, Done):
                left -= 1
                self._span.replies.append(event.reply)
                service.log(self._requests[number] if self._requests else None, event.reply, seconds)
                if not left:
                    self._span.end()  # before the last byte, after which it is too late
            yield number, event

    def close(self) -> None:
        """Cancel what has not ended. It may be called again."""
        if not self._closed:
            self._closed = True
            self._service.opened(-self._count)
            self._stop()
            self._span.end()

    __del__ = close  # a client may leave before its stream has begun, and then nobody closes it
