"""nvfp4: e2m1 codes, an e4m3 scale for each 16 columns, and one float32 global scale.

    value[r, c] = e2m1[r, c] * weight_scale[r, c // 16] / weight_global_scale          weights only, no activations

    e2m1:  0  0.5  1  1.5  2  3  4  6  and their negatives, in codes 0 to 7 and 8 to 15
    weight_global_scale = 448 * 6 / amax: with it the scale of the group that holds the largest value is 448

An e4m3 scale that is a little larger or smaller than the usual one (largest magnitude of the group / 6) often lowers
the squared error: 4 and 6 are far apart, so mapping the largest value to 4, for example, may suit the others better.

Invariant: with the search, the squared error of a group is never above that of the usual scale.

Run it:  python -m pytest tests/quantize/test_encoders.py
Source: OCP microscaling formats 1.0 (e2m1); compressed-tensors' preset NVFP4A16 and `generate_gparam`; "Four over six"
(arXiv 2512.02010) for the larger scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from blockpress.quantize.encoders.integers import nibble_pairs
from blockpress.quantize.encoders.layout import Encoded, Shapes, arguments, quantiles, row_tiles

E4M3 = torch.float8_e4m3fn
GROUP = 16
TOP, TOP_SCALE = 6.0, 448.0
# The neighbours of a positive e4m3 scale are the adjacent codes: 1 is the smallest, 0x7e is 448.
SMALLEST, LARGEST = 1, 0x7E
STEPS = (-1, 1, 2, 3, 4, 5)
"""Offsets from the code of the usual scale that are tried; 8 codes are a factor of 2."""


@dataclass(frozen=True, kw_only=True)
class Nvfp4:
    """e2m1 codes, two in a byte, under two levels of scales."""

    name: str = "nvfp4"
    compression: str = "nvfp4-pack-quantized"
    search: bool = True

    @property
    def scheme(self) -> dict[str, Any]:
        return {
            "weights": arguments(4, "float", "tensor_group", group_size=GROUP, scale_dtype="torch.float8_e4m3fn"),
        }

    def supports(self, columns: int) -> bool:
        return columns % GROUP == 0

    def layout(self, rows: int, columns: int, scales: torch.dtype) -> Shapes:
        return {
            "weight_packed": (torch.uint8, (rows, columns // 2)),
            "weight_scale": (E4M3, (rows, columns // GROUP)),
            "weight_global_scale": (torch.float32, (1,)),
        }

    def encode(self, weight: Float[Tensor, "out in"], amax: float | None = None) -> Encoded:
        rows, columns = weight.shape
        global_scale = global_scale_of(float(weight.abs().amax()) if amax is None else amax)
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
        scales = torch.empty(rows, columns // GROUP, dtype=E4M3)
        values = torch.empty(rows, columns, dtype=torch.bfloat16)
        for tile in row_tiles(rows, columns):
            x = weight[tile].float().view(-1, GROUP).t().contiguous()
            code = best_code(x, global_scale, STEPS if self.search else ())
            inner = code.view(E4M3)
            scale = inner.float() / global_scale
            index, rounded = to_e2m1(x / scale)
            nibble = index.to(torch.int8).t().reshape(-1, columns)
            packed[tile] = nibble_pairs(nibble.abs() | (nibble >> 4 & 8))
            scales[tile] = inner.view(-1, columns // GROUP)
            values[tile] = (rounded * scale).to(torch.bfloat16).t().reshape(-1, columns)
        tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": global_scale}
        return Encoded(tensors=tensors, values=values)

    def draw(self, rows: int, columns: int, std: float, rng: np.random.Generator) -> dict[str, Tensor]:
        index, levels = to_e2m1(torch.from_numpy(3.2 * quantiles(16)).view(1, -1))
        nibbles = [int(abs(i)) | 8 * (i < 0) for i in index.flatten().tolist()]
        pairs = bytes(high << 4 | low for high in nibbles for low in nibbles)
        bytes_ = rng.bytes(rows * columns // 2).translate(pairs)
        packed = torch.frombuffer(bytearray(bytes_), dtype=torch.uint8).view(rows, columns // 2)
        steps = torch.tensor([224.0, 256.0, 288.0, 320.0])
        scale_bytes = rng.bytes(rows * columns // GROUP).translate(
            steps.to(E4M3).view(torch.uint8).numpy().tobytes() * 64
        )
        inner = torch.frombuffer(bytearray(scale_bytes), dtype=torch.uint8).view(E4M3).view(rows, columns // GROUP)
        rms = math.sqrt(float(levels.square().mean()) * float(steps.square().mean()))
        return {"weight_packed": packed, "weight_scale": inner, "weight_global_scale": torch.tensor([rms / std])}


def global_scale_of(amax: float) -> Float32[Tensor, " one"]:
    """448 * 6 / amax, and 1 where amax is 0, float32 [1]."""
    scale = TOP_SCALE * TOP / torch.tensor([amax], dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(scale, nan=1.0, posinf=1.0)


def best_code(x: Float32[Tensor, "16 groups"], global_scale: Float32[Tensor, " one"], steps: tuple[int, ...]) -> Tensor:
    """The e4m3 code of each group's scale, uint8 [groups]: the usual one, or a better one at an offset in `steps`."""
    usual = (x.abs().amax(0) / TOP * global_scale).clamp_(max=TOP_SCALE).to(E4M3).view(torch.uint8)
    best = usual.clamp(SMALLEST, LARGEST)
    if not steps:
        return best
    least, start = _error(x, best, global_scale), best.to(torch.int16)
    for step in steps:
        code = (start + step).clamp_(SMALLEST, LARGEST).to(torch.uint8)
        error = _error(x, code, global_scale)
        best = torch.where(error < least, code, best)
        least = torch.minimum(error, least)
    return best


def to_e2m1(y: Float32[Tensor, "a b"]) -> tuple[Float32[Tensor, "a b"], Float32[Tensor, "a b"]]:
    """The nearest e2m1 value, ties to the even code: as a signed index of its magnitude, -7 to 7, and as a value.

    Magnitudes have steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6: three segments, each rounded by itself.

    >>> to_e2m1(torch.tensor([[0.25, 0.75, 2.5, -3.5, 5.0, -9.0]]))[1].tolist()
    [[0.0, 1.0, 2.0, -4.0, 4.0, -6.0]]
    """
    low = y.clamp(-2, 2)
    rest = y - low
    middle = rest.clamp(-2, 2)
    high = rest.sub_(middle).clamp_(-2, 2)
    low, middle, high = low.mul_(2).round_(), middle.round_(), high.mul_(0.5).round_()
    return low + middle + high, (low * 0.5).add_(middle).add_(high, alpha=2)


def _error(x: Float32[Tensor, "16 groups"], code: Tensor, global_scale: Float32[Tensor, " one"]) -> Tensor:
    scale = code.view(E4M3).float() / global_scale
    return to_e2m1(x / scale)[1].mul_(scale).sub_(x).square_().sum(0)
