"""The reference loop: prompt -> prefill -> (canvas -> denoise -> commit -> text)*

Slow, plain and exact: whatever is faster must give the same tokens. `generate` is the whole idea on one screen; what it
is made of stands in `diffusion/` (the canvas) and `model/` (the network). Who watches gets typed events:

    Denoised    one step: the argmax canvas, what was accepted, the entropies          many a canvas
    Committed   a finished canvas: its tokens and how many steps it took               one a canvas
    Text        text that will not change any more (with a tokenizer)                  joined, they are `Reply.text`
    ReasoningDelta, ToolCallEvent, MalformedToolCallEvent      the rest of a chat's turn
    Done        the reply                                                              one a row

What is special to a row (its limits, stops, thinking budget, banned and pinned tokens, whether a canvas is begun again)
is the row's own matter (`decoding/sequence.py`): the loop asks it what to draw and what to commit.

Invariant: a row's events are a function of (weights, prompt, seed, sampling), never of the other rows.
Run it:  blockpress run sudoku-nano "$(blockpress sudoku --random 1 --givens 40 --puzzle-only)"
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from blockpress.config import Sampling
from blockpress.decoding import Cancel, Event, SequenceState, denoised_event
from blockpress.diffusion import (
    Denoiser,
    DenoiserOutput,
    Draws,
    KeyedDraws,
    Pins,
    Schedule,
    TokenMask,
    denoise,
    step_rules,
)
from blockpress.model import Cache, Images, Network
from blockpress.ops import vocabulary
from blockpress.ops.transfer import to_device
from blockpress.shapes import Canvas, Signal


@torch.inference_mode()
def generate(
    network: Network,
    rows: Sequence[SequenceState],
    sampling: Sampling,
    cancel: Cancel | None = None,
    keyed: Callable[..., Draws] = KeyedDraws,
    denoiser: Callable[[Network, Cache], Denoiser] | None = None,
) -> Iterator[Event]:
    """Answer every row's prompt, canvas by canvas; events come in the order of time, tagged with their row's index.

    Args:
        rows: prompts with their seeds, stop rules and limits; each fills up as it is answered.
        cancel: asked between steps; once it is set, every row still under way ends as "cancelled".
        keyed: where random tokens come from; tests hand in recorded ones.
        denoiser: what reads a canvas over a context; None: `plain_denoiser`. Others must give the same tokens.
    """
    live = list(rows)
    cache = prefill(network, live)
    while True:
        if not (yield from denoise_canvases(network, live, cache, sampling, cancel, keyed, denoiser)):
            return
        for row in live:
            yield from row.commit()
        going = [place for place, row in enumerate(live) if row.finish_reason is None]
        if not going:
            return
        if len(going) < len(live):
            live, cache = [live[place] for place in going], cache.select(torch.tensor(going))
        cache = commit_tokens(network, [row.new_tokens for row in live], cache)  # commit


def denoise_canvases(
    network: Network,
    live: Sequence[SequenceState],
    cache: Cache,
    sampling: Sampling,
    cancel: Cancel | None,
    keyed: Callable[..., Draws],
    denoiser: Callable[[Network, Cache], Denoiser] | None,
) -> Generator[Event, None, bool]:
    """One canvas for every row, left in it as its draft. False: all was cancelled on the way, and told so."""
    length, device = network.config.canvas_length, network.device
    schedule, (accept, settle) = Schedule.of(sampling), step_rules(sampling)
    seeds, numbers = [row.seed for row in live], [row.canvas_number for row in live]
    draws = keyed(seeds, numbers, length=length, vocab=network.config.vocab_size, device=device)
    edits = TokenMask.of([row.banned_ids for row in live], length, device)
    pins = Pins.of([row.pins for row in live], length, network.embed, device)
    reading = (denoiser or plain_denoiser)(network, cache)
    for step in denoise(reading, draws, len(live), schedule, accept, settle, edits, pins):
        for place, row in enumerate(live[i] for i in step.rows.tolist()):
            row.draft(step.argmax[place].tolist(), step.number)
            yield denoised_event(row, place, step)
        if cancel is not None and cancel.is_set():
            for row in live:
                yield from row.cancel()
            return False
    return True


def prefill(network: Network, rows: Sequence[SequenceState]) -> Cache:
    """The context of every row's prompt, its pictures included."""
    padded, counts = pad(network, [row.prompt for row in rows])
    return network.read(padded, network.empty_cache(len(rows)), counts, images_of(rows))[1]


def images_of(rows: Sequence[SequenceState]) -> Images | None:
    """What the rows' prompts show; None where they are all of text."""
    return [row.images for row in rows] if any(row.images for row in rows) else None


def commit_tokens(network: Network, tokens: Sequence[list[int]], cache: Cache) -> Cache:
    """The causal pass over one list of tokens a row, short ones padded: the commit.

    A row without tokens keeps its context; where none has any, no forward is run.
    """
    if not any(tokens):
        return cache
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
        edits: TokenMask | None = None,
    ) -> DenoiserOutput:
        if len(rows) != kept[0][0]:  # rows only ever leave, so as many rows are the same rows
            kept[0] = (len(rows), cache.select(rows))
        logits = network.logits(network.denoise(canvas, kept[0][1], signal))
        scaled = logits / temperature.to(logits.device)
        if edits is not None:
            scaled = edits(rows, scaled)
        return DenoiserOutput(
            argmax=scaled.argmax(-1),
            sample=draws.sample(rows, step, scaled),
            entropy=vocabulary.entropy(scaled),
            signal=network.soft_embedding(scaled),
        )

    return reading


def pad(network: Network, tokens: Sequence[list[int]]) -> tuple[Int[Tensor, "batch length"], Int[Tensor, " batch"]]:
    """Lists of tokens as one right-padded tensor, and how many of each row are real."""
    counts = [len(row) for row in tokens]
    longest = max(counts)
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], dtype=torch.long)
    return to_device(padded, network.device), to_device(torch.tensor(counts), network.device)
