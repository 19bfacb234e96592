"""The loop: a canvas of noise becomes text.

    canvas = noise
    repeat   output = denoiser(canvas, signal, temperature)       argmax, sample, entropy, next signal
             canvas, settled = update(output, noise)              sample where accepted, new noise elsewhere
                                                                  settled rows leave with their argmax

`signal` is the self-conditioning embedding: the expected token embedding of each position under the last step's
probabilities.

Invariant: no model in here. A denoiser is a callable that returns a `DenoiserOutput`; the plain one computes it from
full logits, faster ones never hold them. Rows are independent: the result of one does not depend on the others.
Source: reference model, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.diffusion.accept import Accept
from blockpress.diffusion.output import DenoiserOutput
from blockpress.diffusion.pins import Pins, put_in
from blockpress.diffusion.schedule import Schedule
from blockpress.diffusion.settle import Settle
from blockpress.diffusion.token_mask import TokenMask
from blockpress.diffusion.update import update
from blockpress.shapes import Accepted, Canvas, Entropy, Logits, Signal


@runtime_checkable
class Draws(Protocol):
    """The random tokens of a batch's rows: `KeyedDraws`, or recorded ones in tests."""

    def noise(self, rows: Int[Tensor, " rows"], step: int) -> Canvas: ...

    def sample(self, rows: Int[Tensor, " rows"], step: int, scaled: Logits) -> Canvas: ...


@runtime_checkable
class Denoiser(Protocol):
    """One denoising step for some rows of a batch. `signal` is None at step 1, `token_mask` if nothing is banned."""

    def __call__(
        self,
        rows: Int[Tensor, " rows"],
        step: int,
        canvas: Canvas,
        signal: Signal | None,
        temperature: Float32[Tensor, ""],
        draws: Draws,
        token_mask: TokenMask | None,
    ) -> DenoiserOutput: ...


@dataclass(frozen=True)
class Step:
    """The outcome of one step for the rows that were not settled before it; `rows` are their indices in the batch.

    canvas: what the step read. next_canvas: what the next one reads.
    """

    number: int
    rows: Int[Tensor, " rows"]
    canvas: Canvas
    argmax: Canvas
    accepted: Accepted
    entropy: Entropy
    changed: Bool[Tensor, "rows canvas"]
    settled: Bool[Tensor, " rows"]
    next_canvas: Canvas


def denoise(
    denoiser: Denoiser,
    draws: Draws,
    batch: int,
    schedule: Schedule,
    accept: Accept,
    settle: Settle,
    token_mask: TokenMask | None = None,
    pins: Pins | None = None,
    start: Canvas | None = None,
    greedy: bool = False,
) -> Iterator[Step]:
    """Denoise one canvas for each of `batch` rows, yielding every step.

    A row's result is the argmax of its last step: the one in which it settled, or step `schedule.last`. `token_mask`
    and `pins` hold for all steps; `start` has the tokens that stand in the first noise, `UNPINNED` elsewhere. Their
    rows are those of the batch. `greedy`: positions that are accepted hold their likeliest tokens, not samples.
    """
    rows = torch.arange(batch)
    canvas = draws.noise(rows, 0)
    rows = rows.to(canvas.device)
    if start is not None:
        canvas = put_in(start, canvas)
    if pins is not None:
        canvas = pins.hold(rows, canvas)
    unchanged = torch.zeros_like(rows)
    signal, previous = None, torch.full_like(canvas, -1)
    for number in range(1, schedule.last + 1):
        output = denoiser(rows, number, canvas, signal, schedule.temperature(number), draws, token_mask)
        if greedy:
            output = replace(output, sample=output.argmax)
        if pins is not None:
            output = pins(rows, output)
        noise = draws.noise(rows, number)
        if pins is not None:
            noise = pins.hold(rows, noise)
        result = update(output, noise, previous, unchanged, accept, settle)
        yield Step(
            number,
            rows,
            canvas,
            output.argmax,
            result.accepted,
            output.entropy,
            result.changed,
            result.settled,
            result.canvas,
        )
        if number == schedule.last:
            return
        live = (~result.settled).nonzero()[:, 0]
        if not len(live):
            return
        rows, canvas, unchanged = rows[live], result.canvas[live], result.unchanged[live]
        assert output.signal is not None, "only the last step may leave out what the next one needs"
        previous, signal = output.argmax[live], output.signal[live]
