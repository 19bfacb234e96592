"""The same weights as a language model: prompt -> prefill -> (next token -> causal pass -> text)*

Gemma 4 decodes only this way; DiffusionGemma's weights also run this way, which is the baseline for its diffusion. The
caller gets the events of `generate` except `Denoised`: a token is a canvas of one, committed as soon as it is chosen.

    forward   1: the prompt    2: t1    3: t2    ...        each forward reads one token and chooses the next
    token        t1               t2       t3

Everything specific to one row (limits, stops, thinking budget, banned tokens) is kept in the row, as in `generate`.

Invariant: a row's events are a function of (weights, prompt, seed, sampling), never of the other rows; `forwards` in
its usage counts the forwards that read tokens of the row, including the prompt's.
Run it:  python -m pytest tests/decoding/test_autoregressive.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from blockpress.config import AutoregressiveSampling
from blockpress.decoding import Cancel, Done, Event, SequenceState
from blockpress.decoding.edits import causal_changes, truncation_of
from blockpress.decoding.generate import images_of, pad, take
from blockpress.decoding.scoring import LastHidden, TokenScores, causal_forward, score_tokens
from blockpress.diffusion import KeyedDraws, TokenMask
from blockpress.diffusion.pins import UNPINNED
from blockpress.model import Cache, Images, Network
from blockpress.ops.transfer import to_device

GREEDY = AutoregressiveSampling()


@torch.inference_mode()
def generate_autoregressive(
    network: Network,
    rows: Sequence[SequenceState],
    sampling: AutoregressiveSampling = GREEDY,
    cancel: Cancel | None = None,
) -> Iterator[Event]:
    """Answer every row's prompt, token by token. Events come in chronological order, tagged with their row's index.

    Args:
        rows: prompts with their seeds, stop rules and limits, made with `canvas_length=1`; no two share an index.
        sampling: how a token is chosen. Its stop texts are left to the rows' output processors.
        cancel: checked before every forward; once it is set, every unfinished row ends as "cancelled".
    """
    live, forwards = take(rows, sampling), Counter[int]()
    new_tokens, images = [row.prompt for row in live], images_of(live)
    cache = network.empty_cache(len(live))
    last = torch.empty(len(live), 1, network.config.hidden_size, dtype=network.dtype, device=network.device)
    while True:
        if cancel is not None and cancel.is_set():
            for row in live:
                yield from with_usage(row.cancel(), forwards)
            return
        last, cache = extend_cache(network, new_tokens, cache, last, images)
        forwards.update(row.index for row, tokens in zip(live, new_tokens, strict=True) if tokens)
        for row, token in zip(live, sample_next(network, live, last, sampling).tolist(), strict=True):
            row.draft([token], steps=0)
        scores, proposals = score_proposals(network, live, last, cache)
        forwards.update(row.index for row, tokens in zip(live, proposals, strict=True) if len(tokens) > 1)
        for row, token_scores in zip(live, scores, strict=True):
            yield from with_usage(row.commit(token_scores.logprobs), forwards)
        unfinished = [i for i, row in enumerate(live) if row.finish_reason is None]
        if not unfinished:
            return
        live, new_tokens, images = [live[i] for i in unfinished], [live[i].new_tokens for i in unfinished], None
        if len(unfinished) < len(last):
            selected = torch.tensor(unfinished, device=network.device)
            cache, last = cache.select(selected), last[selected]


def extend_cache(
    network: Network, tokens: Sequence[list[int]], cache: Cache, last: Tensor, images: Images | None = None
) -> tuple[Tensor, Cache]:
    """The causal pass over one list of tokens per row.

    Returns:
        the hidden state of each row's last token, [rows, 1, hidden], and the extended cache. A row without tokens,
        which chooses its next token again, keeps its hidden state in `last`.
    """
    if not any(tokens):
        return last, cache
    padded, counts = pad(network, tokens)
    hidden, cache = network.read(padded, cache, counts, images)
    index = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
    return torch.where((counts > 0)[:, None, None], hidden.gather(1, index), last), cache


def sample_next(
    network: Network, rows: Sequence[SequenceState], last: LastHidden, sampling: AutoregressiveSampling
) -> Int[Tensor, " rows"]:
    """The next token of each row, from the hidden state of its last token; on a GPU this does not wait for it.

    A draw is keyed by (seed, number of the token, how often it was redone), so it does not depend on other rows.
    """
    logits = network.logits(last)
    all_rows = torch.arange(len(rows), device=network.device)
    token_mask = TokenMask.of([row.banned_ids for row in rows], 1, network.device)
    if token_mask is not None:
        logits = token_mask(all_rows, logits)
    for place, row in enumerate(rows):
        if row.constraint is not None:
            allowed = to_device(row.constraint.allowed(row.max_later_tokens), network.device)
            logits[place] = logits[place].masked_fill(~allowed, float("-inf"))
    scaled = logits / (sampling.temperature or 1.0)
    heat = torch.full((1,), sampling.temperature or 1.0, device=network.device)
    for place, row in enumerate(rows if sampling.edits_logits else ()):
        changes = causal_changes(row, [UNPINNED], network.config.vocab_size, network.device)
        scaled[place] = scaled[place] if changes is None else changes.added(scaled[place], heat)
    if sampling.temperature == 0:
        return scaled[:, 0].argmax(-1)
    truncation = truncation_of(sampling)
    scaled = scaled if truncation is None else truncation(scaled)
    seeds, numbers = [row.seed for row in rows], [row.canvas_number for row in rows]
    draws = KeyedDraws(seeds, numbers, length=1, vocab=network.config.vocab_size, device=network.device)
    return draws.sample(all_rows, 0, scaled)[:, 0]


def score_proposals(
    network: Network, rows: Sequence[SequenceState], last: Tensor, cache: Cache
) -> tuple[list[TokenScores], list[list[int]]]:
    """The causal pass's scores of the tokens that each row is about to commit, and those tokens; none for a row without
    `logprobs`.

    It costs a forward only if an output processor replaces the drawn token with several: the second follows from the
    first.
    """
    proposals = [[] if row.logprobs is None else row.proposal for row in rows]
    states, _ = causal_forward(network, [tokens[:-1] for tokens in proposals], last, cache)
    return score_tokens(network, states, rows, proposals), proposals


def with_usage(events: Iterator[Event], forwards: Counter[int]) -> Iterator[Event]:
    """The events, with the usage in a reply counted in tokens: no canvases, no steps, the forwards of the row."""
    for event in events:
        if isinstance(event, Done):
            usage, count = event.reply.usage, forwards[event.row]
            per_forward = usage.completion_tokens / count if count else 0.0
            usage = replace(usage, canvases=0, steps=0, forwards=count, tokens_per_forward=per_forward)
            event = replace(event, reply=replace(event.reply, usage=usage))
        yield event
