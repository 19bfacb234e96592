"""The reference loop: prompt -> prefill -> (canvas -> denoise -> commit -> text)*

Slow, plain and exact: everything faster must give the same tokens. `generate` is the whole idea on one screen; its
parts are in `diffusion/` (the canvas) and `model/` (the network). The caller gets typed events:

    Denoised    one step: the argmax canvas, which positions were accepted, entropies  many per canvas
    Committed   a finished canvas: its tokens and the number of steps it took          one per canvas
    Text        text that is final (only with a tokenizer)                             joined, they are `Reply.text`
    ReasoningDelta, ToolCallEvent, MalformedToolCallEvent      the other parts of a chat answer
    Done        the reply                                                              one per row

Everything specific to one row (limits, stops, thinking budget, banned and pinned tokens, whether a canvas is restarted)
is kept in its `SequenceState`; the loop only asks it what to draw and what to commit.

Invariant: a row's events are a function of (weights, prompt, seed, sampling), never of the other rows.
Run it:  blockpress run sudoku-nano "$(blockpress sudoku --random 1 --givens 40 --puzzle-only)"
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from blockpress.config import LogitEdits, Sampling
from blockpress.constrain import CanvasConstraint
from blockpress.decoding import Cancel, Denoised, Event, SequenceState
from blockpress.decoding.denoisers import plain_denoiser
from blockpress.decoding.edits import canvas_changes, truncation_of
from blockpress.diffusion import (
    Denoiser,
    Draws,
    KeyedDraws,
    Pins,
    Schedule,
    Step,
    TokenMask,
    denoise,
    given_tokens,
    step_rules,
)
from blockpress.diffusion.pins import UNPINNED
from blockpress.model import Cache, Images, Network
from blockpress.ops.nucleus import Truncation
from blockpress.ops.transfer import to_device
from blockpress.ops.vocabulary import LogitChanges

MakeDenoiser = Callable[
    [Network, Cache, Sequence[CanvasConstraint | None], Sequence[LogitChanges | None], Truncation | None], Denoiser
]


@torch.inference_mode()
def generate(
    network: Network,
    rows: Sequence[SequenceState],
    sampling: Sampling,
    cancel: Cancel | None = None,
    make_draws: Callable[..., Draws] = KeyedDraws,
    make_denoiser: MakeDenoiser = plain_denoiser,
) -> Iterator[Event]:
    """Answer every row's prompt, canvas by canvas. Events come in chronological order, tagged with their row's index.

    Args:
        rows: prompts with their seeds, stop rules and limits; each collects its answer.
        cancel: checked between steps; once it is set, every unfinished row ends as "cancelled".
        make_draws: the source of random tokens; tests pass recorded ones.
        make_denoiser: makes what denoises canvases over a context, under their constraints and edits. All must give the
            same tokens.
    """
    live = take(rows, sampling)
    cache = prefill(network, live)
    while True:
        if not (yield from denoise_canvases(network, live, cache, sampling, cancel, make_draws, make_denoiser)):
            return
        for row in live:
            yield from row.commit()
        unfinished = [i for i, row in enumerate(live) if row.finish_reason is None]
        if not unfinished:
            return
        if len(unfinished) < len(live):
            live, cache = [live[i] for i in unfinished], cache.select(torch.tensor(unfinished))
        cache = commit_tokens(network, [row.new_tokens for row in live], cache)


def take(rows: Sequence[SequenceState], sampling: LogitEdits) -> list[SequenceState]:
    """The rows, whose logits are edited as this sampling says."""
    for row in rows:
        row.edits = sampling
    return list(rows)


def denoise_canvases(
    network: Network,
    rows: Sequence[SequenceState],
    cache: Cache,
    sampling: Sampling,
    cancel: Cancel | None,
    make_draws: Callable[..., Draws],
    make_denoiser: MakeDenoiser,
) -> Generator[Event, None, bool]:
    """Denoise one canvas for every row and leave it in the row as its draft. False: all rows were cancelled."""
    skipped = sorted({row.skipped_steps(sampling.steps) for row in rows})
    if len(skipped) > 1:  # rows that start at the same noise level share a schedule
        for number in skipped:
            same = [i for i, row in enumerate(rows) if row.skipped_steps(sampling.steps) == number]
            some, part = [rows[i] for i in same], cache.select(torch.tensor(same))
            if not (yield from denoise_canvases(network, some, part, sampling, cancel, make_draws, make_denoiser)):
                for row in (row for row in rows if row.finish_reason is None):
                    yield from row.cancel()
                return False
        return True
    length, device = network.config.canvas_length, network.device
    schedule, (accept, settle) = Schedule.of(sampling, *skipped), step_rules(sampling)
    seeds, numbers = [row.seed for row in rows], [row.canvas_number for row in rows]
    draws = make_draws(seeds, numbers, length=length, vocab=network.config.vocab_size, device=device)
    token_mask = TokenMask.of([row.banned_ids for row in rows], length, device)
    pins = Pins.of([row.pins for row in rows], length, network.embed, device, always=sampling.release > 0)
    start = given_tokens([row.start for row in rows], length, device)
    constraints = [row.canvas_constraint for row in rows]
    changes = [_changes(network, row) for row in rows]
    denoiser = make_denoiser(network, cache, constraints, changes, truncation_of(sampling))
    for step in denoise(denoiser, draws, len(rows), schedule, accept, settle, token_mask, pins, start, sampling.greedy):
        for i, row in enumerate(rows[index] for index in step.rows.tolist()):
            row.draft(step.argmax[i].tolist(), step.number)
            yield (event := denoised_event(row, i, step))
            if not event.settled and step.number < schedule.last:
                held = row.pins
                yield from row.release_text(event)
                if row.pins is not held:
                    assert pins is not None
                    pins.add(int(step.rows[i]), row.pins, network.embed)
                    constraints[int(step.rows[i])] = row.canvas_constraint
                if sampling.has_penalties:
                    decided = step.next_canvas[i].where(step.accepted[i], UNPINNED)
                    changes[int(step.rows[i])] = _changes(network, row, decided.tolist())
        if cancel is not None and cancel.is_set():
            for row in rows:
                yield from row.cancel()
            return False
    return True


def _changes(network: Network, row: SequenceState, decided: Sequence[int] = ()) -> LogitChanges | None:
    return canvas_changes(row, decided, network.config.canvas_length, network.config.vocab_size, network.device)


def prefill(network: Network, rows: Sequence[SequenceState]) -> Cache:
    """The KV cache of every row's prompt, images included."""
    padded, counts = pad(network, [row.prompt for row in rows])
    return network.read(padded, network.empty_cache(len(rows)), counts, images_of(rows))[1]


def commit_tokens(network: Network, tokens: Sequence[list[int]], cache: Cache) -> Cache:
    """The commit: a causal pass over one list of tokens per row, padded, which extends the KV cache.

    A row without tokens keeps its context; if no row has tokens, no forward is run.
    """
    if not any(tokens):
        return cache
    padded, counts = pad(network, tokens)
    return network.read(padded, cache, counts)[1]


def images_of(rows: Sequence[SequenceState]) -> Images | None:
    """The images in each row's prompt; None if no prompt has any."""
    return [row.images for row in rows] if any(row.images for row in rows) else None


def pad(network: Network, tokens: Sequence[list[int]]) -> tuple[Int[Tensor, "batch length"], Int[Tensor, " batch"]]:
    """Lists of tokens as one right-padded tensor, and the number of real tokens in each row."""
    counts = [len(row) for row in tokens]
    longest = max(counts)
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], dtype=torch.long)
    return to_device(padded, network.device), to_device(torch.tensor(counts), network.device)


def denoised_event(row: SequenceState, index: int, step: Step) -> Denoised:
    """The event of one row of a step; `index` is the row's index among those of the step."""
    return Denoised(
        row=row.index,
        canvas=len(row.canvases),
        step=step.number,
        argmax=step.argmax[index],
        accepted=step.accepted[index],
        entropy=step.entropy[index],
        changed=step.changed[index],
        settled=bool(step.settled[index]),
        retry=row.retry,
        verifications=row.verifications,
        repairs=len(row.repairs),
    )
