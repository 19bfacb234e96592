"""The denoiser of the poem without full logits: the same reading, from `ops.vocabulary.see`.

    canvas, signal --network.denoise--> hidden --see, a block of rows at a time--> argmax, sample, entropy, signal

It stands beside `generate.plain_denoiser` and gives the same tokens.

Invariant: memory does not grow with rows x canvas x vocabulary.
Run it:  python -m pytest tests/test_tiled.py
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float32, Float64, Int
from torch import Tensor

from blockpress.diffusion import Denoiser, Draws, Edits, Reading
from blockpress.model import Cache, Network
from blockpress.ops import vocabulary
from blockpress.shapes import Canvas, Signal


@runtime_checkable
class Uniforms(Protocol):
    """Draws that tell the uniform number behind a sample, as `KeyedDraws` do."""

    def uniform(self, rows: Int[Tensor, " rows"], step: int) -> Float64[Tensor, "rows canvas"]: ...


def tiled_denoiser(network: Network, cache: Cache, *, signal_kind: vocabulary.SignalKind = "exact") -> Denoiser:
    """A denoiser for the rows of a cache that never holds their logits; its draws must be `Uniforms`.

    signal_kind: "exact" for the plain denoiser's signal, "sparse" for the cheaper one of `vocabulary.see`.
    """
    kept: list[tuple[int, Cache]] = [(len(cache.lengths), cache)]

    def reading(
        rows: Int[Tensor, " rows"],
        step: int,
        canvas: Canvas,
        signal: Signal | None,
        temperature: Float32[Tensor, ""],
        draws: Draws,
        edits: Edits | None = None,
    ) -> Reading:
        assert isinstance(draws, Uniforms)
        if len(rows) != kept[0][0]:  # rows only ever leave, so as many rows are the same rows
            kept[0] = (len(rows), cache.select(rows))
        seen = vocabulary.see(
            network.denoise(canvas, kept[0][1], signal).flatten(0, 1),
            network.embed_tokens.weight,
            cap=network.config.softcap,
            temperature=temperature.to(network.device).expand(canvas.numel()),
            uniform=draws.uniform(rows, step).flatten(),
            scale=network.embed_scale(),
            signal=signal_kind,
            denied=None if edits is None else (edits.ids, edits.denied[rows].flatten(0, 1)),
        )
        return Reading.of(seen, len(canvas))

    return reading
