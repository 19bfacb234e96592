"""Diffusion with a causal pass over each settled canvas, which verifies it and gives log-probabilities.

    canvas     the cat sat in a hat.       settled: the draft
    greedy     the cat sat on a mat.       what the causal pass would have written after each prefix
    accepted   the cat sat                 up to the first disagreement
    pins       the cat sat on              plus the causal pass's own token there
    redo       the cat sat on ? ????       the rest is denoised again, with new draws, at most `max_verifications` times

The verification is also the commit: where it accepts the whole draft, nothing is read twice. A canvas that ends in full
agreement is what the same weights write by greedy autoregressive decoding; every verification settles at least one more
token. Why the first disagreement is pinned: docs/adr/0014-verified-decoding.md.

`verify_draft` and `apply_verification` are the policy. They know nothing of pages or batches; this loop and the engine
both call them.

Invariant: without verification and log-probabilities the events are exactly those of `generate`.
Run it:  python -m pytest tests/decoding/test_verified.py
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from blockpress.config import Sampling
from blockpress.decoding import Cancel, Event, SequenceState, common_prefix
from blockpress.decoding.autoregressive import extend_cache
from blockpress.decoding.denoisers import plain_denoiser
from blockpress.decoding.generate import MakeDenoiser, denoise_canvases, images_of
from blockpress.decoding.scoring import LastHidden, TokenScores, causal_forward, gather_last_hidden, score_tokens
from blockpress.diffusion import Draws, KeyedDraws
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
        sampling: `max_verifications` is the most verifications per canvas.
        rows, cancel, make_draws, make_denoiser: as in `generate`; rows with `logprobs` get log-probabilities.
    """
    live = list(rows)
    last, cache = prefill_verified(network, live)
    while True:
        if not (yield from denoise_canvases(network, live, cache, sampling, cancel, make_draws, make_denoiser)):
            return
        proposals = [row.proposal if needs_causal_pass(row, sampling.max_verifications) else [] for row in live]
        states, extended = causal_forward(network, proposals, last, cache)
        for row, tokens, scores in zip(live, proposals, score_tokens(network, states, live, proposals), strict=True):
            yield from apply_verification(row, scores, sampling.max_verifications) if tokens else row.commit()
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


def needs_causal_pass(row: SequenceState, max_verifications: int) -> bool:
    """Whether a causal pass must read a row's proposal before its draft can be committed."""
    return bool(row.proposal) and (row.verifications < max_verifications or row.logprobs is not None)


def apply_verification(row: SequenceState, scores: TokenScores, max_verifications: int) -> Iterator[Event]:
    """Commit a row's draft or have the canvas redone, by the causal pass's scores of the row's proposal.

    Afterwards the first `row.num_kept` of the tokens that it read are context, and `row.new_tokens` are yet to be read.
    If the canvas is redone, the one is 0 and the other empty, `row.pins` hold from its first noise on, and a new
    `row.canvas_number` keys its draws.
    """
    verify, proposal, logprobs = row.verifications < max_verifications, row.proposal, scores.logprobs
    row.count_causal_pass(verification=verify)
    if verify:
        # The output processor may append a token of its own (the end of a thought), which is never verified.
        length = common_prefix(proposal, row.draft_tokens)
        verification = verify_draft(
            proposal[:length], scores.greedy_ids[:length], row.pins, row.stop_ids, row.max_draft_tokens
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
) -> Verification:
    """Compare a settled canvas with what the causal pass would have written at each of its positions.

    Args:
        tokens: those that count: up to the first stop id or the answer's limits, as the output processor cuts them.
        greedy_ids: for each of them, the causal pass's argmax after the tokens before it.
        pins: positions that are not compared: a pin stands, whether the caller's or from an earlier verification.
        max_tokens: how many positions of the canvas can count; once so many are accepted, nothing is left to redo.

    >>> verify_draft([5, 6, 7, 8], [5, 6, 9, 8], {}, {1}, 4)
    Verification(num_accepted=2, tokens=[5, 6, 9], pins={0: 5, 1: 6, 2: 9}, finished=False)
    >>> verify_draft([5, 6, 7, 8], [5, 6, 1, 8], {}, {1}, 4)
    Verification(num_accepted=2, tokens=[5, 6, 1], pins={0: 5, 1: 6, 2: 1}, finished=True)
    >>> verify_draft([5, 1], [5, 1], {0: 5}, {1}, 4).finished
    True
    """
    pairs = zip(tokens, greedy_ids, strict=True)
    num_accepted = next(
        (i for i, (token, greedy) in enumerate(pairs) if i not in pins and token != greedy), len(tokens)
    )
    accepted = [*tokens[:num_accepted], *greedy_ids[num_accepted : num_accepted + 1]]
    finished = num_accepted == len(tokens) or greedy_ids[num_accepted] in stop_ids or len(accepted) == max_tokens
    return Verification(num_accepted, accepted, {**pins, **dict(enumerate(accepted))}, finished)
