"""The loop: a canvas of noise becomes text.

    canvas = noise
    repeat   reading = denoiser(canvas, signal, temperature)      argmax, sample, entropy, next signal
             canvas, settled = update(reading, noise)             sample where accepted, fresh noise elsewhere
                                                                  settled rows leave with their argmax

Invariant: no model in here. A denoiser is a callable that gives a reading; the plain one computes it from full logits,
faster ones never hold them. Rows do not touch: what a row becomes does not depend on the others.
Source: reference model, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.diffusion.accept import Accept
from blockpress.diffusion.output import DenoiserOutput
from blockpress.diffusion.pins import Pins
from blockpress.diffusion.schedule import Schedule
from blockpress.diffusion.settle import Settle
from blockpress.diffusion.token_mask import TokenMask
from blockpress.diffusion.update import update
from blockpress.shapes import Accepted, Canvas, Entropy, Logits, Signal


@runtime_checkable
class Draws(Protocol):
    """Random tokens for the rows of a batch; `KeyedDraws`, or recorded ones in tests."""

    def noise(self, rows: Int[Tensor, " rows"], step: int) -> Canvas: ...

    def sample(self, rows: Int[Tensor, " rows"], step: int, scaled: Logits) -> Canvas: ...


@runtime_checkable
class Denoiser(Protocol):
    """One denoising step for some rows of a batch. `signal` is None at the first step, `edits` where there are none."""

    def __call__(
        self,
        rows: Int[Tensor, " rows"],
        step: int,
        canvas: Canvas,
        signal: Signal | None,
        temperature: Float32[Tensor, ""],
        draws: Draws,
        edits: TokenMask | None,
    ) -> DenoiserOutput: ...


@dataclass(frozen=True)
class Step:
    """What one step did to the rows that were still under way; `rows` are their places in the batch."""

    number: int
    rows: Int[Tensor, " rows"]
    canvas: Canvas
    argmax: Canvas
    accepted: Accepted
    entropy: Entropy
    changed: Bool[Tensor, "rows canvas"]
    settled: Bool[Tensor, " rows"]


def denoise(
    denoiser: Denoiser,
    draws: Draws,
    batch: int,
    schedule: Schedule,
    accept: Accept,
    settle: Settle,
    edits: TokenMask | None = None,
    pins: Pins | None = None,
) -> Iterator[Step]:
    """Denoise one canvas for each of `batch` rows, yielding every step.

    A row's result is the argmax of its last step: the one in which it settled, or step `schedule.steps`. `Step.canvas`
    is what the step read. `edits` and `pins` hold for all steps, by the places of the rows in the batch.
    """
    rows = torch.arange(batch)
    canvas = draws.noise(rows, 0)
    rows = rows.to(canvas.device)
    if pins is not None:
        canvas = pins.hold(rows, canvas)
    unchanged = torch.zeros_like(rows)
    signal, previous = None, torch.full_like(canvas, -1)
    for number in range(1, schedule.steps + 1):
        reading = denoiser(rows, number, canvas, signal, schedule.temperature(number), draws, edits)
        if pins is not None:
            reading = pins(rows, reading)
        noise = draws.noise(rows, number)
        if pins is not None:
            noise = pins.hold(rows, noise)
        done = update(reading, noise, previous, unchanged, accept, settle)
        yield Step(number, rows, canvas, reading.argmax, done.accepted, reading.entropy, done.changed, done.settled)
        if number == schedule.steps:
            return
        live = (~done.settled).nonzero()[:, 0]
        if not len(live):
            return
        rows, canvas, unchanged = rows[live], done.canvas[live], done.unchanged[live]
        previous, signal = reading.argmax[live], reading.signal[live]
