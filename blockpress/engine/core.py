"""The core of the engine: requests are submitted, and each `step` is one forward for all of them.

    step:   schedule   which requests take part, with which tokens       scheduler, without tensors
            run        one forward, waited for once                      runner
            advance    how each request continues, by decoding mode      modes
            update     pages, contexts, ended requests                   here and in the scheduler

Synchronous, single-threaded and deterministic; `threaded.py` runs it on a thread of its own.

Invariant: a request's events are a function of (weights, prompt, seed, sampling), never of what runs next to it; an
error in one request is an event of that request, and all others go on.
Run it:  python -m pytest tests/engine/test_same_tokens.py
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpress.decoding import Event, Failed
from blockpress.engine.denoising import _RuleStopped
from blockpress.engine.kv_cache import KVCache
from blockpress.engine.modes import RequestProgress, is_interrupt, strategies, strategy_of
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request, check_request
from blockpress.engine.runner import Runner, RunnerOutput, SampledTokens
from blockpress.engine.scheduler import ScheduledRequest, Scheduler, SchedulerStats
from blockpress.engine.sizing import check_slots, page_length, plan_pages
from blockpress.errors import BlockpressError, EngineError, RequestError, one_line
from blockpress.hardware import free_memory
from blockpress.model import Network
from blockpress.ops.computing import computing


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Statistics of an engine.

    scheduler: requests and pages. forwards: run so far. failures: requests that ended with an error of their own.
    page_bytes: bytes of all pages once they have been used. captures, replays: CUDA graphs captured and run; eager: why
    none are captured, None if they are.
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
    """What one `step` did. scheduled: the requests' parts of its forward, in order of arrival; empty if nothing ran.
    events: each request's events, in the same order."""

    scheduled: Sequence[ScheduledRequest]
    events: Sequence[tuple[Request, Event]]


class EngineCore:
    """Answers many requests at once over one network."""

    @computing()
    def __init__(self, network: Network, options: EngineOptions | None = None) -> None:
        options = EngineOptions() if options is None else options
        self.network, self.options = network, options
        config, dtype = network.config, str(network.dtype).removeprefix("torch.")
        free = _free(network.device)
        counts = plan_pages(config, dtype, options, free // 2 if options.memory is None else options.memory)
        check_slots(config, dtype, options, free)
        self.scheduler = Scheduler(config, options, counts)
        try:
            self.kv_cache = KVCache(config, counts, page_length(config), network.dtype, network.device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                f"engine option memory is {options.memory}, and the pages cannot be allocated: {reason:.200}",
                hint=f"lower memory ({free} bytes are free) or max_running ({options.max_running})",
            ) from None
        self.runner = Runner(network, options, self.kv_cache, self._sample)
        self._copies: dict[Request, Request] = {}
        """The copy of every unfinished request, by the request that the caller holds."""
        self._cancelled: deque[Request] = deque()
        self._events: list[tuple[Request, Event]] = []
        """Not given out yet: after an interrupt, those of the step before."""
        self._moved_on = False
        self._forwards = self._failures = 0
        self._strategies = strategies(network)

    @computing()
    def submit(self, request: Request) -> None:
        """Add a request to the queue.

        Raises:
            Overloaded: the queue is full; the request may be submitted again. RequestError: it could never be answered,
                or it, or another request with its row, was submitted before, to whichever engine; or it is none.
        """
        check_request(request)
        if not request.row.claim():
            raise RequestError("the request was not taken: it was submitted before", hint="make a request per answer")
        try:
            copy = request.copy()
            copy.image_spans = tuple(
                HashedImageSpan(start, len(features), _digest(features))
                for start, features in sorted(copy.images.items())
            )
            self.scheduler.submit(copy)
        except BaseException:
            request.row.release()
            raise
        self._copies[request] = copy

    def cancel(self, request: Request) -> None:
        """End a request before the next forward; no effect if it has ended already."""
        check_request(request)
        if request in self._copies:
            self._cancelled.append(self._copies[request])

    @property
    def stats(self) -> EngineStats:
        """The current state and the counts so far."""
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
        """Whether any request is running, waiting or to be cancelled."""
        return bool(self._cancelled or self._events or self.scheduler.running or self.scheduler.waiting)

    @property
    def num_tracked(self) -> int:
        """The number of requests with state for their next forward, apart from pages and slots; 0 once idle."""
        return sum(strategy.num_tracked for strategy in self._strategies.values())

    def step(self) -> StepRecord:
        """Run one forward and update all requests.

        Ctrl-C or a signal's SystemExit is raised from here, and ends no request whose forward can run again.
        """
        with computing(), self.runner.on_device():
            while self._cancelled:
                self._emit(self._cancelled[0], self._cancel(self._cancelled[0]))
                self._cancelled.popleft()
            scheduled = self.scheduler.schedule()
            self._forwards += bool(scheduled)
            self._advance(scheduled)
        events, self._events = self._events, []
        return StepRecord(scheduled=scheduled, events=events)

    def _emit(self, request: Request, events: Iterable[Event]) -> None:
        self._events += [(request.handle, event) for event in events]

    @torch.inference_mode()
    def _advance(self, scheduled: Sequence[ScheduledRequest]) -> None:
        self._moved_on, unfinished = False, {item.request: item for item in scheduled}
        try:
            outcomes = self._run(scheduled)
            progress = self._progress([out for out in outcomes if isinstance(out, RunnerOutput)])
            for outcome in outcomes:
                if isinstance(outcome, RunnerOutput):
                    request = outcome.scheduled.request
                    self._emit(request, self._apply(outcome, progress[request]))
                else:
                    request = outcome[0].request
                    self._emit(request, self._fail(request, outcome[1]))
                del unfinished[request]
        except BaseException as error:
            # What has moved on to its next step and was not told of it cannot go on.
            for request in unfinished if self._moved_on else ():
                self._emit(request, self._fail(request, error))
            raise

    def _progress(self, outputs: Sequence[RunnerOutput]) -> dict[Request, RequestProgress | BaseException]:
        """How each request continues, by the strategy of its mode."""
        progress: dict[Request, RequestProgress | BaseException] = {
            out.scheduled.request: _not_finite() for out in outputs if not out.is_finite
        }
        for kind, strategy in self._strategies.items():
            finite = [out for out in outputs if out.is_finite and strategy_of(out.scheduled.request) == kind]
            results = strategy.advance(finite)
            progress |= {out.scheduled.request: result for out, result in zip(finite, results, strict=True)}
        return progress

    def _sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        """Tokens that the strategies sample from a forward's hidden states, queued before the host waits for it."""
        sampled: dict[Request, Tensor | BaseException] = {}
        for kind, strategy in self._strategies.items():
            sampled |= strategy.sample([item for item in scheduled if strategy_of(item.request) == kind], hidden)
        return sampled

    def _apply(self, outcome: RunnerOutput, progress: RequestProgress | BaseException) -> Sequence[Event]:
        """Update a request's pages and context after its part of a forward, or end it; gives its events."""
        request = outcome.scheduled.request
        if isinstance(progress, BaseException):
            return self._fail(request, progress)
        try:
            return self._update(outcome, progress)
        except Exception as error:
            return self._fail(request, error)

    def _update(self, outcome: RunnerOutput, progress: RequestProgress) -> Sequence[Event]:
        request, scheduled = outcome.scheduled.request, outcome.scheduled
        if outcome.denoised is not None:
            request.step = outcome.denoised.step
        if progress.num_verified is None:
            self.scheduler.mark_computed(scheduled)
        else:
            self.scheduler.accept_draft(scheduled, progress.num_verified)
        if progress.next_tokens is not None:
            if request.row.finish_reason is None:
                self.scheduler.commit(request, progress.next_tokens, draft=progress.is_draft)
            else:
                self.scheduler.end(request)
                self._forget(request)
        return progress.events

    def _run(
        self, scheduled: Sequence[ScheduledRequest]
    ) -> Sequence[RunnerOutput | tuple[ScheduledRequest, BaseException]]:
        """The forward; if it fails, request by request, so that the failing one is found."""
        if not scheduled:
            return []
        try:
            outputs = self.runner.run(scheduled)
            self._moved_on = True
            return outputs
        except _RuleStopped as stop:
            culprits = [item for item in scheduled if item.request in stop.requests]
            others = [item for item in scheduled if item.request not in stop.requests]
            return [*((item, stop.error) for item in culprits), *self._run(others)]
        except BaseException as error:
            self._moved_on |= self.runner.stepped
            if is_interrupt(error):
                raise
            failed = error.with_traceback(None)  # its frames hold everything that the forward allocated
        stepped = self.runner.stepped
        if len(scheduled) == 1:
            return [(scheduled[0], failed)]
        retried = [item for item in scheduled if not (stepped and item.canvas)]
        return [
            *((item, failed) for item in scheduled if stepped and item.canvas),
            *(outcome for item in retried for outcome in self._run([item])),
        ]

    def _cancel(self, request: Request) -> Iterable[Event]:
        if request.state == "ended":
            return []
        self.scheduler.cancel(request)
        self._forget(request)
        try:
            return [*request.row.cancel()]
        except BaseException as error:
            return self._fail(request, error)

    def _forget(self, request: Request) -> None:
        self._copies.pop(request.handle, None)
        self._strategies[strategy_of(request)].forget(request)

    def _fail(self, request: Request, error: BaseException) -> list[Event]:
        """End one request with an error of its own, whose cause is `error`; its pages are not reused."""
        self._failures += 1
        self.scheduler.end(request, discard=True)
        self._forget(request)
        if not isinstance(error, BlockpressError):
            cause, reason = error.with_traceback(None), one_line(error)
            error = EngineError(
                f"the request could not be finished: {reason}",
                hint="ask again; if that does not help, restart the engine",
            )
            error.__cause__ = cause
        return [Failed(request.row.index, error)]


def _free(device: torch.device) -> int:
    """Free bytes on a device; on a GPU including freed memory that torch keeps."""
    if device.type != "cuda":
        return free_memory()["cpu"]  # nothing is known of other kinds of devices: they may well share this memory
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory()[f"cuda:{device.index or 0}"] + cached


def _digest(features: Tensor) -> bytes:
    """A digest of an image's features: pages with other features get other digests."""
    return hashlib.sha256(features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _not_finite() -> EngineError:
    return EngineError(
        "the network's output holds NaN or infinity",
        hint="its weights may be damaged, or the type too narrow for them: load it in bfloat16 or float32",
    )
