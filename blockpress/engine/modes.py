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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Event, SequenceState
from blockpress.decoding.autoregressive import sample_next, with_usage
from blockpress.decoding.scoring import TokenScores, score_tokens
from blockpress.decoding.verified import apply_verification, needs_causal_pass
from blockpress.engine.request import Request
from blockpress.engine.runner import RunnerOutput, SampledTokens
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.model import Network

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class RequestProgress:
    """What a forward made of a request.

    events: what is told. verified: how many tokens of the draft that the forward has read stand; None: it read none.
    then: the tokens that join the context and are read next; None: nothing was finished. draft: whether these may yet
    be taken back.
    """

    events: Sequence[Event] = ()
    num_verified: int | None = None
    next_tokens: list[int] | None = None
    is_draft: bool = False


@runtime_checkable
class Strategy(Protocol):
    """One way to decode, for all requests that go this way."""

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        """What each request wants of the states that its part of a forward has heard; nothing here waits for them.

        A forward may be run again: so may this.
        """
        ...

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | Exception]:
        """What became of each request; an exception is that request's alone."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended."""
        ...

    @property
    def num_tracked(self) -> int:
        """Of how many requests something is kept."""
        ...


def strategies(network: Network) -> dict[str, Strategy]:
    """A strategy of each kind; `strategy_of` says which of them is a request's."""
    return {
        "diffusion": Diffusion(),
        "verified": Verified(network),
        "autoregressive": Autoregressive(network),
    }


def strategy_of(request: Request) -> str:
    """Which strategy a request goes by."""
    if isinstance(request.sampling, AutoregressiveSampling):
        return "autoregressive"
    return "verified" if request.sampling.checks or request.row.logprobs is not None else "diffusion"


@final
class Diffusion:
    """Canvases that are committed as they settle."""

    num_tracked = 0

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        return {}

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | Exception]:
        return apply_each(outcomes, after_step)

    def forget(self, request: Request) -> None:
        pass


@final
class Verified:
    """Canvases that the causal pass reads before they are committed: to check them, or for log-probabilities."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last: dict[Request, Tensor] = {}
        """The hidden state of the last context token of each, [1, hidden]."""

    @property
    def num_tracked(self) -> int:
        return len(self._last)

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        return {}

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | Exception]:
        return score_drafts(self._network, outcomes, apply_each(outcomes, self._draft), self._apply)

    def forget(self, request: Request) -> None:
        self._last.pop(request, None)

    def _draft(self, outcome: RunnerOutput) -> Draft | RequestProgress:
        """The draft that the forward has read, to be judged, or how a request goes on that has none."""
        request, row = outcome.scheduled.request, outcome.scheduled.request.row
        if reads_draft(outcome.scheduled):
            assert outcome.hidden is not None
            return Draft(row, row.proposal, torch.cat((self._last[request], outcome.hidden)))
        if outcome.hidden is not None:
            self._last[request] = outcome.hidden[-1:].clone()  # a view would keep the whole forward's rows
        return after_step(outcome)

    def _apply(self, outcome: RunnerOutput, draft: Draft, judged: TokenScores) -> RequestProgress:
        """The causal pass has read the draft: what it says of it decides what of it is context now."""
        request, row = outcome.scheduled.request, draft.row
        events = [*apply_verification(row, judged, max_checks(request))]
        self._last[request] = draft.states[row.num_kept : row.num_kept + 1].clone()
        return RequestProgress(events=events, num_verified=row.num_kept, next_tokens=row.new_tokens)


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
    def num_tracked(self) -> int:
        return len(self._last.keys() | self._forwards.keys())

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        """The next token of those whose context has been read."""
        ready = [work.request for work in scheduled if reads_to_end(work) and not reads_draft(work)]
        for request in ready:
            if request in hidden:
                self._last[request] = hidden[request][-1:].clone()
        alike: dict[AutoregressiveSampling, list[Request]] = {}
        for request in ready:
            assert isinstance(request.sampling, AutoregressiveSampling)
            alike.setdefault(request.sampling, []).append(request)
        tokens: dict[Request, Tensor | Exception] = {}
        for sampling, some in alike.items():
            tokens |= zip(some, apply_batched(some, partial(self._choose, sampling)), strict=True)
        return tokens

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | Exception]:
        return score_drafts(self._network, outcomes, apply_each(outcomes, self._draft), self._commit)

    def forget(self, request: Request) -> None:
        self._last.pop(request, None)
        self._forwards.pop(request, None)

    def _draft(self, outcome: RunnerOutput) -> Draft | RequestProgress:
        """What is to be committed, or how a request goes on that commits nothing yet."""
        work, row = outcome.scheduled, outcome.scheduled.request.row
        if not reads_to_end(work):
            return RequestProgress()
        states = self._last[work.request]
        if reads_draft(work):
            assert outcome.hidden is not None
            self._forwards[work.request] += 1
            return Draft(row, row.proposal, torch.cat((states, outcome.hidden)))
        self._forwards[work.request] += work.start < work.stop
        if isinstance(outcome.sampled, Exception):
            raise outcome.sampled
        assert outcome.sampled is not None, "a token was asked for"
        row.draft(outcome.sampled, 0)
        proposal = row.proposal if row.logprobs is not None else []
        if len(proposal) > 1:
            return RequestProgress(next_tokens=proposal[:-1], is_draft=True)
        return Draft(row, proposal, states)

    def _commit(self, outcome: RunnerOutput, draft: Draft, judged: TokenScores) -> RequestProgress:
        """The chosen token joins the answer."""
        row, verified = draft.row, 0 if reads_draft(outcome.scheduled) else None
        forwards = Counter({row.index: self._forwards[outcome.scheduled.request]})
        return RequestProgress(
            events=[*with_usage(row.commit(judged.logprobs), forwards)],
            num_verified=verified,
            next_tokens=row.new_tokens,
        )

    def _choose(self, sampling: AutoregressiveSampling, requests: Sequence[Request]) -> Sequence[Tensor]:
        last = torch.stack([self._last[request] for request in requests])
        return sample_next(self._network, [request.row for request in requests], last, sampling).split(1)


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that a row is about to commit, and the states that speak of them: [tokens, hidden] or one more."""

    row: SequenceState
    tokens: list[int]
    states: Tensor


def score_drafts(
    network: Network,
    outcomes: Sequence[RunnerOutput],
    found: Sequence[Draft | RequestProgress | Exception],
    end: Callable[[RunnerOutput, Draft, TokenScores], RequestProgress],
) -> list[RequestProgress | Exception]:
    """Let the causal pass judge all drafts at once, and `end` each; what is no draft stays as it is."""
    drafts = [draft for draft in found if isinstance(draft, Draft)]
    judged = dict(zip(drafts, apply_batched(drafts, partial(_scored, network)), strict=True))

    def one(pair: tuple[RunnerOutput, Draft | RequestProgress | Exception]) -> RequestProgress:
        outcome, draft = pair
        if isinstance(draft, RequestProgress):
            return draft
        if isinstance(draft, Exception):
            raise draft
        said = judged[draft]
        if isinstance(said, Exception):
            raise said
        return end(outcome, draft, said)

    return apply_each(zip(outcomes, found, strict=True), one)


def _scored(network: Network, drafts: Sequence[Draft]) -> list[TokenScores]:
    """What the causal pass says of each."""
    if not any(draft.tokens for draft in drafts):
        return [TokenScores([], [], []) for _ in drafts]
    states = pad_sequence([draft.states for draft in drafts], batch_first=True)
    return score_tokens(network, states, [draft.row for draft in drafts], [draft.tokens for draft in drafts])


def apply_batched(given: Sequence[Given], made: Callable[[Sequence[Given]], Sequence[Made]]) -> list[Made | Exception]:
    """What `made` makes of all at once; where that fails, one by one, so that the one at fault is found."""
    try:
        return [*made(given)]
    except Exception as error:
        failed = error.with_traceback(None)
    if len(given) == 1:
        return [failed]
    return [found for own in given for found in apply_batched([own], made)]


def apply_each(given: Iterable[Given], one: Callable[[Given], Made]) -> list[Made | Exception]:
    """`one` of every request's; what it raises, a turn's fault or a verification's, is that request's alone."""
    found: list[Made | Exception] = []
    for own in given:
        try:
            found.append(one(own))
        except Exception as error:
            found.append(error)
    return found


def after_step(outcome: RunnerOutput) -> RequestProgress:
    """How a request goes on after its canvas's step, if there was one: another step, its draft read, or its commit."""
    request, row = outcome.scheduled.request, outcome.scheduled.request.row
    if outcome.denoised is None:
        return RequestProgress()
    row.draft(outcome.canvas or [], outcome.denoised.step)
    if outcome.canvas is None:
        return RequestProgress(events=[outcome.denoised])
    if needs_causal_pass(row, max_checks(request)):
        return RequestProgress(events=[outcome.denoised], next_tokens=row.proposal, is_draft=True)
    return RequestProgress(events=[outcome.denoised, *row.commit()], next_tokens=row.new_tokens)


def reads_to_end(work: ScheduledRequest) -> bool:
    """Whether the forward reads the request's context to its end."""
    return work.stop == len(work.request.context)


def reads_draft(work: ScheduledRequest) -> bool:
    """Whether the forward reads tokens that may yet be taken back."""
    return work.request.num_draft_tokens > 0 and reads_to_end(work)


def max_checks(request: Request) -> int:
    """How many times at most the causal pass checks a canvas of a request."""
    return request.sampling.checks if isinstance(request.sampling, Sampling) else 0
