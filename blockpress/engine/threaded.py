"""The core on a thread of its own, for callers in an event loop (`stream`) or in a thread (`events`).

    caller --submit, cancel--> inbox --> | worker: empties the inbox between two forwards | --events--> caller

Invariant: only the worker touches the core; whatever happens, every accepted request's caller learns how it ended: by
`Done`, by `Failed`, or by an error raised where its events are awaited.
Run it:  python -m pytest tests/engine/test_threaded.py tests/engine/test_faults.py
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import cast

from blockpress.decoding import Done, Event, Failed
from blockpress.engine.core import EngineCore
from blockpress.engine.request import Request
from blockpress.errors import BlockpressError, EngineError

Deliver = Callable[[Event | BlockpressError], None]
"""Receives a request's events, on the worker's thread; an error is the last thing that it receives."""


class ThreadedEngine:
    """Answers requests as they arrive. A context manager: leaving it cancels the unfinished ones."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._inbox: deque[tuple[Request, Deliver | None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._broken: BlockpressError | None = None
        self._deliveries: dict[Request, Deliver] = {}
        self._worker = threading.Thread(target=self._work, name="blockpress-engine", daemon=True)
        self._worker.start()

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """A request's events, as they occur. Leaving the loop early cancels the request.

        Raises:
            Overloaded: the queue is full. RequestError: it could never be answered. EngineError: the engine is closed.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BlockpressError]()

        def deliver(event: Event | BlockpressError) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the caller's loop has closed, and nothing waits for the events
                self.cancel(request)

        self.submit(request, deliver)
        try:
            while True:
                event = _raise_error(await events.get())
                yield event
                if isinstance(event, Done | Failed):
                    return
        finally:
            self.cancel(request)

    def events(self, request: Request) -> Iterator[Event]:
        """The same for a blocking caller: the request is submitted at once, its events are waited for one by one."""
        events = SimpleQueue[Event | BlockpressError]()
        self.submit(request, events.put)

        def wait() -> Iterator[Event | None]:
            try:
                yield None
                while True:
                    event = _raise_error(events.get())
                    yield event
                    if isinstance(event, Done | Failed):
                        return
            finally:
                self.cancel(request)

        waiting = wait()
        next(waiting)  # started, so that it cancels even if no event is ever requested
        return cast("Iterator[Event]", waiting)

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Submit a request from any thread; its events are delivered, or the error that refuses it."""
        with self._changed:
            if self._broken is not None:
                raise self._broken
            if self._closing:
                raise EngineError("the engine is closed", hint="make a new one")
            self._inbox.append((request, deliver))
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """End a request between two forwards, from any thread; no effect if it has ended already."""
        with self._changed:
            self._inbox.append((request, None))
            self._changed.notify()

    def close(self) -> None:
        """Cancel unfinished requests, and wait until they have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> ThreadedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        """The worker: empty the inbox, run one forward, deliver its events; until the engine is closed."""
        try:
            while self._empty_inbox():
                for request, event in self.core.step().events:
                    self._deliver_event(request, event)
        except Exception as error:
            broken = EngineError(f"the engine broke: {_one_line(error)}", hint="make a new one, and report this line")
            with self._changed:
                self._broken = broken
                self._inbox.extend(self._deliveries.items())
                waiting = {request: deliver for request, deliver in self._inbox if deliver is not None}
            for request, deliver in waiting.items():
                self._deliver(request, deliver, broken)

    def _empty_inbox(self) -> bool:
        """Submit and cancel what is in the inbox, waiting while there is nothing to do; False once closed and idle."""
        with self._changed:
            while not (self._inbox or self._closing or self.core.busy):
                self._changed.wait()
            posted, closing = list(self._inbox), self._closing
            self._inbox.clear()
        for request, deliver in posted:
            if deliver is None:
                self.core.cancel(request)
                continue
            try:
                self.core.submit(request)
                self._deliveries[request] = deliver
            except BlockpressError as error:
                self._deliver(request, deliver, error)
            except Exception as error:  # it concerns this request only, and those after it go on
                refused = EngineError(f"a request was not taken: {_one_line(error)}", hint="submit each request once")
                self._deliver(request, deliver, refused)
        if closing:
            for request in self._deliveries:
                self.core.cancel(request)
        return self.core.busy or not closing

    def _deliver_event(self, request: Request, event: Event) -> None:
        ended = isinstance(event, Done | Failed)
        deliver = self._deliveries.pop(request) if ended else self._deliveries[request]
        self._deliver(request, deliver, event)

    def _deliver(self, request: Request, deliver: Deliver, event: Event | BlockpressError) -> None:
        """Deliver to a caller; if that fails, its request is cancelled, and the others go on."""
        try:
            deliver(event)
        except Exception:
            self.cancel(request)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _raise_error(event: Event | BlockpressError) -> Event:
    if isinstance(event, BlockpressError):
        raise event
    return event
