"""The core on a thread of its own, for callers in an event loop (`stream`) or in a thread (`events`).

    caller --submit, cancel--> inbox --> | worker: empties the inbox between two forwards | --events--> caller

Invariant: only the worker touches the core; whatever happens, every accepted request's caller learns how it ended: by
`Done`, by `Failed`, or by an error raised where its events are awaited. What one caller hands in, raises or does
concerns its own requests only.
Run it:  python -m pytest tests/engine/test_threaded.py tests/engine/test_faults.py
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple, cast
from weakref import WeakSet

from blockpress.config.checks import value_text
from blockpress.decoding import Done, Event, Failed
from blockpress.engine.core import EngineCore
from blockpress.engine.request import Request, check_request
from blockpress.errors import BlockpressError, EngineError, RequestError, one_line
from blockpress.ops.computing import PATIENCE

Deliver = Callable[[Event | BlockpressError], None]
"""Receives a request's events, on the worker's thread; an error is the last thing that it receives. All requests wait
for it meanwhile; if it raises, whatever that is, its request is cancelled."""

LAST_EVENTS = 0.2
"""Seconds at the end of the process for readers of answers that were cut."""

logger = logging.getLogger(__name__)


class _Posted(NamedTuple):
    """A request to submit, or to cancel. Without `deliver` it is cancelled whoever submitted it."""

    request: Request
    deliver: Deliver | None
    cancels: bool = False


class ThreadedEngine:
    """Answers requests as they arrive. A context manager: leaving it cancels the unfinished ones.

    It belongs to the process that made it: in a forked child, which has no worker, its calls raise an `EngineError`,
    and `cancel` and `close` do nothing. It is closed when the process ends.

    Raises:
        EngineError: another engine, which is not closed, runs this core.
    """

    def __init__(self, core: EngineCore) -> None:
        if core.__dict__.setdefault("driver", self) is not self:
            raise EngineError("another engine runs this core", hint="close that one first, or make another core")
        self.core = core
        self._inbox: deque[_Posted] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._broken: BaseException | None = None
        self._deliveries: dict[Request, Deliver] = {}
        self._process = os.getpid()
        self._worker = threading.Thread(target=self._work, name="blockpress-engine", daemon=True)
        self._worker.start()
        _engines.add(self)

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
                self._cancel(request, deliver)

        self._check_waiting()
        self.submit(request, deliver)
        try:
            while True:
                self._check_process()
                event = _raise_error(await events.get())
                yield event
                if isinstance(event, Done | Failed):
                    return
        finally:
            self._cancel(request, deliver)

    def events(self, request: Request) -> Iterator[Event]:
        """The same for a blocking caller: the request is submitted at once, its events are waited for one by one."""
        events = SimpleQueue[Event | BlockpressError]()
        deliver = events.put
        self._check_waiting()
        self.submit(request, deliver)

        def wait() -> Iterator[Event | None]:
            try:
                yield None
                while True:
                    self._check_process()
                    event = _raise_error(events.get())
                    yield event
                    if isinstance(event, Done | Failed):
                        return
            finally:
                self._cancel(request, deliver)

        waiting = wait()
        next(waiting)  # started, so that it cancels even if no event is ever requested
        return cast("Iterator[Event]", waiting)

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Submit a request from any thread; its events are delivered, or the error that refuses it.

        Raises:
            RequestError: the request is none, or `deliver` cannot be called. EngineError: the engine is closed.
        """
        self._check_process()
        check_request(request)
        if not callable(deliver):
            raise RequestError(f"deliver is {value_text(deliver)}", hint="give a function that takes an event")
        with self._changed:
            if self._broken is not None:
                raise _broken_by(self._broken)
            if self._closing:
                raise EngineError("the engine is closed", hint="make a new one")
            self._inbox.append(_Posted(request, deliver))
            self._changed.notify()

    @property
    def broken(self) -> bool:
        """Whether the worker has ended by an error that is not a request's: it answers nobody any more."""
        return self._broken is not None

    def cancel(self, request: Request) -> None:
        """End a request between two forwards, from any thread; no effect if it has ended already."""
        check_request(request)
        self._cancel(request, None)

    def _cancel(self, request: Request, deliver: Deliver | None) -> None:
        """The same for what was submitted with `deliver`: others may have submitted the same request."""
        if self._process == os.getpid():
            with self._changed:
                self._inbox.append(_Posted(request, deliver, cancels=True))
                self._changed.notify()

    def close(self) -> None:
        """Cancel unfinished requests, and wait until they have ended."""
        self._close(None)

    def _close(self, patience: float | None) -> None:
        if self._process != os.getpid():
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join(patience)

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise EngineError(
                f"the engine was made in process {self._process}, and this is a fork of it, process {os.getpid()}",
                hint="make an engine in the process that uses it: a fork copies no threads",
            )

    def _check_waiting(self) -> None:
        self._check_process()
        if threading.current_thread() is self._worker:
            raise EngineError(
                "a callback or a rule waits for events on the engine's own thread, which is to make them",
                hint="wait in another thread, or use submit with a callback",
            )

    def __reduce__(self) -> tuple[object, ...]:
        raise EngineError(
            "an engine runs on a thread of its process, and can be neither copied nor pickled",
            hint="copy the network, and make an engine of it where it shall run",
        )

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
        except BaseException as error:
            with self._changed:
                self._broken = error
                waiting = [(posted.request, posted.deliver) for posted in self._inbox if not posted.cancels]
                self._inbox.clear()
            for request, deliver in (*self._deliveries.items(), *waiting):
                self._deliver(request, deliver, _broken_by(error))
        finally:
            self.core.__dict__.pop("driver", None)

    def _empty_inbox(self) -> bool:
        """Submit and cancel what is in the inbox, waiting while there is nothing to do; False once closed and idle."""
        with self._changed:
            while not (self._inbox or self._closing or self.core.busy):
                self._changed.wait()
            closing = self._closing  # nothing is submitted from then on
        while self._inbox:
            posted = self._inbox.popleft()
            if not posted.cancels:
                self._submit(posted)
            elif posted.deliver is None or self._deliveries.get(posted.request) is posted.deliver:
                self.core.cancel(posted.request)
        if closing:
            for request in self._deliveries:
                self.core.cancel(request)
        return self.core.busy or not closing

    def _submit(self, posted: _Posted) -> None:
        try:
            self.core.submit(posted.request)
        except BlockpressError as error:
            self._deliver(posted.request, posted.deliver, error)
        except BaseException as error:  # it concerns this request only, and those after it go on
            refused = EngineError(f"the request was not taken: {one_line(error)}", hint="it must be as `Request` says")
            refused.__cause__ = error
            self._deliver(posted.request, posted.deliver, refused)
        else:
            assert posted.deliver is not None
            self._deliveries[posted.request] = posted.deliver

    def _deliver_event(self, request: Request, event: Event) -> None:
        ended = isinstance(event, Done | Failed)
        deliver = self._deliveries.pop(request) if ended else self._deliveries[request]
        self._deliver(request, deliver, event)

    def _deliver(self, request: Request, deliver: Deliver | None, event: Event | BlockpressError) -> None:
        """Deliver to a caller; if that fails, its request is cancelled, and the others go on."""
        assert deliver is not None
        try:
            deliver(event)
        except BaseException as error:
            self._cancel(request, deliver)
            with suppress(BaseException):  # a program's own handlers of the log, which may raise as well
                logger.warning("a callback failed, and its request is cancelled: %s", one_line(error))


_engines = WeakSet[ThreadedEngine]()


def _close_all() -> None:
    """At the end of the process: Python would end a thread inside of C++, which aborts."""
    answering = any(engine.core.busy for engine in list(_engines))
    for engine in list(_engines):
        engine._close(PATIENCE)
    if answering:  # daemon threads that read take their last events, whose tensors are freed in C++
        time.sleep(LAST_EVENTS)


atexit.register(_close_all)


def _broken_by(error: BaseException) -> EngineError:
    """What every caller is told, each by an error of its own."""
    broken = EngineError(f"the engine broke: {one_line(error)}", hint="make a new one, and report this line")
    broken.__cause__ = error
    return broken


def _raise_error(event: Event | BlockpressError) -> Event:
    if isinstance(event, BlockpressError):
        raise event
    return event
