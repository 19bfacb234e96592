"""Ways to denoise a canvas over a context. The reference loop uses `plain_denoiser`, which computes the full logits.

Invariant: a denoiser never changes the context that it reads, and every one gives the same tokens.
Run it:  python -m pytest tests/diffusion/test_pins.py tests/decoding/test_generate.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from jaxtyping import Float32, Int
from torch import Tensor

from blockpress.constrain import CanvasConstraint
from blockpress.diffusion import Denoiser, DenoiserOutput, Draws, TokenMask
from blockpress.model import Cache, Network
from blockpress.ops import vocabulary
from blockpress.ops.nucleus import Truncation
from blockpress.ops.vocabulary import LogitChanges
from blockpress.shapes import Canvas, Logits, Signal


def plain_denoiser(
    network: Network,
    cache: Cache,
    constraints: Sequence[CanvasConstraint | None] = (),
    changes: Sequence[LogitChanges | None] = (),
    truncation: Truncation | None = None,
) -> Denoiser:
    """A denoiser that computes its output from full logits, over the context of `cache` (a row for each canvas).

    `constraints`, `changes`: of each row of the batch; none if it is empty. Both are read at every step. `truncation`:
    of all rows.
    """
    selected: list[tuple[int, Cache]] = [(len(cache.lengths), cache)]

    def denoiser(
        rows: Int[Tensor, " rows"],
        step: int,
        canvas: Canvas,
        signal: Signal | None,
        temperature: Float32[Tensor, ""],
        draws: Draws,
        token_mask: TokenMask | None = None,
    ) -> DenoiserOutput:
        if len(rows) != selected[0][0]:  # rows only ever leave, so the same number of rows means the same rows
            selected[0] = (len(rows), cache.select(rows))
        logits = network.logits(network.denoise(canvas, selected[0][1], signal))
        scaled = logits / temperature.to(logits.device)
        if token_mask is not None:
            scaled = token_mask(rows, scaled)
        numbers, sample = rows.tolist(), partial(draws.sample, rows, step)
        for place, edited in enumerate(changes[row] for row in numbers) if any(changes) else ():
            if edited is not None:
                heat = temperature.to(scaled.device).expand(scaled.shape[1])
                scaled[place] = edited.added(scaled[place], heat)
        return output_from_logits(
            network,
            scaled,
            sample if truncation is None else lambda logits: sample(truncation(logits)),
            [constraints[row] for row in numbers] if constraints else (),
        )

    return denoiser


def output_from_logits(
    network: Network,
    scaled: Logits,
    sample: Callable[[Logits], Canvas],
    constraints: Sequence[CanvasConstraint | None] = (),
) -> DenoiserOutput:
    """What a step needs, from temperature-scaled logits, which are overwritten where a row has a constraint.

    `constraints`: of each row; none if it is empty.
    """
    argmax = scaled.argmax(-1)
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            scaled[row], argmax[row] = constraint(scaled[row])
    return DenoiserOutput(
        argmax=argmax,
        sample=sample(scaled),
        entropy=vocabulary.entropy(scaled),
        signal=network.soft_embedding(scaled),
    )
