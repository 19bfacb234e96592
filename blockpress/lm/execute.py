"""Runs the requests of one call: in the engine that the model keeps, or, slow and plain, in the reference loop.

    thread 1    for event in ...  --step-->  +-------------+      a forward is for all requests, whichever thread runs
    thread 2    for event in ...   waits     | one core    |      it; its events go into the inbox of each call
                                             +-------------+
    run_reference   `generate`, `generate_verified` or `generate_autoregressive`, all rows together to the last canvas

There is no background thread: the caller that waits for an event runs the next forward, for all calls. So a call whose
events are not read does not run ahead, an error is raised where it happened, and the pages of a conversation are still
cached when it continues.

Invariant: both give the same events, row by row. The core is touched only under the lock.
Run it:  python -m pytest tests/lm/test_model.py tests/lm
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import final

from blockpress.config import AutoregressiveSampling
from blockpress.decoding import Cancel, Done, Event, Failed
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import generate
from blockpress.decoding.verified import generate_verified
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.engine.core import EngineStats
from blockpress.errors import EngineError
from blockpress.model import Network

Answer = Callable[[Network, Sequence[Request], Cancel | None], Iterator[Event]]


@final
class SharedCore:
    """One engine core, shared by all calls of a model from any thread."""

    def __init__(self, network: Network, options: EngineOptions) -> None:
        self._core: EngineCore | None = EngineCore(network, options)
        self._lock = threading.Lock()
        self._inboxes: dict[Request, deque[Event]] = {}
        self._abandoned: deque[Request] = deque()
        """Requests abandoned by their callers. A deque, since garbage collection may end a caller's generator while the
        lock is held, even by the thread that holds it."""

    @property
    def stats(self) -> EngineStats:
        """The core's current state and counts so far.

        Raises:
            EngineError: it is closed.
        """
        with self._lock:
            return self._open().stats

    def answer(self, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
        """The events of all requests, in chronological order. Leaving the loop early cancels the requests.

        Args:
            cancel: checked before every forward; once it is set, every unfinished request ends as "cancelled".

        Raises:
            EngineError: a forward failed or gave NaN or infinity; or the model was closed meanwhile.
        """
        inbox, running = deque[Event](), len(requests)
        try:
            with self._lock:
                for request in requests:
                    self._open().submit(request)
                    self._inboxes[request] = inbox
            while running:
                with self._lock:
                    if not inbox:
                        self._step(requests if cancel is not None and cancel.is_set() else ())
                while inbox:
                    event = inbox.popleft()
                    if isinstance(event, Failed):
                        raise event.error
                    running -= isinstance(event, Done)
                    yield event
        finally:
            if running:
                self._abandoned.extend(requests)

    def close(self) -> None:
        """Drop the core with its pages and graphs; unfinished calls end with an error."""
        with self._lock:
            self._core = None
            self._inboxes.clear()

    def _open(self) -> EngineCore:
        if self._core is None:
            raise EngineError("the model was closed", hint="ask it again, or close it once its answers are there")
        return self._core

    def _step(self, cancelled: Sequence[Request]) -> None:
        """One forward for all calls; the caller holds the lock."""
        core = self._open()
        while self._abandoned:
            core.cancel(request := self._abandoned.popleft())
            self._inboxes.pop(request, None)
        for request in cancelled:
            core.cancel(request)
        for request, event in core.step().events:
            ended = isinstance(event, Done | Failed)
            inbox = self._inboxes.pop(request, None) if ended else self._inboxes.get(request)
            if inbox is not None:
                inbox.append(event)


@final
class LazyEngine:
    """The engine of a loaded model: created by the first call and kept for later ones, until it is closed.

    Cached pages depend on the weights: if these have changed since, a new core is created.
    """

    def __init__(self, network: Network, options: EngineOptions) -> None:
        self._network, self.options = network, options
        self._lock = threading.Lock()
        self._current: tuple[list[tuple[int, int]], SharedCore] | None = None

    def answer(self, network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
        """The events of all requests, as `SharedCore.answer` gives them."""
        assert network is self._network, "an engine belongs to one network"
        if requests:
            yield from self._core().answer(requests, cancel)

    @property
    def stats(self) -> EngineStats | None:
        """The core's; None if there is no core."""
        current = self._current
        return None if current is None else current[1].stats

    def close(self) -> None:
        """Drop the core; unfinished calls end with an error, and the next call creates another one."""
        with self._lock:
            current, self._current = self._current, None
        if current is not None:
            current[1].close()

    def _core(self) -> SharedCore:
        # Identifies the weights: each parameter's address, and how often it was written.
        weights = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in self._network.parameters()]
        with self._lock:
            if self._current is None or self._current[0] != weights:
                self._current = weights, SharedCore(self._network, self.options)
            return self._current[1]


def run_reference(network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
    """The events of all requests, by the reference loop; the requests must share one sampling."""
    if not requests:
        return iter(())
    rows, sampling = [request.row for request in requests], requests[0].sampling
    assert all(request.sampling == sampling for request in requests)
    if isinstance(sampling, AutoregressiveSampling):
        return generate_autoregressive(network, rows, sampling, cancel)
    verified = sampling.max_verifications > 0 or rows[0].logprobs is not None
    return (generate_verified if verified else generate)(network, rows, sampling, cancel)
