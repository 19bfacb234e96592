"""Runs a workload one forward at a time, and records the time and contents of each.

    arrivals --submit--> stepper --step--> events           every forward: seconds, rows, events
                                                            every request: arrival, first canvas, end

A stepper runs one forward at a time: the engine's core, or the reference loop, whose step and commit count as one
forward, as they are one in the engine.

Invariant: a request's times count from its arrival, whether or not there was capacity for it then.
Run it:  python -m pytest tests/bench/test_drive.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from blockpress.bench.workload import Workload, arrivals
from blockpress.costs import BatchShape
from blockpress.decoding import Committed, Done, Event, Failed, Reply
from blockpress.engine import Request
from blockpress.errors import BlockpressError, RequestError
from blockpress.hardware import Peak


class Stepper(Protocol):
    """Answers requests, one forward a `step`.

    rows: the batch of the last forward. prefill: whether it held tokens of a prompt.
    """

    rows: BatchShape
    prefill: bool

    @property
    def busy(self) -> bool: ...

    @property
    def page_bytes(self) -> int:
        """Bytes of keys and values held for contexts."""
        ...

    def submit(self, request: Request) -> None: ...

    def step(self) -> Sequence[tuple[Request, Event]]: ...


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward: its duration, its end, its batch, and how many tokens it finished."""

    seconds: float
    ended: float
    rows: BatchShape
    prefill: bool
    tokens: int


@dataclass(kw_only=True)
class RequestTrace:
    """One request. Times in seconds from the start of the run; None: not yet."""

    request: Request
    arrived: float
    first: float | None = None
    ended: float | None = None
    steps: list[int] = field(default_factory=list)
    reply: Reply | None = None
    error: BlockpressError | None = None


@dataclass(kw_only=True)
class BenchRun:
    """The recorded run. `seconds` is its whole duration, waiting for arrivals included; memory in bytes."""

    forwards: list[Forward] = field(default_factory=list)
    traces: list[RequestTrace] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    page_bytes: int = 0

    @property
    def errors(self) -> list[BlockpressError]:
        """Those of the requests that failed."""
        return [trace.error for trace in self.traces if trace.error is not None]

    def whole(self) -> BenchRun:
        """This run, if every request was answered; otherwise raises the error of the first that was not."""
        for error in self.errors:
            raise error
        return self


def drive(
    stepper: Stepper, work: Workload, incoming: Iterator[Request], device: torch.device, before: int | None = None
) -> BenchRun:
    """Run the workload to its end: all requests that arrive are answered, failed or refused.

    Args:
        before: bytes that do not count as used by the run; None: those in use when it starts.
    """
    # Prompts are made first: the time that it takes is not to be measured.
    ready = incoming if work.count is None else iter(list(incoming))
    return _Driver(stepper, work, ready, device, Peak(device, before)).go()


class _Driver:
    def __init__(
        self, stepper: Stepper, work: Workload, incoming: Iterator[Request], device: torch.device, peak: Peak
    ) -> None:
        self.stepper, self.work, self.device, self.peak = stepper, work, device, peak
        self.run, self._started = BenchRun(), time.perf_counter()
        self._open: dict[int, RequestTrace] = {}
        self._arrivals = zip(arrivals(work), incoming, strict=False)
        self._next = next(self._arrivals, None)

    def go(self) -> BenchRun:
        while True:
            self._submit()
            if self.stepper.busy:
                self._step()
            elif self._next is None:
                break
            else:
                time.sleep(max(0.0, min(0.05, self._next[0] - self._now())))
        self.run.seconds = self._now()
        self.run.peak_bytes = self.peak.value()
        return self.run

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _submit(self) -> None:
        """Submit the requests that have arrived; in a closed loop at most one per user."""
        users = self.work.concurrency
        while self._next is not None and (users is None or len(self._open) < users):
            due, now = self._next[0], self._now()
            if self.work.seconds is not None and max(due, now if users else 0.0) >= self.work.seconds:
                self._next = None
                return
            if due > now:
                return
            request = self._next[1]
            try:
                self.stepper.submit(request)
            except RequestError as error:
                self._refused(request, error)
            else:
                trace = RequestTrace(request=request, arrived=now if users else due)
                self._open[request.row.index] = trace
                self.run.traces.append(trace)
            self._next = next(self._arrivals, None)

    def _refused(self, request: Request, error: RequestError) -> None:
        """Online, a full queue is a result to report; otherwise the request is the caller's mistake."""
        if self.work.rate is None:
            raise error
        self.run.refused += 1

    def _step(self) -> None:
        started = self._now()
        events = self.stepper.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, tokens = self._now(), 0
        for request, event in events:
            tokens += self._record(request, event, now)
        rows = self.stepper.rows
        if rows != BatchShape():
            forward = Forward(seconds=now - started, ended=now, rows=rows, prefill=self.stepper.prefill, tokens=tokens)
            self.run.forwards.append(forward)
        self.peak.see()
        self.run.page_bytes = max(self.run.page_bytes, self.stepper.page_bytes)

    def _record(self, request: Request, event: Event, now: float) -> int:
        """Record an event; returns how many tokens it finished."""
        trace = self._open[request.row.index]
        if isinstance(event, Committed):
            trace.first = now if trace.first is None else trace.first
            trace.steps.append(event.steps)
            return len(event.tokens)
        if isinstance(event, Done):
            trace.ended, trace.reply = now, event.reply
            del self._open[request.row.index]
        elif isinstance(event, Failed):
            trace.ended, trace.error = now, event.error
            del self._open[request.row.index]
        return 0
