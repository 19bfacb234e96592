"""Ways to denoise a canvas over a context. The reference loop uses `plain_denoiser`, which computes the full logits.

Invariant: a denoiser never changes the context that it reads, and every one gives the same tokens.
Run it:  python -m pytest tests/diffusion/test_pins.py tests/decoding/test_generate.py
"""

from __future__ import annotations

from jaxtyping import Float32, Int
from torch import Tensor

from blockpress.diffusion import Denoiser, DenoiserOutput, Draws, TokenMask
from blockpress.model import Cache, Network
from blockpress.ops import vocabulary
from blockpress.shapes import Canvas, Signal


def plain_denoiser(network: Network, cache: Cache) -> Denoiser:
    """A denoiser that computes its output from full logits, over the context of `cache` (a row for each canvas)."""
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
        return DenoiserOutput(
            argmax=scaled.argmax(-1),
            sample=draws.sample(rows, step, scaled),
            entropy=vocabulary.entropy(scaled),
            signal=network.soft_embedding(scaled),
        )

    return denoiser
