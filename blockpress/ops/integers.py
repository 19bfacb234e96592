"""Products of 8-bit integers: the weight is codes with a scale per row, and rows of x are rounded to codes on the fly.

    x [rows, in]  --largest of the row / 127-->  codes, scale          y = (codes @ weight codes) * weight scale * scale
    sums          32-bit integers, exact: no row depends on its neighbours, on threads or on the ISA level

Error bound: with x = s (q + e) and w = t (c + f), where s and t are the scales, q and c the codes, and e and f rounding
errors of at most 1/2, a product of n terms is off by

    |y - x @ w| <= s t (sum |q| + sum |c| + n / 2) / 2          plus three float32 roundings

Where the weight was stored as codes, f is 0, and so is the term sum |q|.

Invariant: `matmul` is the reference; C++ (`native/int8.h`) gives the same bits at every level.

Run it:  python -m pytest tests/ops/test_integers.py
Source: symmetric quantisation, of weights per channel and of activations per token: W8A8 of compressed-tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from blockpress.ops.packed import Codes, PackedTensors
from blockpress.ops.weight import Packed

MOST_COLUMNS = (1 << 31) // (127 * 128)
"""132,104: a sum of this many products of codes of at most 127 and 128 fits a 32-bit integer."""

TILE = 1 << 20
"""Most float32 values held at once while a weight is rounded."""

SMALLEST = 2.0**-100
"""A row whose largest magnitude is smaller counts as 0: 127 divided by it would overflow."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerWeight(PackedTensors):
    """A packed weight (`ops.weight.Packed`) multiplied in integers: value = code * scale of its row."""

    codes: Int8[Tensor, "*lead rows columns"]
    scale: Float32[Tensor, "*lead rows"]

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.int8 and self.scale.dtype == torch.float32
        assert self.scale.shape == self.codes.shape[:-1], "a scale a row"
        assert self.codes.shape[-1] <= MOST_COLUMNS, "sums are integers of 32 bits"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The values, each rounded to float32 and then to `dtype`."""
        return (self.codes.float() * self.scale[..., None]).to(dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Float32[Tensor, " rows"] | None]:
        """The codes and the scales; in float16, whose range sums of codes leave, the values."""
        if dtype == torch.float16:
            return self.unpack(dtype), None
        return self.codes.to(dtype), self.scale


def matmul(x: Float[Tensor, "*rows in"], weight: IntegerWeight) -> Float[Tensor, "*rows out"]:
    """x @ weight^T computed in integers, returned in x's type. A row of x that is not finite gives NaN."""
    codes, scale = quantize_rows(x.float())
    sums = codes.double() @ weight.codes.double().T  # exact: below 2^53
    return (sums.float() * weight.scale * scale[..., None]).to(x.dtype)


def quantize_rows(
    x: Float32[Tensor, "*rows columns"],
) -> tuple[Int8[Tensor, "*rows columns"], Float32[Tensor, "*rows"]]:
    """Codes from -127 to 127 and each row's scale, its largest magnitude / 127. Ties round to even."""
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    usable = (largest >= SMALLEST) & largest.isfinite()
    steps = torch.where(usable, torch.full_like(largest, 127.0) / largest, 0.0)  # no reciprocal
    codes = torch.where(usable[..., None], x * steps[..., None], 0.0).round().to(torch.int8)
    otherwise = torch.where(largest < SMALLEST, 0.0, torch.nan)
    return codes, torch.where(usable, largest / 127.0, otherwise)


def quantized(weight: Float[Tensor, "*lead rows columns"] | Packed) -> IntegerWeight:
    """Any weight as integers: int8 codes with one scale per row are kept, everything else is rounded.

    Values pass through float32 a tile at a time.
    """
    if isinstance(weight, Codes) and _suits(weight):
        return IntegerWeight(codes=weight.codes, scale=weight.scale[..., 0].float())
    *lead, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    step = max(1, TILE // max(1, columns))
    for number in range(math.prod(lead)):
        indices = _unravel(number, lead)
        part, out = weight, (codes, scale)
        for index in indices:
            part, out = part[index], (out[0][index], out[1][index])
        for start in range(0, rows, step):
            tile = part[start : start + step]
            values = tile.float() if isinstance(tile, Tensor) else tile.unpack(torch.float32)
            out[0][start : start + step], out[1][start : start + step] = quantize_rows(values)
    return IntegerWeight(codes=codes, scale=scale)


def _unravel(number: int, lead: list[int]) -> list[int]:
    """The indices of matrix `number` in the leading axes."""
    indices = []
    for size in reversed(lead):
        number, index = divmod(number, size)
        indices.append(index)
    return indices[::-1]


def _suits(weight: Codes) -> bool:
    return weight.codes.dtype == torch.int8 and weight.zero_point is None and weight.scale.shape[-1] == 1
