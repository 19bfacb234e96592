"""How a request goes on after a forward: one strategy for each way to decode.

    Diffusion        step, step, ... canvas finished                          -> commit, read it, next canvas
    Verified         step, step, ... canvas finished -> read it as a draft    -> commit what stands, or denoise again
    Autoregressive   context read -> next token                               -> commit, read it, next token

A strategy turns outcomes into events and says what joins the context; queue, pages and batches are not its matter.
Verified decoding and log-probabilities read a draft before it is committed: what the causal pass does not agree with is
taken back out of the context.

Invariant: what is kept of a request between two forwards is gone once it is forgotten; a failure is one request's.
Run it:  python -m pytest tests/engine/test_same_tokens.py tests/engine/test_faults.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Event
from blockpress.decoding.autoregressive import choose, counted
from blockpress.decoding.scoring import judge
from blockpress.decoding.verified import conclude, is_asked
from blockpress.engine.request import Request
from blockpress.engine.runner import Outcome
from blockpress.model import Network


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a forward made of a request.

    events: what is told. verified: how many tokens of the draft that the forward has read stand; None: it read none.
    then: the tokens that join the context and are read next; None: nothing was finished. draft: whether these may yet
    be taken back.
    """

    events: Sequence[Event] = ()
    verified: int | None = None
    then: list[int] | None = None
    draft: bool = False


@runtime_checkable
class Strategy(Protocol):
    """One way to decode, for all requests that go this way."""

    def advance(self, outcomes: Sequence[Outcome]) -> list[Progress | Exception]:
        """What became of each request; an exception is that request's alone."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended."""
        ...

    @property
    def remembered(self) -> int:
        """Of how many requests something is kept."""
        ...


def strategies(network: Network) -> dict[str, Strategy]:
    """A strategy of each kind; `kind_of` says which of them is a request's."""
    return {
        "diffusion": Diffusion(),
        "verified": Verified(network),
        "autoregressive": Autoregressive(network),
    }


def kind_of(request: Request) -> str:
    """Which strategy a request goes by."""
    if isinstance(request.sampling, AutoregressiveSampling):
        return "autoregressive"
    return "verified" if request.sampling.checks or request.row.logprobs is not None else "diffusion"


@final
class Diffusion:
    """Canvases that are committed as they settle."""

    remembered = 0

    def advance(self, outcomes: Sequence[Outcome]) -> list[Progress | Exception]:
        return each(outcomes, self._one)

    def forget(self, request: Request) -> None:
        pass

    def _one(self, outcome: Outcome) -> Progress:
        told = drafted(outcome)
        if outcome.canvas is None:
            return Progress(events=told)
        row = outcome.work.request.row
        return Progress(events=[*told, *row.commit()], then=row.fresh)


@final
class Verified:
    """Canvases that the causal pass reads before they are committed: to check them, or for log-probabilities."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last: dict[Request, Tensor] = {}
        """The hidden state of the last context token of each, [1, hidden]."""

    @property
    def remembered(self) -> int:
        return len(self._last)

    def advance(self, outcomes: Sequence[Outcome]) -> list[Progress | Exception]:
        return each(outcomes, self._one)

    def forget(self, request: Request) -> None:
        self._last.pop(request, None)

    def _one(self, outcome: Outcome) -> Progress:
        request, row = outcome.work.request, outcome.work.request.row
        if reads_draft(outcome):
            return self._verify(outcome)
        if outcome.hidden is not None:
            self._last[request] = outcome.hidden[-1:].clone()  # a view would keep the whole forward's rows
        told = drafted(outcome)
        if outcome.canvas is None:
            return Progress(events=told)
        if is_asked(row, checks_of(request)):
            return Progress(events=told, then=row.proposal, draft=True)
        return Progress(events=[*told, *row.commit()], then=row.fresh)

    def _verify(self, outcome: Outcome) -> Progress:
        """The causal pass has read the draft: what it says of it decides what of it is context now."""
        request, row = outcome.work.request, outcome.work.request.row
        assert outcome.hidden is not None
        states = torch.cat((self._last[request], outcome.hidden))[None]
        [judged] = judge(self._network, states, [row], [row.proposal])
        events = [*conclude(row, judged, checks_of(request))]
        self._last[request] = states[0, row.kept : row.kept + 1].clone()
        return Progress(events=events, verified=row.kept, then=row.fresh)


@final
class Autoregressive:
    """Token by token: a canvas of one, committed as soon as it is chosen.

    Where log-probabilities are told, and a turn puts tokens of its own after the chosen one, these are read as a draft,
    for the second of them follows from the first.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last: dict[Request, Tensor] = {}
        self._forwards = Counter[Request]()
        """How many forwards have read a request's context to its end; a prompt in chunks is one."""

    @property
    def remembered(self) -> int:
        return len(self._last.keys() | self._forwards.keys())

    def advance(self, outcomes: Sequence[Outcome]) -> list[Progress | Exception]:
        ready = [outcome for outcome in outcomes if not reads_draft(outcome) and is_read(outcome)]
        for outcome in ready:
            work = outcome.work
            self._forwards[work.request] += work.start < work.stop
            if outcome.hidden is not None:
                self._last[work.request] = outcome.hidden[-1:].clone()
        tokens = self._choose([outcome.work.request for outcome in ready])
        return each(outcomes, lambda outcome: self._one(outcome, tokens))

    def forget(self, request: Request) -> None:
        self._last.pop(request, None)
        self._forwards.pop(request, None)

    def _one(self, outcome: Outcome, tokens: Mapping[Request, int | Exception]) -> Progress:
        request, row = outcome.work.request, outcome.work.request.row
        if reads_draft(outcome):
            assert outcome.hidden is not None
            self._forwards[request] += 1
            return self._commit(request, torch.cat((self._last[request], outcome.hidden)), verified=0)
        token = tokens.get(request)
        if token is None:
            return Progress()
        if isinstance(token, Exception):
            raise token
        row.draft([token], 0)
        proposal = row.proposal if row.logprobs is not None else []
        if len(proposal) > 1:
            return Progress(then=proposal[:-1], draft=True)
        return self._commit(request, self._last[request])

    def _commit(self, request: Request, states: Tensor, verified: int | None = None) -> Progress:
        """The chosen token joins the answer; `states` are what its log-probabilities are told from."""
        row = request.row
        [judged] = judge(self._network, states[None], [row], [row.proposal if row.logprobs is not None else []])
        forwards = Counter({row.index: self._forwards[request]})
        return Progress(events=[*counted(row.commit(judged.said), forwards)], verified=verified, then=row.fresh)

    def _choose(self, requests: Sequence[Request]) -> dict[Request, int | Exception]:
        """The next token of each, drawn together where they are drawn alike."""
        alike: dict[AutoregressiveSampling, list[Request]] = {}
        for request in requests:
            assert isinstance(request.sampling, AutoregressiveSampling)
            alike.setdefault(request.sampling, []).append(request)
        tokens: dict[Request, int | Exception] = {}
        for sampling, some in alike.items():
            tokens |= self._chosen(some, sampling)
        return tokens

    def _chosen(self, requests: Sequence[Request], sampling: AutoregressiveSampling) -> dict[Request, int | Exception]:
        """A token each; where that fails, request by request, so that the one at fault is found."""
        try:
            last = torch.stack([self._last[request] for request in requests])
            chosen = choose(self._network, [request.row for request in requests], last, sampling)
            return dict(zip(requests, chosen, strict=True))
        except Exception as error:
            failed = error.with_traceback(None)
        if len(requests) == 1:
            return {requests[0]: failed}
        return {one: found for request in requests for one, found in self._chosen([request], sampling).items()}


def each(outcomes: Sequence[Outcome], one: Callable[[Outcome], Progress]) -> list[Progress | Exception]:
    """`one` of every outcome; what it raises, a turn's fault or a verification's, is that request's alone."""
    found: list[Progress | Exception] = []
    for outcome in outcomes:
        try:
            found.append(one(outcome))
        except Exception as error:
            found.append(error)
    return found


def drafted(outcome: Outcome) -> list[Event]:
    """The step that the forward did, told, and the canvas as it left it; nothing where it did none."""
    if outcome.denoised is None:
        return []
    outcome.work.request.row.draft(outcome.canvas or [], outcome.denoised.step)
    return [outcome.denoised]


def is_read(outcome: Outcome) -> bool:
    """Whether the forward has read the request's context to its end."""
    return outcome.work.stop == len(outcome.work.request.context)


def reads_draft(outcome: Outcome) -> bool:
    """Whether the forward has read tokens that may yet be taken back."""
    return outcome.work.request.asked > 0 and is_read(outcome)


def checks_of(request: Request) -> int:
    """How many times at most the causal pass checks a canvas of a request."""
    return request.sampling.checks if isinstance(request.sampling, Sampling) else 0
