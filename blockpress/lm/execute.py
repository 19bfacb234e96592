"""Requests of one call, answered: by the engine that the model keeps, or, slowly and plainly, by the reference loop.

    thread 1    for event in ...  --step-->  +-------------+      a forward is of all requests, whoever runs it;
    thread 2    for event in ...   waits     | one core    |      what it tells goes into the inbox of each call
                                             +-------------+
    run_reference   `generate`, `generate_verified` or `generate_autoregressive`, all rows together to the last canvas

There is no thread behind this: whoever waits for an event runs the next forward, for everybody. So a call that nobody
reads does not run ahead, an error is raised where it happened, and pages that hold the beginning of a conversation are
there when it goes on.

Invariant: both give the same events, row by row. The core is touched under the lock alone.
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
    """An engine core for all calls of a model, from any thread."""

    def __init__(self, network: Network, options: EngineOptions) -> None:
        self._core: EngineCore | None = EngineCore(network, options)
        self._lock = threading.Lock()
        self._inboxes: dict[Request, deque[Event]] = {}
        self._left: deque[Request] = deque()
        """Requests whose caller is gone. A deque, for a caller may go while the lock is held: whenever garbage is
        collected, and by the thread that holds it."""

    @property
    def stats(self) -> EngineStats:
        """What the core is doing, and what it has done so far.

        Raises:
            EngineError: it is closed.
        """
        with self._lock:
            return self._open().stats

    def answer(self, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
        """The events of all requests, in the order of time. Leaving the loop early ends them.

        Args:
            cancel: asked before every forward; once it is set, every request still under way ends as "cancelled".

        Raises:
            EngineError: a forward that failed, or that gave no numbers; or the model was closed meanwhile.
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
                self._left.extend(requests)

    def close(self) -> None:
        """Let go of the core with its pages and graphs; calls under way end with an error."""
        with self._lock:
            self._core = None
            self._inboxes.clear()

    def _open(self) -> EngineCore:
        if self._core is None:
            raise EngineError("the model was closed", hint="ask it again, or close it once its answers are there")
        return self._core

    def _step(self, cancelled: Sequence[Request]) -> None:
        """One forward for all, under the lock."""
        core = self._open()
        while self._left:
            core.cancel(gone := self._left.popleft())
            self._inboxes.pop(gone, None)
        for request in cancelled:
            core.cancel(request)
        for request, event in core.step().events:
            ended = isinstance(event, Done | Failed)
            inbox = self._inboxes.pop(request, None) if ended else self._inboxes.get(request)
            if inbox is not None:
                inbox.append(event)


@final
class LazyEngine:
    """The engine of a loaded model: made with the first call, kept for the next ones, until it is closed.

    Pages are of the weights that were read: where these have changed since, there is a new core.
    """

    def __init__(self, network: Network, options: EngineOptions) -> None:
        self._network, self.options = network, options
        self._lock = threading.Lock()
        self._made: tuple[list[tuple[int, int]], SharedCore] | None = None

    def answer(self, network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
        """The events of all requests, as `SharedCore.answer` tells them."""
        assert network is self._network, "an engine is of one network"
        if requests:
            yield from self._core().answer(requests, cancel)

    @property
    def stats(self) -> EngineStats | None:
        """Of the core; None where there is none."""
        made = self._made
        return None if made is None else made[1].stats

    def close(self) -> None:
        """Let go of the core; calls under way end with an error, and the next call makes another one."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            made[1].close()

    def _core(self) -> SharedCore:
        # Where each parameter lies, and how often it was written.
        weights = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in self._network.parameters()]
        with self._lock:
            if self._made is None or self._made[0] != weights:
                self._made = weights, SharedCore(self._network, self.options)
            return self._made[1]


def run_reference(network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
    """The same by the reference loop; the requests must be of one sampling."""
    if not requests:
        return iter(())
    rows, sampling = [request.row for request in requests], requests[0].sampling
    assert all(request.sampling == sampling for request in requests)
    if isinstance(sampling, AutoregressiveSampling):
        return generate_autoregressive(network, rows, sampling, cancel)
    looked_at = sampling.checks > 0 or rows[0].logprobs is not None
    return (generate_verified if looked_at else generate)(network, rows, sampling, cancel)
