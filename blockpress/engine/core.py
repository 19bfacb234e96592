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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from blockpress.judge import judge
from blockpress.model import Network
from blockpress.reply import Event, Failed
from blockpress.verify import conclude, is_asked
from blockpress.weights.memory import free_memory


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
        events = [(request, event) for request in self._cancelled for event in self._cancel(request)]
        self._cancelled.clear()
        works = self.scheduler.plan()
        self._ran += bool(works)
        outcomes = [*self._run(works)]
        tokens = self._choose([one for one in outcomes if isinstance(one, Outcome)])
        for outcome in outcomes:
            request = outcome.work.request if isinstance(outcome, Outcome) else outcome[0].request
            events += ((request, event) for event in self._take(outcome, tokens))
        return events

    def _run(self, works: Sequence[Work]) -> Iterator[Outcome | tuple[Work, Exception]]:
        """The forward; where it fails, request by request, so that the one at fault is found."""
        if not works:
            return iter(())
        try:
            return iter(self.runner.run(works))
        except Exception as error:
            if len(works) == 1:
                return iter([(works[0], error)])
            return iter([one for work in works for one in self._run([work])])

    def _cancel(self, request: Request) -> Iterable[Event]:
        if request.state == "ended":
            return []
        self.scheduler.cancel(request)
        self._last.pop(request, None)
        return [*request.row.cancel()]

    @torch.inference_mode()
    def _choose(self, outcomes: Sequence[Outcome]) -> dict[Request, int]:
        """The next token of every autoregressive request whose whole context has been read."""
        alike: dict[AutoregressiveSampling, list[Request]] = {}
        for outcome in outcomes:
            request = outcome.work.request
            if request.asked:
                continue
            if outcome.hidden is not None:
                self._last[request] = outcome.hidden[-1:]
            if isinstance(request.sampling, AutoregressiveSampling) and outcome.work.stop == len(request.context):
                alike.setdefault(request.sampling, []).append(request)
        tokens: dict[Request, int] = {}
        for sampling, requests in alike.items():
            last = torch.stack([self._last[request] for request in requests])
            tokens |= zip(requests, choose(self.network, [one.row for one in requests], last, sampling), strict=True)
        return tokens

    def _take(self, outcome: Outcome | tuple[Work, Exception], tokens: Mapping[Request, int]) -> list[Event]:
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
        if request in tokens:
            return self._take_token(request, tokens[request])
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
        self._last[request] = states[0, kept : kept + 1]
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
                f"a forward failed: {said}", hint="ask again; if that does not help, restart the engine"
            )
        return [Failed(request.row.index, error)]


def _checks(request: Request) -> int:
    return request.sampling.checks if isinstance(request.sampling, Sampling) else 0


def _free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return free_memory()[str(device) if device.type == "cpu" else f"{device.type}:{device.index or 0}"]


def _digest(features: Tensor) -> bytes:
    """What a picture's features are known by: pages that show others are others."""
    return hashlib.sha256(features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _no_number() -> EngineError:
    return EngineError(
        "the network's output holds NaN or infinity",
        hint="its weights may be damaged, or the type too narrow for them: load it in bfloat16 or float32",
    )
