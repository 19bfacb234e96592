"""What a denoiser returns for a canvas: all that the loop ever gets from a network.

Invariant: four values per position and no logits, so a denoiser never has to hold a row of the vocabulary.
Run it:  python -m pytest tests/diffusion
"""

from __future__ import annotations

from dataclasses import dataclass

from blockpress.ops.vocabulary import SampleStats
from blockpress.shapes import Canvas, Entropy, Signal


@dataclass(frozen=True)
class DenoiserOutput:
    """What a denoiser returns: the likeliest and the sampled tokens, entropies in nats, and `signal`, the
    self-conditioning embedding for the next step; None if there is none."""

    argmax: Canvas
    sample: Canvas
    entropy: Entropy
    signal: Signal | None

    @classmethod
    def of(cls, stats: SampleStats, num_canvases: int) -> DenoiserOutput:
        """From one pass over the vocabulary for the positions of `num_canvases` canvases, one canvas after another."""
        argmax, sample, entropy = (
            value.unflatten(0, (num_canvases, -1)) for value in (stats.argmax, stats.sample, stats.entropy)
        )
        signal = None if stats.signal is None else stats.signal.unflatten(0, (num_canvases, -1))
        return cls(argmax, sample, entropy, signal)
