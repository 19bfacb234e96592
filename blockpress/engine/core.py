"""The engine's heart: requests go in, and each `step` is one forward for all of them.

    step:   plan     who takes part, with which tokens          scheduler, without tensors
            run      one forward                                runner
            take     what came of it: events, commits, ends     here

Synchronous, single-threaded and deterministic; `engine.py` puts it on a thread of its own.

Invariant: a request's events are a function of (weights, prompt, seed, sampling), never of what runs beside it; an
error in one request is an event of that request, and every other one goes on.
Run it:  python -m pytest tests/engine/test_same_tokens.py
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpress.autoregress import choose, counted
from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.engine.options import EngineOptions
from blockpress.engine.pages import page_length, plan_pages
from blockpress.engine.request import Picture, Request
from blockpress.engine.runner import Outcome, Runner
from blockpress.engine.scheduler import Scheduler, SchedulerStats, Work
from blockpress.engine.store import Store
from blockpress.errors import BlockpressError, EngineError
from blockpress.hardware import free_memory
from blockpress.judge import judge
from blockpress.model import Network
from blockpress.reply import Event, Failed
from blockpress.verify import conclude, is_asked


@dataclass(frozen=True, kw_only=True)
class Stats:
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


class Core:
    """Answers many requests at once over one network."""

    def __init__(self, network: Network, options: EngineOptions | None = None) -> None:
        options = EngineOptions() if options is None else options
        self.network, self.options = network, options
        config, dtype = network.config, str(network.dtype).removeprefix("torch.")
        memory = _free(network.device) // 2 if options.memory is None else options.memory
        counts = plan_pages(config, dtype, options, memory)
        self.scheduler = Scheduler(config, options, counts)
        self.store = Store(config, counts, page_length(config), network.dtype, network.device)
        self.runner = Runner(network, options, self.store)
        self._cancelled: list[Request] = []
        self._ran = self._failures = 0
        self._last: dict[Request, Tensor] = {}
        """The hidden state of the last context token of each request that asks for it, [1, hidden]."""

    def submit(self, request: Request) -> None:
        """Take a request into the queue.

        Raises:
            Overloaded: the queue is full. RequestError: a request that could never be answered.
        """
        request.pictures = tuple(
            Picture(start, len(features), _digest(features)) for start, features in sorted(request.row.images.items())
        )
        self.scheduler.submit(request)

    def cancel(self, request: Request) -> None:
        """End a request before the next forward; one that has ended is left as it is."""
        if request.state not in ("new", "ended"):
            self._cancelled.append(request)

    @property
    def stats(self) -> Stats:
        """What the engine is doing, and what it has done so far."""
        captured = self.runner.captured
        return Stats(
            scheduler=self.scheduler.stats,
            forwards=self._ran,
            failures=self._failures,
            page_bytes=self.store.nbytes,
            captures=0 if captured is None else captured.captures,
            replays=0 if captured is None else captured.replays,
            eager=self.runner.eager,
        )

    @property
    def busy(self) -> bool:
        """Whether there is something left to do."""
        return bool(self._cancelled or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[tuple[Request, Event]]:
        """One forward, and what came of it, in the order of the requests."""
        cancelled, self._cancelled = self._cancelled, []
        events = [(request, event) for request in cancelled for event in self._cancel(request)]
        works = self.scheduler.plan()
        self._ran += bool(works)
        with self.runner.placed():
            return events + self._answered(works)

    def _answered(self, works: Sequence[Work]) -> list[tuple[Request, Event]]:
        events: list[tuple[Request, Event]] = []
        outcomes = self._run(works)
        tokens = self._choose([one for one in outcomes if isinstance(one, Outcome)])
        for outcome in outcomes:
            request = outcome.work.request if isinstance(outcome, Outcome) else outcome[0].request
            try:
                told = self._take(outcome, tokens)
            except Exception as error:  # of any kind: a turn's, a judge's; the other requests have no part in it
                told = self._fail(request, error)
            events += [(request, event) for event in told]
        return events

    def _run(self, works: Sequence[Work]) -> Sequence[Outcome | tuple[Work, Exception]]:
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
        self._last.pop(request, None)
        try:
            return [*request.row.cancel()]
        except Exception as error:
            return self._fail(request, error)

    @torch.inference_mode()
    def _choose(self, outcomes: Sequence[Outcome]) -> dict[Request, int | Exception]:
        """The next token of every autoregressive request whose whole context has been read."""
        alike: dict[AutoregressiveSampling, list[Request]] = {}
        for outcome in outcomes:
            request = outcome.work.request
            if request.asked or not outcome.sound:
                continue
            if outcome.hidden is not None:
                self._last[request] = outcome.hidden[-1:].clone()  # a view would keep the whole forward's rows
            if isinstance(request.sampling, AutoregressiveSampling) and outcome.work.stop == len(request.context):
                alike.setdefault(request.sampling, []).append(request)
        tokens: dict[Request, int | Exception] = {}
        for sampling, requests in alike.items():
            tokens |= self._chosen(requests, sampling)
        return tokens

    def _chosen(self, requests: Sequence[Request], sampling: AutoregressiveSampling) -> dict[Request, int | Exception]:
        """A token each; where that fails, request by request, so that the one at fault is found."""
        try:
            last = torch.stack([self._last[request] for request in requests])
            chosen = choose(self.network, [request.row for request in requests], last, sampling)
            return dict(zip(requests, chosen, strict=True))
        except Exception as error:
            failed = error.with_traceback(None)
        if len(requests) == 1:
            return {requests[0]: failed}
        return {one: found for request in requests for one, found in self._chosen([request], sampling).items()}

    def _take(
        self, outcome: Outcome | tuple[Work, Exception], tokens: Mapping[Request, int | Exception]
    ) -> list[Event]:
        """Book a request's part of a forward, and tell what it adds to its answer."""
        if isinstance(outcome, tuple):
            return self._fail(outcome[0].request, outcome[1])
        request = outcome.work.request
        if not outcome.sound:
            return self._fail(request, _no_number())
        if request.asked and outcome.work.stop == len(request.context):
            return self._conclude(request, outcome)
        self.scheduler.done(outcome.work)
        request.forwards += outcome.work.start < outcome.work.stop == len(request.context)
        token = tokens.get(request)
        if token is not None:
            return self._fail(request, token) if isinstance(token, Exception) else self._take_token(request, token)
        if outcome.denoised is None:
            return []
        request.step = outcome.denoised.step
        request.row.draft(outcome.canvas or [], request.step)
        events: list[Event] = [outcome.denoised]
        if outcome.canvas is None:
            return events
        if is_asked(request.row, _checks(request)):
            self._ask(request, request.row.proposal)
            return events
        return [*events, *request.row.commit(), *self._go_on(request)]

    @torch.inference_mode()
    def _take_token(self, request: Request, token: int) -> list[Event]:
        """A token was chosen; where log-probabilities are told, a turn's own tokens behind it are read first."""
        row = request.row
        row.draft([token], 0)
        proposal = row.proposal if row.logprobs is not None else []
        if len(proposal) > 1:
            self._ask(request, proposal[:-1])
            return []
        [judged] = judge(self.network, self._last[request][None], [row], [proposal])
        said = [*counted(row.commit(judged.said), Counter({row.index: request.forwards}))]
        return [*said, *self._go_on(request)]

    def _ask(self, request: Request, tokens: list[int]) -> None:
        """The next forward reads tokens that may yet be taken back."""
        self.scheduler.commit(request, tokens)
        request.asked = len(tokens)

    @torch.inference_mode()
    def _conclude(self, request: Request, outcome: Outcome) -> list[Event]:
        """The causal pass has read a proposal: what it says of it decides what of it is context now."""
        row, work, base = request.row, outcome.work, len(request.context) - request.asked
        assert outcome.hidden is not None
        states = torch.cat((self._last[request], outcome.hidden))[None]
        [judged] = judge(self.network, states, [row], [row.proposal])
        if request.speaks == "autoregressive":
            request.forwards += 1
            events = [*counted(row.commit(judged.said), Counter({row.index: request.forwards}))]
            kept = 0
        else:
            events = [*conclude(row, judged, _checks(request))]
            kept = row.kept
        self._last[request] = states[0, kept : kept + 1].clone()
        del request.context[base + kept :]
        request.asked = 0
        self.scheduler.done(Work(request, work.start, base + kept, canvas=False))
        return [*events, *self._go_on(request)]

    def _go_on(self, request: Request) -> tuple[()]:
        """What the row committed is read next, and a canvas begun; or the request has ended. Tells nothing."""
        if request.row.finish_reason is None:
            self.scheduler.commit(request, request.row.fresh)
        else:
            self._forget(request)
        return ()

    def _forget(self, request: Request) -> None:
        self.scheduler.end(request)
        self._last.pop(request, None)

    def _fail(self, request: Request, error: Exception) -> list[Event]:
        """End one request with an error of its own; what it has in pages is not trusted."""
        self._failures += 1
        self.scheduler.end(request, spoilt=True)
        self._forget(request)
        if not isinstance(error, BlockpressError):
            said = " ".join(f"{type(error).__name__}: {error}".split())
            error = EngineError(
                f"the request could not be finished: {said}",
                hint="ask again; if that does not help, restart the engine",
            )
        return [Failed(request.row.index, error)]


def _checks(request: Request) -> int:
    return request.sampling.checks if isinstance(request.sampling, Sampling) else 0


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
