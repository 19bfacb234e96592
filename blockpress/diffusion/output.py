"""What a denoiser makes of a canvas: all that the loop ever sees of a network.

Invariant: four values a position and no logits, so that a denoiser need never hold a row of the vocabulary.
Run it:  python -m pytest tests/diffusion
"""

from __future__ import annotations

from dataclasses import dataclass

from blockpress.ops.vocabulary import SampleStats
from blockpress.shapes import Canvas, Entropy, Signal


@dataclass(frozen=True)
class DenoiserOutput:
    """What a denoiser makes of a canvas: best and drawn tokens, entropy in nats, and the signal for its next step."""

    argmax: Canvas
    sample: Canvas
    entropy: Entropy
    signal: Signal

    @classmethod
    def of(cls, seen: SampleStats, canvases: int) -> DenoiserOutput:
        """What one pass over the vocabulary found at the places of so many canvases, one canvas behind the other."""
        assert seen.signal is not None, "the signal was not asked for"
        each = (seen.argmax, seen.sample, seen.entropy, seen.signal)
        return cls(*(found.unflatten(0, (canvases, -1)) for found in each))
