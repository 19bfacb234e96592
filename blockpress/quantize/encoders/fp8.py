"""fp8: e4m3 with a scale for each row (output channel); readers quantise activations per token.

    value[r, c] = weight[r, c] * weight_scale[r]        weight_scale[r] = largest magnitude of row r / 448

A float keeps its relative precision down to 2^-6 of the largest value, so searching for a clip is not worth it.

Invariant: no code is NaN (0x7f, 0xff), since values are clamped to 448 before they are rounded.

Run it:  python -m pytest tests/quantize/test_encoders.py
Source: OCP 8-bit floating point specification 1.0 (e4m3); compressed-tensors' preset FP8_DYNAMIC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blockpress.quantize.encoders.layout import Encoded, Shapes, arguments, quantiles, row_tiles, safe, scale_dtype

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """e4m3 codes and a scale a row."""

    name: str = "fp8"
    compression: str = "float-quantized"

    @property
    def scheme(self) -> dict[str, Any]:
        return {
            "weights": arguments(8, "float", "channel"),
            "input_activations": arguments(8, "float", "token", dynamic=True),
        }

    def supports(self, columns: int) -> bool:
        return columns >= 1

    def layout(self, rows: int, columns: int, scales: torch.dtype) -> Shapes:
        return {"weight": (E4M3, (rows, columns)), "weight_scale": (scales, (rows, 1))}

    def encode(self, weight: Float[Tensor, "out in"], amax: float | None = None) -> Encoded:
        rows, columns = weight.shape
        kind = scale_dtype(weight.dtype)
        codes = torch.empty(rows, columns, dtype=E4M3)
        scales, values = torch.empty(rows, 1, dtype=kind), torch.empty(rows, columns, dtype=kind)
        for tile in row_tiles(rows, columns):
            x = weight[tile].float()
            scale = safe((x.abs().amax(1, keepdim=True) / LARGEST).to(kind))
            code = (x / scale.float()).clamp_(-LARGEST, LARGEST).to(E4M3)
            codes[tile], scales[tile], values[tile] = code, scale, code.to(kind) * scale
        return Encoded(tensors={"weight": codes, "weight_scale": scales}, values=values)

    def draw(self, rows: int, columns: int, std: float, rng: np.random.Generator) -> dict[str, Tensor]:
        levels = torch.from_numpy(64 * quantiles(256)).to(E4M3)
        bytes_ = rng.bytes(rows * columns).translate(levels.view(torch.uint8).numpy().tobytes())
        codes = torch.frombuffer(bytearray(bytes_), dtype=torch.uint8).view(E4M3).view(rows, columns)
        scale = torch.full((rows, 1), std / float(levels.float().std(correction=0)), dtype=torch.bfloat16)
        return {"weight": codes, "weight_scale": scale}
