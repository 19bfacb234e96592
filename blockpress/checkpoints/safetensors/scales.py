"""Stored scales, zero points and packed integers, converted to the shape and the type of the layouts.

Every function takes a tensor as it was read, and its stored name where an error may have to name it.

Invariant: the results have one entry for every row of the matrix, and no scale is NaN, infinite, negative or zero
(except in e4m3, where the quantiser itself rounds the scale of a group of tiny values to zero).

Run it:  python -m pytest tests/checkpoints/test_packed.py
Source: `compressed_tensors` 0.20, `pack_to_int32` and `decompress_mx_scale`; OCP microscaling formats 1.0.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float, Int, Int8, Int32, Shaped, UInt8
from torch import Tensor

from blockpress.errors import DamagedFile, ShapeMismatch

TYPES = ("F32", "BF16", "F16")
"""The types of scales wider than one byte."""

INTEGERS = ("I8", "I16", "I32", "I64", "U8")
"""The types of zero points that are not packed."""

# Values that are unpacked at once; meanwhile each of their bits takes a byte.
_TILE = 1 << 20


def checked(name: str, scale: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The scales themselves.

    Raises:
        DamagedFile: one of them is NaN, infinite, negative or zero.
    """
    low, high = torch.aminmax(scale.float())
    if not (low > 0 and high < torch.inf):
        wrong = low if not low > 0 else high
        raise DamagedFile(f"the tensor {name} holds a scale of {wrong.item()}", hint=_AGAIN)
    return scale


def expand_scales(values: Shaped[Tensor, "*grid"], rows: int, height: int) -> Shaped[Tensor, "rows groups"]:
    """One row of scales or zero points for every row of the matrix; a stored one covers `height` rows (0: all)."""
    if height == 0:
        return values.reshape(1, 1).expand(rows, 1)
    if values.ndim == 1:
        return values[:, None]
    return values if height == 1 else values.repeat_interleave(height, dim=0)[:rows]


def e4m3_codes(name: str, scale: Shaped[Tensor, "rows groups"]) -> UInt8[Tensor, "rows groups"]:
    """The bytes of e4m3 scales.

    Raises:
        DamagedFile: one is NaN or negative.
    """
    codes = scale.contiguous().view(torch.uint8)
    # Codes above 0x7e are NaN or negative.
    if codes.max() > 0x7E:
        wrong = codes.max().view(torch.float8_e4m3fn).float().item()
        raise DamagedFile(f"the tensor {name} holds a scale of {wrong}", hint=_AGAIN)
    return codes


def e8m0_codes(name: str, scale: Shaped[Tensor, "rows groups"]) -> UInt8[Tensor, "rows groups"]:
    """The bytes of e8m0 scales, powers of two.

    Raises:
        DamagedFile: one is NaN, the code 255.
    """
    codes = scale.contiguous().view(torch.uint8)
    if codes.max() == 255:
        raise DamagedFile(f"the tensor {name} holds a scale of nan", hint=_AGAIN)
    return codes


def from_e8m0(name: str, scale: Shaped[Tensor, "rows groups"]) -> BFloat16[Tensor, "rows groups"]:
    """e8m0 scales as floats. Errors as `e8m0_codes`."""
    exponents = e8m0_codes(name, scale).int() - 127
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents).bfloat16()


def check_shape(name: str, wanted: tuple[int, int], stored: Int[Tensor, " two"]) -> Int[Tensor, " two"]:
    """Raises ShapeMismatch where the shape stored with a packed weight is not the config's."""
    if tuple(stored.tolist()) != wanted:
        raise ShapeMismatch(
            f"the tensor {name} says {stored.tolist()}, the config asks for {list(wanted)}",
            hint="do config and weights come from the same save?",
        )
    return stored


def nibbles(words: Int32[Tensor, "rows words"], count: int) -> UInt8[Tensor, "rows bytes"]:
    """4-bit integers as they are, two in a byte; the first `count`, an even number, belong to the row."""
    return _bytes(words)[:, : count // 2].contiguous()


def integers(words: Int32[Tensor, "rows words"], bits: int, count: int) -> Int8[Tensor, "rows columns"]:
    """The first `count` integers of every row, stored in `bits` bits from the lowest on, plus half the range."""
    raw = _bytes(words)
    if bits == 8:
        return (raw[:, :count] ^ 128).view(torch.int8)
    out = torch.empty(len(raw), count, dtype=torch.int8)
    shifts = torch.arange(8, dtype=torch.uint8)
    values = (1 << torch.arange(bits)).to(torch.uint8)
    step = max(1, _TILE // max(1, count))
    for start in range(0, len(raw), step):
        bit_planes = (raw[start : start + step, :, None] >> shifts) & 1
        codes = bit_planes.flatten(1)[:, : count * bits].unflatten(1, (count, bits))
        out[start : start + step] = ((codes * values).sum(-1, dtype=torch.int32) - (1 << (bits - 1))).to(torch.int8)
    return out


def zero_points(words: Int32[Tensor, "words groups"], bits: int, count: int) -> Int8[Tensor, "rows groups"]:
    """Zero points, which are packed along the rows axis."""
    return integers(words.t(), bits, count).t().contiguous()


def as_int8(name: str, values: Int[Tensor, "*grid"]) -> Int8[Tensor, "*grid"]:
    """Zero points that are stored one by one, in whatever type.

    Raises:
        DamagedFile: one of them is no integer of 8 bits.
    """
    low, high = torch.aminmax(values)
    if low < -128 or high > 127:
        wrong = low if low < -128 else high
        raise DamagedFile(
            f"the tensor {name} holds a zero point of {wrong.item()}",
            hint="fetch the file again, or quantise the model again: a zero point is from -128 to 127",
        )
    return values.to(torch.int8)


def _bytes(words: Int32[Tensor, "rows words"]) -> UInt8[Tensor, "rows bytes"]:
    # A transposed matrix of one column counts as contiguous and has the strides of one that is not.
    return words.reshape(-1).view(torch.uint8).view(len(words), 4 * words.shape[1])


_AGAIN = "fetch the file again, or quantise the model again: a scale is a finite number above 0"
