"""What a workload runs on, one forward at a time: the engine's core, or the reference loop to compare it with.

Invariant: `rows` is exactly the batch of the last forward, since the roofline is computed from it.
Run it:  python -m pytest tests/bench/test_drive.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from blockpress.config import AutoregressiveSampling, LayerKind, Sampling
from blockpress.costs import BatchShape, context_bytes
from blockpress.decoding import Committed, Denoised, Done, Event
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import generate
from blockpress.engine import EngineOptions, Request
from blockpress.engine.core import EngineCore
from blockpress.engine.options import SoftEmbedding
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.errors import RequestError
from blockpress.model import Network


class EngineStepper:
    """The engine's core. Prefixes are not reused: a repeated prompt would cost nothing.

    `prefill`: most prompt tokens in a forward; None: the engine's default.
    """

    def __init__(
        self, network: Network, *, running: int, prefill: int | None = None, soft_embedding: SoftEmbedding = "exact"
    ) -> None:
        defaults = EngineOptions(max_running=running, reuse_prefixes=False, soft_embedding=soft_embedding)
        options = defaults if prefill is None else replace(defaults, chunk=prefill, prefill_tokens=prefill)
        self.core = EngineCore(network, options)
        self.rows, self.prefill = BatchShape(), False

    @property
    def busy(self) -> bool:
        return self.core.busy

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages that requests hold."""
        pages, token_bytes = self.core.scheduler.stats.pages, _token_bytes(self.core.network)
        return sum(count.held * self.core.kv_cache.page * token_bytes[kind] for kind, count in pages.items())

    def submit(self, request: Request) -> None:
        self.core.submit(request)

    def step(self) -> Sequence[tuple[Request, Event]]:
        record = self.core.step()
        self.rows = rows_of(record.scheduled)
        self.prefill = any(work.start < min(work.stop, len(work.request.row.prompt)) for work in record.scheduled)
        return record.events


def rows_of(scheduled: Sequence[ScheduledRequest]) -> BatchShape:
    """The engine's schedule as a batch shape: only logit rows go through the head."""
    canvases, reads, logit_rows = [], [], []
    for entry in scheduled:
        if entry.stop - entry.num_logit_tokens > entry.start:
            reads.append((entry.start, entry.stop - entry.num_logit_tokens - entry.start))
        if entry.num_logit_tokens:
            logit_rows.append((entry.stop - entry.num_logit_tokens, entry.num_logit_tokens))
        if entry.canvas:
            canvases.append(entry.stop)
    goes_on = not canvases or any(entry.canvas and not entry.last_step for entry in scheduled)
    return BatchShape(canvases=tuple(canvases), prefills=tuple(reads), logit_rows=tuple(logit_rows), goes_on=goes_on)


class ReferenceStepper:
    """`generate` or `generate_autoregressive` over all requests submitted before the first step, in lockstep.

    Raises:
        RequestError: a request comes later, or the reference loop has no such mode here.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.rows, self.prefill = network, BatchShape(), False
        self._requests: list[Request] = []
        self._events: Iterator[Event] | None = None

    @property
    def busy(self) -> bool:
        return any(request.row.finish_reason is None for request in self._requests)

    @property
    def page_bytes(self) -> int:
        """Bytes of the contexts, which the reference loop keeps whole."""
        token_bytes = sum(_token_bytes(self.network).values())
        return token_bytes * sum(len(request.row.prompt) + _committed(request) for request in self._requests)

    def submit(self, request: Request) -> None:
        if self._events is not None:
            raise RequestError("the reference loop is running", hint="give all requests at once: --batch, not --rate")
        self._requests.append(request)

    def step(self) -> Sequence[tuple[Request, Event]]:
        """One step of every canvas, or one token of every request."""
        sampling, rows = self._requests[0].sampling, [request.row for request in self._requests]
        live = [request for request in self._requests if request.row.finish_reason is None]
        token = isinstance(sampling, AutoregressiveSampling)
        self.prefill = self._events is None
        contexts = [(len(request.row.prompt) + _committed(request), len(request.row.new_tokens)) for request in live]
        reads = tuple((length - new, new) for length, new in contexts if new)
        if self._events is None:
            run: Any = generate_autoregressive if token else generate
            self._events = run(self.network, rows, sampling)
            reads = tuple((0, len(row.prompt)) for row in rows)
            self._active: set[int] = set()
        if token:
            last = tuple((context + count - 1, 1) for context, count in reads)
            self.rows = BatchShape(
                logit_rows=last, prefills=tuple((context, count - 1) for context, count in reads if count > 1)
            )
            return self._with_requests(self._finish(live))
        first_step = not self._active
        self._active = self._active or {request.row.index for request in live}
        denoised = [request for request in live if request.row.index in self._active]
        canvases = tuple(len(request.row.prompt) + _committed(request) for request in denoised)
        self.rows = BatchShape(canvases=canvases, prefills=reads if first_step else ())
        events: list[Event] = []
        steps = cast(Sampling, sampling).steps
        for event in [next(self._events) for _ in range(len(self._active))]:
            assert isinstance(event, Denoised)
            if event.settled or event.step == steps:
                self._active.discard(event.row)
            events.append(event)
        return self._with_requests(events if self._active else events + self._finish(live))

    def _with_requests(self, events: list[Event]) -> list[tuple[Request, Event]]:
        by_row = {request.row.index: request for request in self._requests}
        return [(by_row[event.row], event) for event in events]

    def _finish(self, live: Sequence[Request]) -> list[Event]:
        """The commits of the live rows, and their ends; a row without a tokenizer has no other events."""
        assert self._events is not None
        events: list[Event] = []
        for request in live:
            events.append(next(self._events))
            assert isinstance(events[-1], Committed)
            if request.row.finish_reason is not None:
                events.append(next(self._events))
                assert isinstance(events[-1], Done)
        return events


def _committed(request: Request) -> int:
    return sum(len(canvas.tokens) for canvas in request.row.canvases)


def _token_bytes(network: Network) -> Mapping[LayerKind, int]:
    """Keys and values of one token, by kind of layer."""
    return context_bytes(network.config, str(network.dtype).removeprefix("torch."))
