"""The same weights as a language model: prompt -> prefill -> (next token -> causal pass -> text)*

Gemma 4 knows nothing else; DiffusionGemma's weights run this way too, and that is what its diffusion is measured
against. Who watches gets the events of `generate`, but for `Denoised`: a token is a canvas of one, committed as soon
as it is chosen.

    forward   1: the prompt    2: t1    3: t2    ...        each forward reads one token and chooses the next
    token        t1               t2       t3

What is special to a row (limits, stops, thinking budget, banned tokens) is the row's own matter, as in `generate`.

Invariant: a row's events are a function of (weights, prompt, seed, sampling), never of the other rows; `forwards` in
its usage counts the forwards that read tokens of the row, the prompt's included.
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
from blockpress.decoding.generate import images_of, pad
from blockpress.decoding.scoring import Last, TokenScores, causal_forward, score_tokens
from blockpress.diffusion import KeyedDraws, TokenMask
from blockpress.model import Cache, Images, Network
from blockpress.ops.nucleus import keep_top_k, keep_top_p

GREEDY = AutoregressiveSampling()


@torch.inference_mode()
def generate_autoregressive(
    network: Network,
    rows: Sequence[SequenceState],
    sampling: AutoregressiveSampling = GREEDY,
    cancel: Cancel | None = None,
) -> Iterator[Event]:
    """Answer every row's prompt, token by token; events come in the order of time, tagged with their row's index.

    Args:
        rows: prompts with their seeds, stop rules and limits, made with `canvas_length=1`; each row's index is its own.
        sampling: how a token is chosen. Its stop texts are the matter of the rows' turns.
        cancel: asked before every forward; once it is set, every row still under way ends as "cancelled".
    """
    live, forwards = list(rows), Counter[int]()
    fresh, images = [row.prompt for row in live], images_of(live)
    cache = network.empty_cache(len(live))
    last = torch.empty(len(live), 1, network.config.hidden_size, dtype=network.dtype, device=network.device)
    while True:
        if cancel is not None and cancel.is_set():
            for row in live:
                yield from with_usage(row.cancel(), forwards)
            return
        last, cache = extend_cache(network, fresh, cache, last, images)
        forwards.update(row.index for row, tokens in zip(live, fresh, strict=True) if tokens)
        for row, token in zip(live, sample_next(network, live, last, sampling).tolist(), strict=True):
            row.draft([token], steps=0)
        told, asked = score_proposals(network, live, last, cache)
        forwards.update(row.index for row, tokens in zip(live, asked, strict=True) if len(tokens) > 1)
        for row, judged in zip(live, told, strict=True):
            yield from with_usage(row.commit(judged.logprobs), forwards)
        going = [place for place, row in enumerate(live) if row.finish_reason is None]
        if not going:
            return
        live, fresh, images = [live[place] for place in going], [live[place].new_tokens for place in going], None
        if len(going) < len(last):
            kept = torch.tensor(going, device=network.device)
            cache, last = cache.select(kept), last[kept]


def extend_cache(
    network: Network, fresh: Sequence[list[int]], cache: Cache, last: Tensor, images: Images | None = None
) -> tuple[Tensor, Cache]:
    """The causal pass over one list of tokens a row: the hidden state of each row's last token, [rows, 1, hidden].

    A row without tokens, which chooses its next token once more, keeps the hidden state that it had in `last`.
    """
    if not any(fresh):
        return last, cache
    padded, counts = pad(network, fresh)
    hidden, cache = network.read(padded, cache, counts, images)
    place = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
    return torch.where((counts > 0)[:, None, None], hidden.gather(1, place), last), cache


def sample_next(
    network: Network, rows: Sequence[SequenceState], last: Last, sampling: AutoregressiveSampling
) -> Int[Tensor, " rows"]:
    """The next token of each row, from the hidden state of its last one; on a GPU nobody waits for it here.

    A draw is keyed by (seed, number of the token, how often it was begun again), so it is the row's own.
    """
    logits = network.logits(last)
    every = torch.arange(len(rows), device=network.device)
    edits = TokenMask.of([row.banned_ids for row in rows], 1, network.device)
    if edits is not None:
        logits = edits(every, logits)
    if sampling.temperature == 0:
        return logits[:, 0].argmax(-1)
    scaled = logits / sampling.temperature
    if sampling.top_k is not None:
        scaled = keep_top_k(scaled, sampling.top_k)
    if sampling.top_p < 1:
        scaled = keep_top_p(scaled, sampling.top_p)
    seeds, numbers = [row.seed for row in rows], [row.canvas_number for row in rows]
    draws = KeyedDraws(seeds, numbers, length=1, vocab=network.config.vocab_size, device=network.device)
    return draws.sample(every, 0, scaled)[:, 0]


def score_proposals(
    network: Network, rows: Sequence[SequenceState], last: Tensor, cache: Cache
) -> tuple[list[TokenScores], list[list[int]]]:
    """What the causal pass says of what each row is about to commit, and those tokens; nothing where a row tells none.

    It costs no forward but where a turn puts tokens of its own in place of the drawn one: the second of them follows
    from the first.
    """
    asked = [[] if row.logprobs is None else row.proposal for row in rows]
    states, _ = causal_forward(network, [tokens[:-1] for tokens in asked], last, cache)
    return score_tokens(network, states, rows, asked), asked


def with_usage(events: Iterator[Event], forwards: Counter[int]) -> Iterator[Event]:
    """The events, the usage in a reply counted in tokens: no canvases, no steps, the forwards of the row."""
    for event in events:
        if isinstance(event, Done):
            usage, made = event.reply.usage, forwards[event.row]
            each = usage.completion_tokens / made if made else 0.0
            usage = replace(usage, canvases=0, steps=0, forwards=made, tokens_per_forward=each)
            event = replace(event, reply=replace(event.reply, usage=usage))
        yield event
