"""What a workload is driven on: the engine's core, or the poem beside it, the slow truth, one forward at a time.

Invariant: `rows` says exactly what the last forward worked on, since the floors are counted from it.
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
    """The engine's core. Prefixes are not reused: a prompt that was seen before would cost nothing.

    `prefill`: most tokens of prompts in a forward; None: the engine's own measure.
    """

    def __init__(
        self, network: Network, *, running: int, prefill: int | None = None, soft_embedding: SoftEmbedding = "exact"
    ) -> None:
        own = EngineOptions(max_running=running, reuse_prefixes=False, soft_embedding=soft_embedding)
        options = own if prefill is None else replace(own, chunk=prefill, prefill_tokens=prefill)
        self.core = EngineCore(network, options)
        self.rows, self.prefill = BatchShape(), False

    @property
    def busy(self) -> bool:
        return self.core.busy

    @property
    def page_bytes(self) -> int:
        """Of the pages that requests hold."""
        pages, each = self.core.scheduler.stats.pages, _token_bytes(self.core.network)
        return sum(count.held * self.core.kv_cache.page * each[kind] for kind, count in pages.items())

    def submit(self, request: Request) -> None:
        self.core.submit(request)

    def step(self) -> Sequence[tuple[Request, Event]]:
        done = self.core.step()
        self.rows = rows_of(done.scheduled)
        self.prefill = any(work.start < min(work.stop, len(work.request.row.prompt)) for work in done.scheduled)
        return done.events


def rows_of(works: Sequence[ScheduledRequest]) -> BatchShape:
    """What the engine plans, as the floors count it: a token that is heard goes to the head, others do not."""
    canvases, reads, heard = [], [], []
    for work in works:
        if work.stop - work.num_logit_tokens > work.start:
            reads.append((work.start, work.stop - work.num_logit_tokens - work.start))
        if work.num_logit_tokens:
            heard.append((work.stop - work.num_logit_tokens, work.num_logit_tokens))
        if work.canvas:
            canvases.append(work.stop)
    return BatchShape(canvases=tuple(canvases), reads=tuple(reads), logit_rows=tuple(heard))


class ReferenceStepper:
    """`generate` or `generate_autoregressive` over all requests that are there at the first step, in lockstep.

    Raises:
        RequestError: a request comes later, or the mode is one that the poem has no loop for here.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.rows, self.prefill = network, BatchShape(), False
        self._asked: list[Request] = []
        self._events: Iterator[Event] | None = None

    @property
    def busy(self) -> bool:
        return any(request.row.finish_reason is None for request in self._asked)

    @property
    def page_bytes(self) -> int:
        """Of the contexts, which the poem keeps whole."""
        each = sum(_token_bytes(self.network).values())
        return each * sum(len(one.row.prompt) + _committed(one) for one in self._asked)

    def submit(self, request: Request) -> None:
        if self._events is not None:
            raise RequestError("the poem is under way", hint="give all requests at once: --batch, not --rate")
        self._asked.append(request)

    def step(self) -> Sequence[tuple[Request, Event]]:
        """One step of every canvas, or one token of every request."""
        sampling, rows = self._asked[0].sampling, [request.row for request in self._asked]
        live = [request for request in self._asked if request.row.finish_reason is None]
        token = isinstance(sampling, AutoregressiveSampling)
        self.prefill = self._events is None
        contexts = [(len(one.row.prompt) + _committed(one), len(one.row.new_tokens)) for one in live]
        reads = tuple((behind - fresh, fresh) for behind, fresh in contexts if fresh)
        if self._events is None:
            run: Any = generate_autoregressive if token else generate
            self._events = run(self.network, rows, sampling)
            reads = tuple((0, len(row.prompt)) for row in rows)
            self._active: set[int] = set()
        if token:
            last = tuple((behind + count - 1, 1) for behind, count in reads)
            self.rows = BatchShape(
                logit_rows=last, reads=tuple((behind, count - 1) for behind, count in reads if count > 1)
            )
            return self._whose(self._finish(live))
        begins = not self._active
        self._active = self._active or {one.row.index for one in live}
        canvases = tuple(len(one.row.prompt) + _committed(one) for one in live if one.row.index in self._active)
        self.rows = BatchShape(canvases=canvases, reads=reads if begins else ())
        events: list[Event] = []
        steps = cast(Sampling, sampling).steps
        for event in [next(self._events) for _ in range(len(self._active))]:
            assert isinstance(event, Denoised)
            if event.settled or event.step == steps:
                self._active.discard(event.row)
            events.append(event)
        return self._whose(events if self._active else events + self._finish(live))

    def _whose(self, events: list[Event]) -> list[tuple[Request, Event]]:
        by_row = {request.row.index: request for request in self._asked}
        return [(by_row[event.row], event) for event in events]

    def _finish(self, live: Sequence[Request]) -> list[Event]:
        """The commits of the live rows, and their ends; a row without a tokenizer tells nothing else."""
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
