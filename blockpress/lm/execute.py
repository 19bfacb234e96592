"""Runs the requests of one call: in the engine that the model keeps, or, slow and plain, in the reference loop.

    thread 1    for event in ...  --step-->  +-------------+      a forward is for all requests, whichever thread runs
    thread 2    for event in ...   waits     | one core    |      it; its events go into the inbox of each call
                                             +-------------+
    run_reference   `generate`, `generate_verified` or `generate_autoregressive`, all rows together to the last canvas

There is no background thread: the caller that waits for an event runs the next forward, for all calls. So a call whose
events are not read does not run ahead, an error is raised where it happened, and the pages of a conversation are still
cached when it continues. An interrupt (Ctrl-C) ends the call in whose thread it comes; the next caller runs the forward
again.

Invariant: both give the same events, row by row. The core is touched only under the lock, by the process that made it.
Run it:  python -m pytest tests/lm/test_model.py tests/lm
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from blockpress.config import AutoregressiveSampling
from blockpress.decoding import Cancel, Done, Event, Failed
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import generate
from blockpress.decoding.verified import generate_verified
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.engine.core import EngineStats
from blockpress.errors import BlockpressError, EngineError, RequestError, one_line
from blockpress.model import Network
from blockpress.ops.computing import computed, computing, ending

Answer = Callable[[Network, Sequence[Request], Cancel | None], Iterator[Event]]


@final
class SharedCore:
    """One engine core, shared by all calls of a model from any thread."""

    def __init__(self, network: Network, options: EngineOptions) -> None:
        self._core: EngineCore | None = EngineCore(network, options)
        self._lock, self._holder, self._process = threading.Lock(), 0, os.getpid()
        self._inboxes: dict[Request, deque[Event]] = {}
        self.broken: Exception | None = None
        """What broke the core."""
        self._abandoned: deque[tuple[Request, deque[Event]]] = deque()
        """Requests abandoned by their callers, with their inboxes. A deque, since garbage collection may end a caller's
        generator while the lock is held, even by the thread that holds it."""

    @property
    def stats(self) -> EngineStats:
        """The core's current state and counts so far.

        Raises:
            EngineError: it is closed.
        """
        with self._entered():
            return self._open().stats

    def answer(self, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
        """The events of all requests, in chronological order. Leaving the loop early cancels the requests.

        Args:
            cancel: checked before every forward; once it is set, every unfinished request ends as "cancelled".

        Raises:
            EngineError: a forward failed or gave NaN or infinity; or the model was closed meanwhile; or it is called
                from inside of a forward, or in a fork of the process that began the answer.
        """
        inbox, running = deque[Event](), len(requests)
        try:
            with self._entered():
                for request in requests:
                    self._open().submit(request)
                    self._inboxes[request] = inbox
            while running:
                cancelled = requests if cancel is not None and cancel.is_set() else ()
                with computing(), self._entered():
                    if not (inbox or ending()):
                        self._step(cancelled)
                while inbox:
                    event = inbox.popleft()
                    if isinstance(event, Failed):
                        raise _own_error(event.error)
                    running -= isinstance(event, Done)
                    yield event
        finally:
            if running:
                self._abandoned.extend((request, inbox) for request in requests)

    def close(self) -> None:
        """Drop the core with its pages and graphs; unfinished calls end with an error. In a fork it does nothing."""
        if self._process == os.getpid():
            with self._entered():
                self._core = None
                self._inboxes.clear()

    @contextmanager
    def _entered(self) -> Generator[None]:
        """Holds the lock."""
        if self._process != os.getpid():
            raise EngineError(
                f"the answer was begun in process {self._process}, and this is a fork of it, process {os.getpid()}",
                hint="ask in the process that is to have the answer",
            )
        if self._holder == threading.get_ident():
            raise EngineError(
                "the model was called from inside of its own forward",
                hint="a rule, or what decodes an answer, must not ask the model that runs it",
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0

    def _open(self) -> EngineCore:
        if self.broken is not None:
            raise _broken_by(self.broken)
        if self._core is None:
            raise EngineError("the model was closed", hint="ask it again, or close it once its answers are there")
        return self._core

    def _step(self, cancelled: Sequence[Request]) -> None:
        """One forward for all calls; the caller holds the lock."""
        core = self._open()
        while self._abandoned:
            request, inbox = self._abandoned.popleft()
            if self._inboxes.get(request) is inbox:  # another call may have it, and this one was refused
                core.cancel(request)
                del self._inboxes[request]
        for request in cancelled:
            core.cancel(request)
        try:
            events = core.step().events
        except Exception as error:
            self.broken = error
            raise _broken_by(error) from error
        for request, event in events:
            ended = isinstance(event, Done | Failed)
            waiting = self._inboxes.pop(request, None) if ended else self._inboxes.get(request)
            if waiting is not None:
                waiting.append(event)


def _broken_by(error: Exception) -> EngineError:
    """What every caller is told, each by an error of its own."""
    broken = EngineError(f"the engine broke: {one_line(error)}", hint="ask again, and report this line")
    broken.__cause__ = error
    return broken


def _own_error(error: BlockpressError) -> BaseException:
    """What the caller of a failed request gets: what his own rule raised, if that is to end more than the call."""
    cause = error.__cause__
    return cause if isinstance(cause, KeyboardInterrupt | SystemExit) else error


@final
class LazyEngine:
    """The engine of a loaded model: created by the first call and kept for later ones, until it is closed.

    Cached pages depend on the weights: if these have changed since, a new core is created. So it is if the old one
    broke, and in a fork of the process, which has no part in its parent's answers.
    """

    def __init__(self, network: Network, options: EngineOptions) -> None:
        self._network, self.options = network, options
        self._locks: dict[int, threading.Lock] = {}
        self._current: tuple[list[Any], SharedCore] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        # A copy of a model, in another process or in this one, answers from pages of its own.
        return LazyEngine, (self._network, self.options)

    def answer(self, network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
        """The events of all requests, as `SharedCore.answer` gives them."""
        assert network is self._network, "an engine belongs to one network"
        if requests:
            yield from self._core().answer(requests, cancel)

    @property
    def stats(self) -> EngineStats | None:
        """The core's; None if there is no core."""
        current = self._current
        return None if current is None or current[0][0] != os.getpid() else current[1].stats

    def close(self) -> None:
        """Drop the core; unfinished calls end with an error, and the next call creates another one."""
        with self._lock():
            current, self._current = self._current, None
        if current is not None:
            current[1].close()

    def _core(self) -> SharedCore:
        # Identifies the process and the weights: each parameter's address, and how often it was written.
        weights = ((x.data_ptr(), 0 if x.is_inference() else x._version) for x in self._network.parameters())
        identity = [os.getpid(), *weights]
        with self._lock():
            if self._current is None or self._current[0] != identity or self._current[1].broken is not None:
                self._current = identity, SharedCore(self._network, self.options)
            return self._current[1]

    def _lock(self) -> threading.Lock:
        """One for each process: a fork may be made while another thread holds its parent's."""
        return self._locks.setdefault(os.getpid(), threading.Lock())


def run_reference(network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
    """The events of all requests, by the reference loop; the requests must share one sampling.

    Raises:
        RequestError: a request, or another with its row, was handed in before.
    """
    if not requests:
        return iter(())
    if not all(request.row.claim() for request in requests):
        raise RequestError("a request was not taken: it was handed in before", hint="make a request per answer")
    rows, sampling = [request.row for request in requests], requests[0].sampling
    assert all(request.sampling == sampling for request in requests)
    if isinstance(sampling, AutoregressiveSampling):
        return computed(generate_autoregressive(network, rows, sampling, cancel))
    verified = sampling.reads_drafts or rows[0].logprobs is not None
    return computed((generate_verified if verified else generate)(network, rows, sampling, cancel))
