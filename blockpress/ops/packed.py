"""Layouts of weights stored in fewer bits than products are computed in, and how each becomes floats.

    HalfFloats  bfloat16 or float16                       value = value
    Codes       e4m3 or int8, a byte per value            value = (code - zero) * scale
    Nibbles     4-bit integers, two per byte              value = (nibble - 8 - zero) * scale
    Float4      e2m1, two per byte, one-byte scales       value = e2m1 * (scale * global), or e2m1 * (scale / global)

`scale` and `zero_point` are per group of `group` columns of a row (one group: the whole row), `global_scale` is per
row. The first value of a pair is the low half of its byte. All tensors may have a leading axis of experts.

`factors` leaves a row's scale out of the matrix, so that codes of up to 448, or 6 * 448, are multiplied as they are.
float32 and bfloat16 hold the sums of such products; float16 does not, so there the matrix holds the values.

One or two bytes select their floats from a table: on a CPU that is several times as fast as shifts and casts, and C++
(unpacking.py) unpacks 4 bits and e4m3 into bfloat16 or float32 several times as fast again.

Invariant: `unpack` rounds where compressed-tensors rounds when it decompresses: `Codes` and `Nibbles` in the scale's
type, `Float4` in float32; a wider `dtype` gets the same values.

Run it:  python -m pytest tests/ops/test_packed.py
Source: OCP 8-bit floating point 1.0 (e4m3), OCP microscaling formats 1.0 (e2m1, e8m0), `compressed_tensors` 0.20.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal, TypeVar, final

import torch
from jaxtyping import Float, Float32, Int8, Shaped, UInt8
from torch import Tensor

from blockpress.ops import unpacking

E4M3 = torch.float8_e4m3fn
HALVES = (torch.bfloat16, torch.float16)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the sixteen 4-bit floats by code."""

ScaleKind = Literal["e4m3", "e8m0"]
PackedT = TypeVar("PackedT", bound="PackedTensors")


class PackedTensors:
    """Base of the layouts: what follows from their tensors alone."""

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of their fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __getitem__(self: PackedT, index: int | slice | Tensor) -> PackedT:
        return self._each(lambda tensor: tensor[index])

    def to(self: PackedT, device: torch.device) -> PackedT:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self: PackedT, change: Callable[[Tensor], Tensor]) -> PackedT:
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)  # type: ignore[type-var]


class ScaledCodes(PackedTensors):
    """Base of `Codes` and `Nibbles`: value = (code - zero) * scale, with one scale per `group` columns of a row."""

    scale: Tensor
    zero_point: Tensor | None
    group: int

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """All values; (code - zero) is exact, and its product with the scale is rounded to the scale's type."""
        return _scaled(self._shifted(self.scale.dtype), self.scale, self.group).to(dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Float32[Tensor, " rows"] | None]:
        """With one scale per row, the codes (exact in every type) and the scales; else, and in float16, the values."""
        if self.scale.shape[-1] > 1 or dtype == torch.float16:
            return self.unpack(dtype), None
        return self._shifted(dtype), self.scale[..., 0].float()

    def _shifted(self, dtype: torch.dtype) -> Tensor:
        """Codes minus their zero points, in a new tensor."""
        values = self.codes_as(dtype)
        if self.zero_point is None:
            return values
        return values.sub_(_spread(self.zero_point.to(dtype), self.group, values.shape[-1]))

    def codes_as(self, dtype: torch.dtype) -> Tensor:
        """The codes as floats, in a new tensor."""
        raise NotImplementedError


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class HalfFloats(PackedTensors):
    """16-bit floats that stay in memory as stored, while products are computed in a wider type."""

    values: Float[Tensor, "*lead rows columns"]

    def __post_init__(self) -> None:
        assert self.values.dtype in HALVES, self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """All values, exact in any wider type."""
        return self.values.to(dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, None]:
        """The values: there is no scale."""
        return self.values.to(dtype), None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Codes(ScaledCodes):
    """A byte per value: float8_e4m3fn or int8. The last group of a row may be shorter than the others."""

    codes: Shaped[Tensor, "*lead rows columns"]
    scale: Float[Tensor, "*lead rows groups"]
    group: int
    zero_point: Int8[Tensor, "*lead rows groups"] | None = None

    def __post_init__(self) -> None:
        assert self.codes.dtype in (E4M3, torch.int8), self.codes.dtype
        assert self.scale.shape[-1] == -(-self.codes.shape[-1] // self.group), "a scale for every group"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def codes_as(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype) if self.codes.dtype == torch.int8 else _from_e4m3(self.codes, dtype)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Nibbles(ScaledCodes):
    """Two 4-bit integers per byte, each stored plus 8."""

    packed: UInt8[Tensor, "*lead rows bytes"]
    scale: Float[Tensor, "*lead rows groups"]
    group: int
    zero_point: Int8[Tensor, "*lead rows groups"] | None = None

    def __post_init__(self) -> None:
        assert self.scale.shape[-1] * self.group == 2 * self.packed.shape[-1], "a scale for every group"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    def unpack(self, dtype: torch.dtype) -> Tensor:
        if self.scale.dtype == torch.float16 or not unpacking.supports(self.packed, self.group, dtype):
            return super().unpack(dtype)
        rounded = self.scale.dtype == torch.bfloat16
        return unpacking.unpack_4bit(
            self.packed, _values("int4"), self.group, dtype, self.scale, self.zero_point, rounded=rounded
        )

    def _shifted(self, dtype: torch.dtype) -> Tensor:
        if not unpacking.supports(self.packed, self.group, dtype):
            return super()._shifted(dtype)
        return unpacking.unpack_4bit(self.packed, _values("int4"), self.group, dtype, zero=self.zero_point)

    def codes_as(self, dtype: torch.dtype) -> Tensor:
        return _select(_pairs("int4", dtype, self.device), self.packed, dtype).view(self.shape)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Float4(PackedTensors):
    """e2m1 with a one-byte scale per group: NVFP4 (e4m3, 16 columns, a global scale) and MXFP4 (e8m0, 32 columns).

    `divides`: the scale is divided by `global_scale`, as in compressed-tensors, not multiplied by it (ModelOpt).
    """

    packed: UInt8[Tensor, "*lead rows bytes"]
    scale: UInt8[Tensor, "*lead rows groups"]
    kind: ScaleKind
    group: int
    global_scale: Float32[Tensor, "*lead rows"] | None = None
    divides: bool = False

    def __post_init__(self) -> None:
        assert self.scale.shape[-1] * self.group == 2 * self.packed.shape[-1], "a scale for every group"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """All values: the product of the two scales and the code is computed in float32."""
        scale = _select(scale_table(self.kind, self.device), self.scale, torch.float32).view(self.scale.shape)
        if self.global_scale is not None:
            scale = scale / self.global_scale[..., None] if self.divides else scale * self.global_scale[..., None]
        if unpacking.supports(self.packed, self.group, dtype):
            return unpacking.unpack_4bit(self.packed, _values("e2m1"), self.group, dtype, scale)
        values = _select(_pairs("e2m1", torch.float32, self.device), self.packed, torch.float32)
        return _scaled(values.view(self.shape), scale, self.group).to(dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Float32[Tensor, " rows"] | None]:
        """e2m1 * e4m3 needs 6 bits, so it is exact, and the row's scale is the global one; in float16, the values."""
        if dtype == torch.float16:
            return self.unpack(dtype), None
        if unpacking.supports(self.packed, self.group, dtype):
            scales = scale_table(self.kind, self.device)
            matrix = unpacking.unpack_4bit(self.packed, _values("e2m1"), self.group, dtype, scales, picks=self.scale)
        else:
            index = self.packed.unflatten(-1, (-1, self.group // 2)).int()
            index.add_(self.scale.int().mul_(256).unsqueeze(-1))
            matrix = _select(_products(self.kind, dtype, self.device), index, dtype).view(self.shape)
        if self.global_scale is None:
            return matrix, None
        return matrix, 1 / self.global_scale if self.divides else self.global_scale


def _scaled(values: Tensor, scale: Tensor, group: int) -> Tensor:
    return values.mul_(_spread(scale, group, values.shape[-1]))


def _spread(scale: Tensor, group: int, columns: int) -> Tensor:
    """The scale of every column, materialised: broadcasting one over every 16 columns takes three times as long."""
    if scale.shape[-1] == 1:
        return scale
    return scale[..., None].expand(*scale.shape, group).flatten(-2)[..., :columns]


def _from_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 codes as floats; on a CPU torch's own cast takes ten times as long, and the table several times the C++."""
    if unpacking.reads_e4m3(codes, dtype):
        return unpacking.unpack_e4m3(codes, dtype)
    if codes.shape[-1] % 2 or codes.device.type != "cpu":
        return codes.to(dtype)
    index = codes.contiguous().view(torch.int16).int().bitwise_and_(0xFFFF)
    return _select(_double_e4m3(dtype), index, dtype).view(codes.shape)


def _select(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The selected entries of a table, flat, as values of `dtype`."""
    return table.index_select(0, index.flatten().int()).view(dtype)


def _entries(values: Float[Tensor, "entries two"]) -> Shaped[Tensor, " entries"]:
    """Pairs of floats as one integer each, which index_select gathers fastest."""
    return values.contiguous().view(torch.int64 if values.dtype == torch.float32 else torch.int32).flatten()


def _two(low: Tensor, high: Tensor) -> Tensor:
    """All pairs of a low and a high half, at the index high * len(low) + low."""
    return torch.stack((low.repeat(len(high)), high.repeat_interleave(len(low))), dim=-1)


def _all_e4m3() -> Float32[Tensor, " 256"]:
    return torch.arange(256, dtype=torch.uint8).view(E4M3).float()


@cache
def _double_e4m3(dtype: torch.dtype) -> Tensor:
    """The e4m3 values of every two bytes."""
    return _entries(_two(_all_e4m3(), _all_e4m3()).to(dtype))


@cache
def _values(kind: Literal["int4", "e2m1"]) -> Float32[Tensor, " 16"]:
    """The value of every half byte."""
    return torch.tensor(E2M1 if kind == "e2m1" else range(-8, 8), dtype=torch.float32)


@cache
def _pairs(kind: Literal["int4", "e2m1"], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of the two halves of every byte."""
    values = _values(kind)
    return _entries(_two(values, values).to(dtype)).to(device)


@cache
def scale_table(kind: ScaleKind, device: torch.device) -> Float32[Tensor, " 256"]:
    """The scale that every byte encodes."""
    if kind == "e4m3":
        return _all_e4m3().to(device)
    return torch.ldexp(torch.ones(256, dtype=torch.float32), torch.arange(256) - 127).to(device)


@cache
def _products(kind: ScaleKind, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two products of every scale byte and every byte of e2m1 codes."""
    pairs = _two(_values("e2m1"), _values("e2m1"))
    scales = scale_table(kind, torch.device("cpu"))
    return _entries((scales[:, None, None] * pairs).flatten(0, 1).to(dtype)).to(device)
