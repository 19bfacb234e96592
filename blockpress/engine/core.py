"""The engine's heart: requests go in, and each `step` is one forward for all of them.

    step:   plan     who takes part, with which tokens          scheduler, without tensors
            run      one forward, waited for once               runner
            advance  what came of it, for each way to decode    modes
            book     pages, contexts, ends                      here and in the scheduler

Synchronous, single-threaded and deterministic; `threaded.py` puts it on a thread of its own.

Invariant: a request's events are a function of (weights, prompt, seed, sampling), never of what runs beside it; an
error in one request is an event of that request, and every other one goes on.
Run it:  python -m pytest tests/engine/test_same_tokens.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpress.decoding import Event, Failed
from blockpress.engine.kv_cache import KVCache
from blockpress.engine.modes import RequestProgress, strategies, strategy_of
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request
from blockpress.engine.runner import Runner, RunnerOutput, SampledTokens
from blockpress.engine.scheduler import ScheduledRequest, Scheduler, SchedulerStats
from blockpress.engine.sizing import page_length, plan_pages
from blockpress.errors import BlockpressError, EngineError
from blockpress.hardware import free_memory
from blockpress.model import Network


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """An engine's figures.

    scheduler: requests and pages. forwards: run so far. failures: requests that ended with an error of their own.
    page_bytes: what all pages take once they have been used. captures, replays: graphs of a GPU, made and run; eager:
    why none is made, None where they are.
    """

    scheduler: SchedulerStats
    forwards: int
    failures: int
    page_bytes: int
    captures: int
    replays: int
    eager: str | None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one `step` did. works: the parts of its forward, in order of arrival; none where nothing ran. events: what
    each request is told, in the same order."""

    scheduled: Sequence[ScheduledRequest]
    events: Sequence[tuple[Request, Event]]


class EngineCore:
    """Answers many requests at once over one network."""

    def __init__(self, network: Network, options: EngineOptions | None = None) -> None:
        options = EngineOptions() if options is None else options
        self.network, self.options = network, options
        config, dtype = network.config, str(network.dtype).removeprefix("torch.")
        memory = _free(network.device) // 2 if options.memory is None else options.memory
        counts = plan_pages(config, dtype, options, memory)
        self.scheduler = Scheduler(config, options, counts)
        self.kv_cache = KVCache(config, counts, page_length(config), network.dtype, network.device)
        self.runner = Runner(network, options, self.kv_cache, self._sample)
        self._cancelled: list[Request] = []
        self._forwards = self._failures = 0
        self._strategies = strategies(network)

    def submit(self, request: Request) -> None:
        """Take a request into the queue.

        Raises:
            Overloaded: the queue is full. RequestError: a request that could never be answered.
        """
        request.image_spans = tuple(
            HashedImageSpan(start, len(features), _digest(features))
            for start, features in sorted(request.row.images.items())
        )
        self.scheduler.submit(request)

    def cancel(self, request: Request) -> None:
        """End a request before the next forward; one that has ended is left as it is."""
        if request.state not in ("new", "ended"):
            self._cancelled.append(request)

    @property
    def stats(self) -> EngineStats:
        """What the engine is doing, and what it has done so far."""
        captured = self.runner.captured
        return EngineStats(
            scheduler=self.scheduler.stats,
            forwards=self._forwards,
            failures=self._failures,
            page_bytes=self.kv_cache.nbytes,
            captures=0 if captured is None else captured.captures,
            replays=0 if captured is None else captured.replays,
            eager=self.runner.eager,
        )

    @property
    def busy(self) -> bool:
        """Whether there is something left to do."""
        return bool(self._cancelled or self.scheduler.running or self.scheduler.waiting)

    @property
    def num_tracked(self) -> int:
        """Of how many requests something is kept for their next forward, beside pages and slots: of none once idle."""
        return sum(strategy.num_tracked for strategy in self._strategies.values())

    def step(self) -> StepRecord:
        """One forward, and what came of it."""
        cancelled, self._cancelled = self._cancelled, []
        events = [(request, event) for request in cancelled for event in self._cancel(request)]
        works = self.scheduler.schedule()
        self._forwards += bool(works)
        with self.runner.placed():
            events += self._answered(works)
        return StepRecord(scheduled=works, events=events)

    @torch.inference_mode()
    def _answered(self, works: Sequence[ScheduledRequest]) -> list[tuple[Request, Event]]:
        outcomes = self._run(works)
        found: dict[Request, RequestProgress | Exception] = {}
        for kind, strategy in self._strategies.items():
            own = [
                one for one in outcomes if isinstance(one, RunnerOutput) and strategy_of(one.scheduled.request) == kind
            ]
            sound = [one for one in own if one.is_finite]
            made = strategy.advance(sound)
            found |= {one.scheduled.request: progress for one, progress in zip(sound, made, strict=True)}
            found |= {one.scheduled.request: _no_number() for one in own if not one.is_finite}
        events: list[tuple[Request, Event]] = []
        for outcome in outcomes:
            if isinstance(outcome, RunnerOutput):
                request, told = outcome.scheduled.request, self._apply(outcome, found[outcome.scheduled.request])
            else:
                request, told = outcome[0].request, self._fail(outcome[0].request, outcome[1])
            events += [(request, event) for event in told]
        return events

    def _sample(self, works: Sequence[ScheduledRequest], heard: Mapping[Request, Tensor]) -> SampledTokens:
        """What the strategies ask of the states that a forward has heard, before anybody waits for it."""
        asked: dict[Request, Tensor | Exception] = {}
        for kind, strategy in self._strategies.items():
            asked |= strategy.sample([work for work in works if strategy_of(work.request) == kind], heard)
        return asked

    def _apply(self, outcome: RunnerOutput, progress: RequestProgress | Exception) -> Sequence[Event]:
        """What a request's part of a forward makes of its pages and its context, or its end."""
        request, work = outcome.scheduled.request, outcome.scheduled
        if isinstance(progress, Exception):
            return self._fail(request, progress)
        if outcome.denoised is not None:
            request.step = outcome.denoised.step
        if progress.num_verified is None:
            self.scheduler.mark_computed(work)
        else:
            self.scheduler.accept_draft(work, progress.num_verified)
        if progress.next_tokens is not None:
            if request.row.finish_reason is None:
                self.scheduler.commit(request, progress.next_tokens, draft=progress.is_draft)
            else:
                self.scheduler.end(request)
                self._forget(request)
        return progress.events

    def _run(self, works: Sequence[ScheduledRequest]) -> Sequence[RunnerOutput | tuple[ScheduledRequest, Exception]]:
        """The forward; where it fails, request by request, so that the one at fault is found."""
        if not works:
            return []
        try:
            return self.runner.run(works)
        except Exception as error:
            failed = error.with_traceback(None)  # whose frames hold all that the forward had allocated
        moved_on = self.runner.stepped
        if len(works) == 1:
            return [(works[0], failed)]
        again = [work for work in works if not (moved_on and work.canvas)]
        return [
            *((work, failed) for work in works if moved_on and work.canvas),
            *(one for work in again for one in self._run([work])),
        ]

    def _cancel(self, request: Request) -> Iterable[Event]:
        if request.state == "ended":
            return []
        self.scheduler.cancel(request)
        self._forget(request)
        try:
            return [*request.row.cancel()]
        except Exception as error:
            return self._fail(request, error)

    def _forget(self, request: Request) -> None:
        self._strategies[strategy_of(request)].forget(request)

    def _fail(self, request: Request, error: Exception) -> list[Event]:
        """End one request with an error of its own; what it has in pages is not trusted."""
        self._failures += 1
        self.scheduler.end(request, discard=True)
        self._forget(request)
        if not isinstance(error, BlockpressError):
            said = " ".join(f"{type(error).__name__}: {error}".split())
            error = EngineError(
                f"the request could not be finished: {said}",
                hint="ask again; if that does not help, restart the engine",
            )
        return [Failed(request.row.index, error)]


def _free(device: torch.device) -> int:
    """Bytes that are free on a device; of a GPU also those that torch keeps of what was freed."""
    if device.type != "cuda":
        return free_memory()["cpu"]  # of another kind of device nothing is known: its memory may well be this one
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory()[f"cuda:{device.index or 0}"] + kept


def _digest(features: Tensor) -> bytes:
    """What a picture's features are known by: pages that show others are others."""
    return hashlib.sha256(features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _no_number() -> EngineError:
    return EngineError(
        "the network's output holds NaN or infinity",
        hint="its weights may be damaged, or the type too narrow for them: load it in bfloat16 or float32",
    )
