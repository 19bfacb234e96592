"""int8 with a scale for each row, and int4 with a scale for each group of columns.

    int8   value[r, c] = weight[r, c] * weight_scale[r]                codes -128 to 127; readers use int8 activations
    int4   value[r, c] = nibble[r, c] * weight_scale[r, c // group]    codes -8 to 7; activations stay as they are

Eight int4 codes, each plus 8, are packed in one int32, the first in the lowest bits. Integers have the same step for
small and large values, so a scale that clips the largest a little may lower the squared error: a few are tried.

Invariant: with the search, the squared error of a row (a group) is never above that of the widest scale tried, which
clips nothing.

Run it:  python -m pytest tests/quantize/test_encoders.py
Source: `pack_to_int32` of compressed-tensors; its presets W8A8 and W4A16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from blockpress.errors import RequestError
from blockpress.quantize.encoders.layout import Encoded, Shapes, arguments, quantiles, row_tiles, safe, scale_dtype

CLIPS_8 = (1.0, 0.97, 0.94, 0.9)
CLIPS_4 = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""The scales that are tried, as fractions of the one that clips nothing."""


@dataclass(frozen=True, kw_only=True)
class Int8Rows:
    """int8 codes and a scale a row."""

    name: str = "int8"
    compression: str = "int-quantized"
    search: bool = True

    @property
    def scheme(self) -> dict[str, Any]:
        return {
            "weights": arguments(8, "int", "channel"),
            "input_activations": arguments(8, "int", "token", dynamic=True),
        }

    def supports(self, columns: int) -> bool:
        return columns >= 1

    def layout(self, rows: int, columns: int, scales: torch.dtype) -> Shapes:
        return {"weight": (torch.int8, (rows, columns)), "weight_scale": (scales, (rows, 1))}

    def encode(self, weight: Float[Tensor, "out in"], amax: float | None = None) -> Encoded:
        rows, columns = weight.shape
        kind = scale_dtype(weight.dtype)
        codes = torch.empty(rows, columns, dtype=torch.int8)
        scales, values = torch.empty(rows, 1, dtype=kind), torch.empty(rows, columns, dtype=kind)
        for tile in row_tiles(rows, columns):
            x = weight[tile].float()
            scale = best_scale(x, 1, 127, kind, CLIPS_8 if self.search else CLIPS_8[:1])
            code = (x / scale.float()).round_().clamp_(-128, 127)
            codes[tile], scales[tile], values[tile] = code.to(torch.int8), scale, code.to(kind) * scale
        return Encoded(tensors={"weight": codes, "weight_scale": scales}, values=values)

    def draw(self, rows: int, columns: int, std: float, rng: np.random.Generator) -> dict[str, Tensor]:
        levels = np.rint(40 * quantiles(256)).astype(np.int8)
        bytes_ = rng.bytes(rows * columns).translate(levels.tobytes())
        codes = torch.frombuffer(bytearray(bytes_), dtype=torch.int8).view(rows, columns)
        return {"weight": codes, "weight_scale": torch.full((rows, 1), std / levels.std(), dtype=torch.bfloat16)}


@dataclass(frozen=True, kw_only=True)
class Int4Groups:
    """int4 codes, eight in an int32, and a scale for each `group` columns of a row.

    A group of 32 divides all columns of the published model (2816, 2112, 704); 128 does not.
    """

    name: str = "int4"
    compression: str = "pack-quantized"
    group: int = 32
    search: bool = True

    def __post_init__(self) -> None:
        if self.group not in (16, 32, 64, 128):
            raise RequestError(f"group is {self.group!r}", hint="int4 takes a group of 16, 32, 64 or 128 columns")

    @property
    def scheme(self) -> dict[str, Any]:
        return {"weights": arguments(4, "int", "group", group_size=self.group)}

    def supports(self, columns: int) -> bool:
        return columns % self.group == 0

    def layout(self, rows: int, columns: int, scales: torch.dtype) -> Shapes:
        return {
            "weight_packed": (torch.int32, (rows, columns // 8)),
            "weight_scale": (scales, (rows, columns // self.group)),
            "weight_shape": (torch.int64, (2,)),
        }

    def encode(self, weight: Float[Tensor, "out in"], amax: float | None = None) -> Encoded:
        rows, columns = weight.shape
        kind = scale_dtype(weight.dtype)
        packed = torch.empty(rows, columns // 8, dtype=torch.int32)
        scales = torch.empty(rows, columns // self.group, dtype=kind)
        values = torch.empty(rows, columns, dtype=kind)
        for tile in row_tiles(rows, columns):
            # Transposed, so that a group's scale is taken along the contiguous axis: three times as fast.
            x = weight[tile].float().view(-1, self.group).t().contiguous()
            scale = best_scale(x, 0, 7, kind, CLIPS_4 if self.search else CLIPS_4[:1])
            code = (x / scale.float()).round_().clamp_(-8, 7)
            packed[tile] = pack(code.to(torch.int8).t().reshape(-1, columns))
            scales[tile] = scale.view(-1, columns // self.group)
            values[tile] = (code.to(kind) * scale).t().reshape(-1, columns)
        shape = torch.tensor([rows, columns])
        tensors = {"weight_packed": packed, "weight_scale": scales, "weight_shape": shape}
        return Encoded(tensors=tensors, values=values)

    def draw(self, rows: int, columns: int, std: float, rng: np.random.Generator) -> dict[str, Tensor]:
        levels = np.rint(4 * quantiles(16)).clip(-7, 7)
        pairs = np.array([int(high + 8) << 4 | int(low + 8) for high in levels for low in levels], dtype=np.uint8)
        bytes_ = rng.bytes(rows * columns // 2).translate(pairs.tobytes())
        packed = torch.frombuffer(bytearray(bytes_), dtype=torch.int32).view(rows, columns // 8)
        scale = torch.full((rows, columns // self.group), std / levels.std(), dtype=torch.bfloat16)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}


def best_scale(x: Float32[Tensor, "a b"], axis: int, top: int, kind: torch.dtype, clips: tuple[float, ...]) -> Tensor:
    """The scale along an axis with the lowest squared error of those tried, rounded to `kind`.

    Args:
        top: the largest code; the smallest is -top - 1.
        clips: fractions of `largest magnitude / top` to try, the first of them 1.
    """
    widest = x.abs().amax(axis, keepdim=True) / top
    best = safe(widest.to(kind))
    least = None
    for clip in clips if len(clips) > 1 else ():
        scale = safe((widest * clip).to(kind))
        wide = scale.float()
        difference = (x / wide).round_().clamp_(-top - 1, top).mul_(wide).sub_(x)
        error = difference.square_().sum(axis, keepdim=True)
        if least is None:
            least = error
            continue
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def pack(codes: Int8[Tensor, "rows columns"]) -> Tensor:
    """int4 codes as compressed-tensors packs them, int32 [rows, columns / 8].

    >>> hex(int(pack(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8))))
    '-0x9abcdf0'
    """
    return nibble_pairs(codes + 8).view(torch.int32)


def nibble_pairs(nibbles: Int8[Tensor, "rows columns"]) -> Tensor:
    """Pairs of values 0 to 15 as bytes, the first of a pair in the low nibble: uint8 [rows, columns / 2]."""
    pairs = nibbles.contiguous().view(torch.int16)
    return ((pairs >> 4) | pairs).to(torch.uint8)
