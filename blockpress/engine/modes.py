"""How a request continues after a forward: one strategy per decoding mode.

    Diffusion        step, step, ... canvas finished                          -> commit, read it, next canvas
    Verified         step, step, ... canvas finished -> read it as a draft    -> commit what is accepted, or redo
    Autoregressive   context read -> next token                               -> commit, read it, next token

A strategy turns runner outputs into events and decides what joins the context; it knows nothing of queue, pages and
batches. Verified decoding and log-probabilities read a draft before it is committed: tokens that the verification
rejects are removed from the context.

Invariant: no state of a request remains after `forget`; a failure affects one request only.
Run it:  python -m pytest tests/engine/test_same_tokens.py tests/engine/test_faults.py
"""

from __future__ import annotations

import threading
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
from blockpress.decoding.verified import apply_verification, needs_causal_pass, wanted_alternatives
from blockpress.engine.request import Request
from blockpress.engine.runner import RunnerOutput, SampledTokens
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.model import Network

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RequestProgress:
    """How a request continues after a forward.

    events: for the caller. num_verified: how many tokens of the draft that the forward read are accepted; None: it read
    no draft. next_tokens: the tokens that join the context and are read next; None: nothing was finished. is_draft:
    whether these may still be rejected.
    """

    events: Sequence[Event] = ()
    num_verified: int | None = None
    next_tokens: list[int] | None = None
    is_draft: bool = False


@runtime_checkable
class Strategy(Protocol):
    """One decoding mode, for all requests in it."""

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        """Tokens sampled from the hidden states of each request's logit rows; this must not wait for the device.

        It may be called again for the same requests, since a failed forward is run again.
        """
        ...

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | BaseException]:
        """How each request continues; an exception concerns that request only."""
        ...

    def forget(self, request: Request) -> None:
        """Drop all state of a request that has ended."""
        ...

    @property
    def num_tracked(self) -> int:
        """The number of requests with state in here."""
        ...


def strategies(network: Network) -> dict[str, Strategy]:
    """One strategy of each kind, by the name that `strategy_of` gives."""
    return {
        "diffusion": Diffusion(),
        "verified": Verified(network),
        "autoregressive": Autoregressive(network),
    }


def strategy_of(request: Request) -> str:
    """The name of a request's strategy."""
    if isinstance(request.sampling, AutoregressiveSampling):
        return "autoregressive"
    return "verified" if request.sampling.reads_drafts or request.row.logprobs is not None else "diffusion"


@final
class Diffusion:
    """Canvases, committed as soon as they settle."""

    num_tracked = 0

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        return {}

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | BaseException]:
        return apply_each(outcomes, after_step)

    def forget(self, request: Request) -> None:
        pass


@final
class Verified:
    """Canvases that a causal pass reads before they are committed: for verification or log-probabilities."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last: dict[Request, Tensor] = {}
        """The hidden state of each request's last context token, [1, hidden]."""

    @property
    def num_tracked(self) -> int:
        return len(self._last)

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        return {}

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | BaseException]:
        return score_drafts(self._network, outcomes, apply_each(outcomes, self._draft), self._apply)

    def forget(self, request: Request) -> None:
        self._last.pop(request, None)

    def _draft(self, outcome: RunnerOutput) -> Draft | RequestProgress:
        """The draft that the forward read, to be scored, or how the request continues if there was none."""
        request, row = outcome.scheduled.request, outcome.scheduled.request.row
        if reads_draft(outcome.scheduled):
            assert outcome.hidden is not None
            wanted = wanted_alternatives(row, canvas_sampling(request))
            return Draft(row, row.proposal, torch.cat((self._last[request], outcome.hidden)), wanted)
        if outcome.hidden is not None:
            self._last[request] = outcome.hidden[-1:].clone()  # a view would keep all rows of the forward alive
        return after_step(outcome)

    def _apply(self, outcome: RunnerOutput, draft: Draft, scores: TokenScores) -> RequestProgress:
        """Commit or redo, by the scores of the draft."""
        request, row = outcome.scheduled.request, draft.row
        events = [*apply_verification(row, scores, canvas_sampling(request))]
        self._last[request] = draft.states[row.num_kept : row.num_kept + 1].clone()
        return RequestProgress(events=events, num_verified=row.num_kept, next_tokens=row.new_tokens)


@final
class Autoregressive:
    """One token at a time: a canvas of one, committed as soon as it is chosen.

    If log-probabilities are reported and the output processor replaces the token with several, these are read as a
    draft, since the log-probability of the second follows from the first.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last: dict[Request, Tensor] = {}
        self._forwards = Counter[Request]()
        """The number of forwards that read each request's context to its end; a prompt in chunks counts once."""

    @property
    def num_tracked(self) -> int:
        return len(self._last.keys() | self._forwards.keys())

    def sample(self, scheduled: Sequence[ScheduledRequest], hidden: Mapping[Request, Tensor]) -> SampledTokens:
        """The next token of the requests whose context has been read."""
        ready = [item.request for item in scheduled if reads_to_end(item) and not reads_draft(item)]
        for request in ready:
            if request in hidden:
                self._last[request] = hidden[request][-1:].clone()
        by_sampling: dict[AutoregressiveSampling, list[Request]] = {}
        for request in ready:
            assert isinstance(request.sampling, AutoregressiveSampling)
            by_sampling.setdefault(request.sampling, []).append(request)
        tokens: dict[Request, Tensor | BaseException] = {}
        for sampling, requests in by_sampling.items():
            tokens |= zip(requests, apply_batched(requests, partial(self._sample, sampling)), strict=True)
        return tokens

    def advance(self, outcomes: Sequence[RunnerOutput]) -> list[RequestProgress | BaseException]:
        return score_drafts(self._network, outcomes, apply_each(outcomes, self._draft), self._commit)

    def forget(self, request: Request) -> None:
        self._last.pop(request, None)
        self._forwards.pop(request, None)

    def _draft(self, outcome: RunnerOutput) -> Draft | RequestProgress:
        """The tokens to be scored and committed, or how the request continues if it commits nothing yet."""
        scheduled, row = outcome.scheduled, outcome.scheduled.request.row
        if not reads_to_end(scheduled):
            return RequestProgress()
        states = self._last[scheduled.request]
        if reads_draft(scheduled):
            assert outcome.hidden is not None
            self._forwards[scheduled.request] += 1
            return Draft(row, row.proposal, torch.cat((states, outcome.hidden)), row.logprobs)
        self._forwards[scheduled.request] += scheduled.start < scheduled.stop
        if isinstance(outcome.sampled, BaseException):
            raise outcome.sampled
        assert outcome.sampled is not None, "a token was to be sampled"
        row.draft(outcome.sampled, 0)
        proposal = row.proposal if row.logprobs is not None else []
        if len(proposal) > 1:
            return RequestProgress(next_tokens=proposal[:-1], is_draft=True)
        return Draft(row, proposal, states, row.logprobs)

    def _commit(self, outcome: RunnerOutput, draft: Draft, scores: TokenScores) -> RequestProgress:
        """Commit the chosen token."""
        row, verified = draft.row, 0 if reads_draft(outcome.scheduled) else None
        forwards = Counter({row.index: self._forwards[outcome.scheduled.request]})
        return RequestProgress(
            events=[*with_usage(row.commit(scores.logprobs), forwards)],
            num_verified=verified,
            next_tokens=row.new_tokens,
        )

    def _sample(self, sampling: AutoregressiveSampling, requests: Sequence[Request]) -> Sequence[Tensor]:
        last = torch.stack([self._last[request] for request in requests])
        return sample_next(self._network, [request.row for request in requests], last, sampling).split(1)


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that a row is about to commit, and the hidden states that predict them: [tokens, hidden] or one more.

    wanted: how many alternatives are scored with them; None: no log-probabilities.
    """

    row: SequenceState
    tokens: list[int]
    states: Tensor
    wanted: int | None


def score_drafts(
    network: Network,
    outcomes: Sequence[RunnerOutput],
    results: Sequence[Draft | RequestProgress | BaseException],
    finish: Callable[[RunnerOutput, Draft, TokenScores], RequestProgress],
) -> list[RequestProgress | BaseException]:
    """Score all drafts at once and `finish` each; results that are not drafts are passed on."""
    drafts = [draft for draft in results if isinstance(draft, Draft)]
    scores = dict(zip(drafts, apply_batched(drafts, partial(_score, network)), strict=True))

    def finish_one(pair: tuple[RunnerOutput, Draft | RequestProgress | BaseException]) -> RequestProgress:
        outcome, draft = pair
        if isinstance(draft, RequestProgress):
            return draft
        if isinstance(draft, BaseException):
            raise draft
        draft_scores = scores[draft]
        if isinstance(draft_scores, BaseException):
            raise draft_scores
        return finish(outcome, draft, draft_scores)

    return apply_each(zip(outcomes, results, strict=True), finish_one)


def _score(network: Network, drafts: Sequence[Draft]) -> list[TokenScores]:
    """The causal pass's scores of each draft."""
    if not any(draft.tokens for draft in drafts):
        return [TokenScores([], [], []) for _ in drafts]
    states = pad_sequence([draft.states for draft in drafts], batch_first=True)
    rows, tokens, wanted = zip(*((draft.row, draft.tokens, draft.wanted) for draft in drafts), strict=True)
    return score_tokens(network, states, rows, tokens, wanted)


def apply_batched(
    items: Sequence[Item], function: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result | BaseException]:
    """`function` of all items at once; if that fails, of each alone, so that the failing one is found."""
    try:
        return [*function(items)]
    except BaseException as error:
        if is_interrupt(error):
            raise
        failed = error.with_traceback(None)
    if len(items) == 1:
        return [failed]
    return [result for item in items for result in apply_batched([item], function)]


def apply_each(items: Iterable[Item], function: Callable[[Item], Result]) -> list[Result | BaseException]:
    """`function` of each item; an exception, such as an output processor's, takes the place of that item's result."""
    results: list[Result | BaseException] = []
    for item in items:
        try:
            results.append(function(item))
        except BaseException as error:  # whatever an output processor raises is its own request's
            results.append(error)
    return results


def is_interrupt(error: BaseException) -> bool:
    """Whether it is, most likely, a signal's (Ctrl-C) and not the fault of what was running: Python handles signals in
    the main thread."""
    return isinstance(error, KeyboardInterrupt | SystemExit) and threading.current_thread() is threading.main_thread()


def after_step(outcome: RunnerOutput) -> RequestProgress:
    """How a request continues after its canvas's step, if there was one: another step, its draft read, or a commit."""
    request, row = outcome.scheduled.request, outcome.scheduled.request.row
    if outcome.denoised is None:
        return RequestProgress()
    row.draft(outcome.canvas or [], outcome.denoised.step)
    if outcome.canvas is None:
        return RequestProgress(events=[outcome.denoised, *row.release_text(outcome.denoised)])
    if needs_causal_pass(row, canvas_sampling(request)):
        return RequestProgress(events=[outcome.denoised], next_tokens=row.proposal, is_draft=True)
    return RequestProgress(events=[outcome.denoised, *row.commit()], next_tokens=row.new_tokens)


def reads_to_end(scheduled: ScheduledRequest) -> bool:
    """Whether the forward reads the request's context to its end."""
    return scheduled.stop == len(scheduled.request.context)


def reads_draft(scheduled: ScheduledRequest) -> bool:
    """Whether the forward reads a draft, tokens that may still be rejected."""
    return scheduled.request.num_draft_tokens > 0 and reads_to_end(scheduled)


def canvas_sampling(request: Request) -> Sampling:
    """How the canvases of a request are denoised."""
    assert isinstance(request.sampling, Sampling), "only diffusion has canvases"
    return request.sampling
