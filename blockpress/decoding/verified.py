"""Diffusion that the causal pass looks at: it checks settled canvases, and gives log-probabilities.

    canvas     the cat sat in a hat.       settled
    expected   the cat sat on a mat.       what the causal pass would have written behind each token before
    agreed     the cat sat                 up to the first disagreement
    pins       the cat sat on              and there the causal pass's own token
    again      the cat sat on ? ????       the rest is denoised again, under fresh draws, at most `checks` times

The pass that checks is the commit, too: where it agrees with all that counts, nothing is read twice. A canvas that
ends in agreement is what the same weights write token by token, greedily; every check proves at least one token more.
Why the first disagreement is pinned: docs/adr/0014-verified-decoding.md.

`verify_draft` and `apply_verification` are the policy. They know neither pages nor batches: whoever runs the passes
calls them.

Invariant: without checks and log-probabilities the events are those of `generate`, one by one.
Run it:  python -m pytest tests/decoding/test_verified.py
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from blockpress.config import Sampling
from blockpress.decoding import Cancel, Event, SequenceState, common_prefix
from blockpress.decoding.autoregressive import extend_cache
from blockpress.decoding.generate import denoise_canvases, images_of
from blockpress.decoding.scoring import Last, TokenScores, causal_forward, gather_last_hidden, score_tokens
from blockpress.diffusion import Denoiser, Draws, KeyedDraws
from blockpress.model import Cache, Network


@torch.inference_mode()
def generate_verified(
    network: Network,
    rows: Sequence[SequenceState],
    sampling: Sampling,
    cancel: Cancel | None = None,
    keyed: Callable[..., Draws] = KeyedDraws,
    denoiser: Callable[[Network, Cache], Denoiser] | None = None,
) -> Iterator[Event]:
    """Answer every row's prompt as `generate` does, the causal pass looking at each settled canvas before its commit.

    Args:
        sampling: `checks` says how often at most a canvas is checked.
        rows, cancel, keyed, denoiser: as in `generate`; a row's `logprobs` are told.
    """
    live = list(rows)
    last, cache = prefill_verified(network, live)
    while True:
        if not (yield from denoise_canvases(network, live, cache, sampling, cancel, keyed, denoiser)):
            return
        asked = [row.proposal if needs_causal_pass(row, sampling.checks) else [] for row in live]
        states, seen = causal_forward(network, asked, last, cache)
        for row, tokens, judged in zip(live, asked, score_tokens(network, states, live, asked), strict=True):
            yield from apply_verification(row, judged, sampling.checks) if tokens else row.commit()
        going = [place for place, row in enumerate(live) if row.finish_reason is None]
        if not going:
            return
        kept = torch.tensor([row.num_kept for row in live], device=network.device)
        last, cache = gather_last_hidden(states, kept), seen.until(cache.lengths + kept)
        if len(going) < len(live):
            chosen = torch.tensor(going, device=network.device)
            live, last, cache = [live[place] for place in going], last[chosen], cache.select(chosen)
        last, cache = extend_cache(
            network, [row.new_tokens for row in live], cache, last
        )  # what a check has not committed


def prefill_verified(network: Network, rows: Sequence[SequenceState]) -> tuple[Last, Cache]:
    """The context of every row's prompt, and the hidden state of its last token."""
    nothing = torch.zeros(len(rows), 1, network.config.hidden_size, dtype=network.dtype, device=network.device)
    return extend_cache(network, [row.prompt for row in rows], network.empty_cache(len(rows)), nothing, images_of(rows))


def needs_causal_pass(row: SequenceState, checks: int) -> bool:
    """Whether the causal pass must read a row's proposal before it is known what becomes of its draft."""
    return bool(row.proposal) and (row.checks < checks or row.logprobs is not None)


def apply_verification(row: SequenceState, judged: TokenScores, checks: int) -> Iterator[Event]:
    """The causal pass has read a row's proposal: what it says makes of the draft a commit, or a canvas denoised again.

    Afterwards `row.num_kept` of the tokens that it read are context, and `row.new_tokens` are still to be read. Where
    the canvas is denoised again both are empty, `row.pins` hold from its first noise on, and `row.canvas_number` keys
    its draws.
    """
    check, proposal, said = row.checks < checks, row.proposal, judged.logprobs
    row.count_causal_pass(check=check)
    if check:
        # A turn may put a token of its own behind the canvas's (the end of a thought); nobody may overrule that.
        own = common_prefix(proposal, row.drafted)
        found = verify_draft(proposal[:own], judged.greedy_ids[:own], row.pins, row.stop_ids, row.max_draft_tokens)
        if found.num_accepted < own:
            row.correct(found.tokens)
            said = [*said[: found.num_accepted], *judged.greedy_logprobs[found.num_accepted : found.num_accepted + 1]]
            if not found.finished or row.proposal != found.tokens:
                row.redo(found.pins)
                return
    yield from row.commit(said)


@dataclass(frozen=True)
class Verification:
    """What a check makes of a settled canvas.

    agreed: its tokens that stand, from the first on. tokens: these, and behind them the causal pass's own where it
    disagreed. pins: what the next round must hold. finished: nothing is open; `tokens` are to be committed.
    """

    num_accepted: int
    tokens: list[int]
    pins: dict[int, int]
    finished: bool


def verify_draft(
    tokens: Sequence[int],
    expected: Sequence[int],
    pinned: Mapping[int, int],
    stop_ids: Container[int],
    most: int,
) -> Verification:
    """Compare a settled canvas with what the causal pass would have written at each of its places.

    Args:
        tokens: those that count: up to the first stop id, the limits of the answer, and what its turn keeps.
        expected: for each of them the causal pass's argmax behind the tokens before it.
        pinned: places that are not compared: a pin stands, be it the caller's or of an earlier check.
        most: places of a canvas that can count; behind so many tokens nothing is open.

    >>> verdict([5, 6, 7, 8], [5, 6, 9, 8], {}, {1}, 4)
    Verification(agreed=2, tokens=[5, 6, 9], pins={0: 5, 1: 6, 2: 9}, finished=False)
    >>> verdict([5, 6, 7, 8], [5, 6, 1, 8], {}, {1}, 4)
    Verification(agreed=2, tokens=[5, 6, 1], pins={0: 5, 1: 6, 2: 1}, finished=True)
    >>> verdict([5, 1], [5, 1], {0: 5}, {1}, 4).finished
    True
    """
    places = zip(tokens, expected, strict=True)
    agreed = next((i for i, (own, best) in enumerate(places) if i not in pinned and own != best), len(tokens))
    stands = [*tokens[:agreed], *expected[agreed : agreed + 1]]
    closed = agreed == len(tokens) or expected[agreed] in stop_ids or len(stands) == most
    return Verification(agreed, stands, {**pinned, **dict(enumerate(stands))}, closed)
