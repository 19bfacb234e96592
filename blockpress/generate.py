"""THE POEM: prompt -> prefill -> (canvas -> denoise -> commit -> text)*

Slow, plain and exact: whatever is faster must give the same tokens. `generate` is the whole idea on one screen; what it
is made of stands in `diffusion/` (the canvas) and `model/` (the network). Who watches gets typed events:

    Denoised    one step: the argmax canvas, what was accepted, the entropies          many a canvas
    Committed   a finished canvas: its tokens and how many steps it took               one a canvas
    Text        text that will not change any more (with a tokenizer)                  joined, they are `Reply.text`
    Done        the reply                                                              one a row

Invariant: a row's events are a function of (weights, prompt, seed, sampling), never of the other rows.
Run it:  blockpress run sudoku-nano "$(blockpress sudoku --random 1 --givens 40 --puzzle-only)"
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from blockpress.config import Sampling
from blockpress.diffusion import (
    Denoiser,
    Draws,
    EntropyBound,
    KeyedDraws,
    Reading,
    Schedule,
    StableAndConfident,
    denoise,
)
from blockpress.model import Cache, Network
from blockpress.ops import vocabulary
from blockpress.reply import Cancel, Committed, Done, Event, Row, Text, denoised
from blockpress.shapes import Canvas, Signal


@torch.inference_mode()
def generate(
    network: Network,
    rows: Sequence[Row],
    sampling: Sampling,
    cancel: Cancel | None = None,
    keyed: Callable[..., Draws] = KeyedDraws,
) -> Iterator[Event]:
    """Answer every row's prompt, canvas by canvas; events come in the order of time, tagged with their row's index.

    Args:
        rows: prompts with their seeds, stop rules and limits; each fills up as it is answered.
        cancel: asked between steps; once it is set, every row still under way ends as "cancelled".
        keyed: where random tokens come from; tests hand in recorded ones.
    """
    config, live = network.config, list(rows)
    schedule = Schedule(steps=sampling.steps, t_min=sampling.t_min, t_max=sampling.t_max)
    accept, settle = EntropyBound(sampling.entropy_bound), StableAndConfident(sampling.stability, sampling.confidence)
    cache = read(network, [row.prompt for row in live], network.empty_cache(len(live)))  # prefill
    while True:
        seeds, numbers = [row.seed for row in live], [len(row.canvases) for row in live]
        draws = keyed(seeds, numbers, length=config.canvas_length, vocab=config.vocab_size, device=network.device)
        for step in denoise(plain_denoiser(network, cache), draws, len(live), schedule, accept, settle):
            for place, row in enumerate(live[i] for i in step.rows.tolist()):
                row.draft(step.argmax[place].tolist(), step.number)
                yield denoised(row, place, step)
            if cancel is not None and cancel.is_set():
                for row in live:
                    yield from row.cancel()
                return
        for row in live:
            tokens, text = row.commit()
            yield Committed(row.index, len(row.canvases) - 1, tokens, row.canvases[-1].steps)
            if text:
                yield Text(row.index, text)
            if row.finish_reason is not None:
                yield Done(row.index, row.reply())
        going = [place for place, row in enumerate(live) if row.finish_reason is None]
        if not going:
            return
        live = [live[place] for place in going]
        cache = read(network, [row.canvases[-1].tokens for row in live], cache.select(torch.tensor(going)))  # commit


def read(network: Network, tokens: Sequence[list[int]], cache: Cache) -> Cache:
    """The causal pass over one list of tokens a row, short ones padded: prefill and commit."""
    padded, counts = pad(network, tokens)
    return network.read(padded, cache, counts)[1]


def plain_denoiser(network: Network, cache: Cache) -> Denoiser:
    """A denoiser that computes its reading from full logits."""
    kept: list[tuple[int, Cache]] = [(len(cache.lengths), cache)]

    def reading(
        rows: Int[Tensor, " rows"],
        step: int,
        canvas: Canvas,
        signal: Signal | None,
        temperature: Float32[Tensor, ""],
        draws: Draws,
    ) -> Reading:
        if len(rows) != kept[0][0]:  # rows only ever leave, so as many rows are the same rows
            kept[0] = (len(rows), cache.select(rows))
        logits = network.logits(network.denoise(canvas, kept[0][1], signal))
        scaled = logits / temperature.to(logits.device)
        return Reading(
            argmax=scaled.argmax(-1),
            sample=draws.sample(rows, step, scaled),
            entropy=vocabulary.entropy(scaled),
            signal=network.soft_embedding(scaled),
        )

    return reading


@torch.inference_mode()
def autoregress(
    network: Network, prompts: Sequence[list[int]], stop_ids: Collection[int], max_tokens: int
) -> list[list[int]]:
    """The same weights as a language model: the likeliest next token, one causal pass each, up to a stop id.

    Returns:
        the tokens behind each prompt, the stop id included, at most `max_tokens` of them.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    fresh, cache = list(prompts), network.empty_cache(len(prompts))
    for _ in range(max_tokens):
        padded, counts = pad(network, fresh)
        hidden, cache = network.read(padded, cache, counts)
        last = hidden[torch.arange(len(going)), counts - 1][:, None]
        best = network.logits(last)[:, 0].argmax(-1).tolist()
        for row, token in zip(going, best, strict=True):
            answers[row].append(token)
        kept = [place for place, token in enumerate(best) if token not in stop_ids]
        if not kept:
            break
        going, fresh = [going[place] for place in kept], [[best[place]] for place in kept]
        cache = cache.select(torch.tensor(kept))
    return answers


def pad(network: Network, tokens: Sequence[list[int]]) -> tuple[Int[Tensor, "batch length"], Int[Tensor, " batch"]]:
    """Lists of tokens as one right-padded tensor, and how many of each row are real."""
    counts = torch.tensor([len(row) for row in tokens], device=network.device)
    padded = torch.zeros(len(tokens), int(counts.max()), dtype=torch.long, device=network.device)
    for place, row in enumerate(tokens):
        padded[place, : len(row)] = torch.tensor(row, device=network.device)
    return padded, counts
