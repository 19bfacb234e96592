"""Products of 8-bit integers: a weight in codes with a scale a row, and rows of x that are rounded to codes on the fly.

    x [rows, in]  --largest of the row / 127-->  codes, scale          y = (codes @ weight codes) * weight scale * scale
    sums          integers of 32 bits, exact: no row depends on its neighbours, on threads or on the ISA level

How far off: with x = s (q + e) and w = t (c + f), s and t the scales, q and c the codes, and roundings e and f of at
most 1/2 each, a product of n terms is off by

    |y - x @ w| <= s t (sum |q| + sum |c| + n / 2) / 2          and by three roundings of float32

Codes that were stored as such are the weight: then f is 0, and so is the share of sum |q|.

Invariant: `matmul` is the truth, C++ (`native/int8.h`) gives the same bits at every level.

Run it:  python -m pytest tests/ops/test_integers.py
Source: symmetric quantisation, of weights a channel and of activations a token: W8A8 of compressed-tensors.
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
"""132,104: the sum of so many products of codes of at most 127 and 128 is a 32-bit integer."""

TILE = 1 << 20
"""Most values that are in float32 at once while a weight is rounded."""

SMALLEST = 2.0**-100
"""A row whose largest value is smaller counts as 0: 127 over it would be no number."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerWeight(PackedTensors):
    """A packed weight (`ops.weight.Packed`) whose products are made of integers: value = code * scale of its row."""

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
        """The values, each rounded to float32 and to `dtype`."""
        return (self.codes.float() * self.scale[..., None]).to(dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Float32[Tensor, " rows"] | None]:
        """The codes and the scales; in float16, which holds no sums of codes, the values."""
        if dtype == torch.float16:
            return self.unpack(dtype), None
        return self.codes.to(dtype), self.scale


def matmul(x: Float[Tensor, "*rows in"], weight: IntegerWeight) -> Float[Tensor, "*rows out"]:
    """x @ weight^T, both in integers; in x's type. NaN for a row of x that is not finite."""
    codes, scale = quantize_rows(x.float())
    sums = codes.double() @ weight.codes.double().T  # exact: below 2^53
    return (sums.float() * weight.scale * scale[..., None]).to(x.dtype)


def quantize_rows(
    x: Float32[Tensor, "*rows columns"],
) -> tuple[Int8[Tensor, "*rows columns"], Float32[Tensor, "*rows"]]:
    """Codes of -127 to 127 and the scale of each row: largest magnitude / 127. Halves are rounded to even."""
    top = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    whole = (top >= SMALLEST) & top.isfinite()
    steps = torch.where(whole, torch.full_like(top, 127.0) / top, 0.0)  # no reciprocal
    codes = torch.where(whole[..., None], x * steps[..., None], 0.0).round().to(torch.int8)
    rest = torch.where(top < SMALLEST, 0.0, torch.nan)
    return codes, torch.where(whole, top / 127.0, rest)


def quantized(weight: Float[Tensor, "*lead rows columns"] | Packed) -> IntegerWeight:
    """A weight in whatever it is stored, in integers: int8 codes under one scale a row as they are, others rounded.

    Values pass through float32 a tile at a time.
    """
    if isinstance(weight, Codes) and _suits(weight):
        return IntegerWeight(codes=weight.codes, scale=weight.scale[..., 0].float())
    *lead, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    step = max(1, TILE // max(1, columns))
    for number in range(math.prod(lead)):
        place = _place(number, lead)
        part, own = weight, (codes, scale)
        for index in place:
            part, own = part[index], (own[0][index], own[1][index])
        for start in range(0, rows, step):
            tile = part[start : start + step]
            values = tile.float() if isinstance(tile, Tensor) else tile.unpack(torch.float32)
            own[0][start : start + step], own[1][start : start + step] = quantize_rows(values)
    return IntegerWeight(codes=codes, scale=scale)


def _place(number: int, lead: list[int]) -> list[int]:
    """The index of the matrix of that number, in order."""
    place = []
    for size in reversed(lead):
        number, index = divmod(number, size)
        place.append(index)
    return place[::-1]


def _suits(weight: Codes) -> bool:
    return weight.codes.dtype == torch.int8 and weight.zero_point is None and weight.scale.shape[-1] == 1
