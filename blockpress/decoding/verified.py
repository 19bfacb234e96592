"""Diffusion with a causal pass over each settled canvas, which verifies it and gives log-probabilities.

    canvas     the cat sat in a hat.       settled: the draft
    greedy     the cat sat on a mat.       what the causal pass would have written after each prefix
    accepted   the cat sat                 up to the first disagreement
    pins       the cat sat on              plus the causal pass's own token there
    redo       the cat sat on ? ????       the rest is denoised again, with new draws, at most `max_verifications` times

The verification is also the commit: where it accepts the whole draft, nothing is read twice. A canvas that ends in full
agreement is what the same weights write by greedy autoregressive decoding; every verification settles at least one more
token. Why the first disagreement is pinned: docs/adr/0014-verified-decoding.md.

Repairs use the same pass in another way: only places whose token it finds unlikely are denoised again, and all others
are held, at most `max_repairs` times (docs/adr/0033-repairs.md).

    canvas     the cat sat in a hat.       settled
    causal     .9  .9  .9 .01 .9 .8        the probability of each token after those before it
    repair     the cat sat ?? a hat.       the others are pins

`verify_draft`, `repair_pins` and `apply_verification` are the policy. They know nothing of pages or batches; this loop
and the engine both call them.

Invariant: without verification and log-probabilities the events are exactly those of `generate`.
Run it:  python -m pytest tests/decoding/test_verified.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from blockpress.config import Sampling
from blockpress.decoding import Cancel, Event, SequenceState, common_prefix
from blockpress.decoding.autoregressive import extend_cache
from blockpress.decoding.denoisers import plain_denoiser
from blockpress.decoding.generate import MakeDenoiser, denoise_canvases, images_of, take
from blockpress.decoding.scoring import LastHidden, TokenScores, causal_forward, gather_last_hidden, score_tokens
from blockpress.diffusion import Draws, KeyedDraws
from blockpress.errors import RequestError
from blockpress.model import Cache, Network


@torch.inference_mode()
def generate_verified(
    network: Network,
    rows: Sequence[SequenceState],
    sampling: Sampling,
    cancel: Cancel | None = None,
    make_draws: Callable[..., Draws] = KeyedDraws,
    make_denoiser: MakeDenoiser = plain_denoiser,
) -> Iterator[Event]:
    """Answer every row's prompt as `generate` does, with a causal pass over each settled canvas before its commit.

    Args:
        sampling: `max_verifications` is the most verifications per canvas, `max_repairs` the most repairs.
        rows, cancel, make_draws, make_denoiser: as in `generate`; rows with `logprobs` get log-probabilities.
    """
    live = take(rows, sampling)
    last, cache = prefill_verified(network, live)
    while True:
        if not (yield from denoise_canvases(network, live, cache, sampling, cancel, make_draws, make_denoiser)):
            return
        proposals = [row.proposal if needs_causal_pass(row, sampling) else [] for row in live]
        states, extended = causal_forward(network, proposals, last, cache)
        wanted = [wanted_alternatives(row, sampling) for row in live]
        scored = score_tokens(network, states, live, proposals, wanted)
        for row, tokens, scores in zip(live, proposals, scored, strict=True):
            yield from apply_verification(row, scores, sampling) if tokens else row.commit()
        unfinished = [i for i, row in enumerate(live) if row.finish_reason is None]
        if not unfinished:
            return
        num_kept = torch.tensor([row.num_kept for row in live], device=network.device)
        last, cache = gather_last_hidden(states, num_kept), extended.until(cache.lengths + num_kept)
        if len(unfinished) < len(live):
            selected = torch.tensor(unfinished, device=network.device)
            live, last, cache = [live[i] for i in unfinished], last[selected], cache.select(selected)
        # What the verification has not committed already.
        last, cache = extend_cache(network, [row.new_tokens for row in live], cache, last)


def prefill_verified(network: Network, rows: Sequence[SequenceState]) -> tuple[LastHidden, Cache]:
    """The hidden state of the last token of every row's prompt, and the KV cache of the prompts."""
    zeros = torch.zeros(len(rows), 1, network.config.hidden_size, dtype=network.dtype, device=network.device)
    return extend_cache(network, [row.prompt for row in rows], network.empty_cache(len(rows)), zeros, images_of(rows))


def needs_causal_pass(row: SequenceState, sampling: Sampling) -> bool:
    """Whether a causal pass must read a row's proposal before its draft can be committed."""
    checks = row.verifications < sampling.max_verifications or len(row.repairs) < sampling.max_repairs
    return bool(row.proposal) and (checks or row.logprobs is not None)


def wanted_alternatives(row: SequenceState, sampling: Sampling) -> int | None:
    """How many alternatives a causal pass over the row's draft is to score; None: not even the draft's own tokens."""
    return 0 if row.logprobs is None and sampling.max_repairs else row.logprobs


def apply_verification(row: SequenceState, scores: TokenScores, sampling: Sampling) -> Iterator[Event]:
    """Commit a row's draft or have it denoised again, whole or in places, by the causal pass's scores of its proposal.

    Afterwards the first `row.num_kept` of the tokens that it read are context, and `row.new_tokens` are yet to be read.
    If the canvas is redone, the one is 0 and the other empty, `row.pins` hold from its first noise on, and a new
    `row.canvas_number` keys its draws.
    """
    verify, proposal, logprobs = row.verifications < sampling.max_verifications, row.proposal, scores.logprobs
    row.count_causal_pass(verification=verify)
    # The output processor may append a token of its own (the end of a thought), which is never verified.
    length = common_prefix(proposal, row.draft_tokens)
    if len(row.repairs) < sampling.max_repairs:
        chances = scores.edited_logprobs or [scored.logprob for scored in scores.logprobs]
        places = _unlikely(row, proposal[:length], chances, sampling)
        if places:
            pins = repair_pins(row.draft_tokens, places, len(proposal))
            row.redo(pins, {(place, proposal[place]) for place in places})
            return
    if verify:
        unchecked = _unchecked(row, proposal[:length], sampling)
        verification = verify_draft(
            proposal[:length], scores.greedy_ids[:length], row.pins, row.stop_ids, row.max_draft_tokens, unchecked
        )
        if verification.num_accepted < length:
            row.correct(verification.tokens)
            logprobs = [
                *logprobs[: verification.num_accepted],
                *scores.greedy_logprobs[verification.num_accepted : verification.num_accepted + 1],
            ]
            if not verification.finished or row.proposal != verification.tokens:
                row.redo(verification.pins)
                return
    yield from row.commit(logprobs)


def _unlikely(row: SequenceState, tokens: Sequence[int], logprobs: Sequence[float], sampling: Sampling) -> list[int]:
    """Places of the draft to repair: tokens that the causal pass finds too unlikely and that no repair has tried."""
    unchecked, least = _unchecked(row, tokens, sampling), math.log(sampling.repair_below)
    given = row.given.pins_on(len(row.answer), len(tokens))
    tried = set().union(*row.repairs)
    return [
        place
        for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=False))
        if logprob < least and not (place in unchecked or place in given or (place, token) in tried)
    ]


def repair_pins(draft: Sequence[int], places: Collection[int], end: int) -> dict[int, int]:
    """The tokens of a draft that hold while some places of it are denoised again.

    `end`: where the answer ends in it. If its last place is among them, the answer may go on: nothing after it holds.

    >>> repair_pins([5, 6, 1, 1], {1}, 3)
    {0: 5, 2: 1, 3: 1}
    >>> repair_pins([5, 6, 1, 1], {2}, 3)
    {0: 5, 1: 6}
    """
    stop = end if end - 1 in places else len(draft)
    return {place: token for place, token in enumerate(draft[:stop]) if place not in places}


def _unchecked(row: SequenceState, tokens: Sequence[int], sampling: Sampling) -> frozenset[int]:
    """Places of a draft outside of the spans that are verified or repaired. RequestError: the rule gives no spans."""
    if sampling.checked_spans is None:
        return frozenset()
    answer, places = row.answer, set(range(len(tokens)))
    spans = sampling.checked_spans([*answer, *tokens])
    try:
        for start, stop in spans:
            places -= set(range(max(0, start - len(answer)), min(len(tokens), stop - len(answer))))
    except (TypeError, ValueError):
        raise RequestError(
            f"sampling.checked_spans gave {spans!r:.80}",
            hint="it must give (start, stop) pairs of places in the answer",
        ) from None
    return frozenset(places)


@dataclass(frozen=True)
class Verification:
    """The outcome of verifying a settled canvas.

    num_accepted: how many of its first tokens are accepted. tokens: these, then the causal pass's own token if it
    disagreed. pins: the tokens that a redo must hold. finished: `tokens` can be committed; nothing is left to redo.
    """

    num_accepted: int
    tokens: list[int]
    pins: dict[int, int]
    finished: bool


def verify_draft(
    tokens: Sequence[int],
    greedy_ids: Sequence[int],
    pins: Mapping[int, int],
    stop_ids: Container[int],
    max_tokens: int,
    unchecked: Container[int] = (),
) -> Verification:
    """Compare a settled canvas with what the causal pass would have written at each of its positions.

    Args:
        tokens: those that count: up to the first stop id or the answer's limits, as the output processor cuts them.
        greedy_ids: for each of them, the causal pass's argmax after the tokens before it.
        pins: positions that are not compared: a pin stands, whether the caller's or from an earlier verification.
        max_tokens: how many positions of the canvas can count; once so many are accepted, nothing is left to redo.
        unchecked: positions that are not compared either, and are not pinned for it.

    >>> verify_draft([5, 6, 7, 8], [5, 6, 9, 8], {}, {1}, 4)
    Verification(num_accepted=2, tokens=[5, 6, 9], pins={0: 5, 1: 6, 2: 9}, finished=False)
    >>> verify_draft([5, 6, 7, 8], [5, 6, 1, 8], {}, {1}, 4)
    Verification(num_accepted=2, tokens=[5, 6, 1], pins={0: 5, 1: 6, 2: 1}, finished=True)
    >>> verify_draft([5, 1], [5, 1], {0: 5}, {1}, 4).finished
    True
    """
    pairs = zip(tokens, greedy_ids, strict=True)
    num_accepted = next(
        (i for i, (token, greedy) in enumerate(pairs) if not (i in pins or i in unchecked or token == greedy)),
        len(tokens),
    )
    accepted = [*tokens[:num_accepted], *greedy_ids[num_accepted : num_accepted + 1]]
    finished = num_accepted == len(tokens) or greedy_ids[num_accepted] in stop_ids or len(accepted) == max_tokens
    return Verification(num_accepted, accepted, {**pins, **dict(enumerate(accepted))}, finished)
