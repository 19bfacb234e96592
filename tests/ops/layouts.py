"""Packed weights of every layout, of any size, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockpress.ops.packed import Codes, Float4, HalfFloats, Nibbles

Layout = Codes | Nibbles | Float4 | HalfFloats
Make = Callable[[tuple[int, ...], int], Layout]
E4M3 = torch.float8_e4m3fn


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def byte(draw: torch.Generator, *shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=draw)


def scale(draw: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=draw) * 0.2 + 0.01).to(dtype)


def fp8(shape: tuple[int, ...], seed: int, group: int | None = None) -> Codes:
    draw, size = generator(seed), group or shape[-1]
    codes = byte(draw, *shape)
    codes[(codes & 0x7F) == 0x7F] = 3  # the two codes that are NaN
    return Codes(codes=codes.view(E4M3), scale=scale(draw, *shape[:-1], -(-shape[-1] // size)), group=size)


def int8(shape: tuple[int, ...], seed: int, group: int | None = None, asymmetric: bool = False) -> Codes:
    draw, size = generator(seed), group or shape[-1]
    grid = (*shape[:-1], -(-shape[-1] // size))
    zero = byte(draw, *grid).view(torch.int8) if asymmetric else None
    scales = scale(draw, *grid, dtype=torch.bfloat16 if group else torch.float32)
    return Codes(codes=byte(draw, *shape).view(torch.int8), scale=scales, group=size, zero_point=zero)


def int4(shape: tuple[int, ...], seed: int, group: int | None = None, asymmetric: bool = False) -> Nibbles:
    draw, size = generator(seed), group or shape[-1]
    grid = (*shape[:-1], shape[-1] // size)
    zero = torch.randint(-8, 8, grid, dtype=torch.int8, generator=draw) if asymmetric else None
    packed = byte(draw, *shape[:-1], shape[-1] // 2)
    return Nibbles(
        packed=packed,
        scale=scale(draw, *grid, dtype=torch.bfloat16 if group else torch.float32),
        group=size,
        zero_point=zero,
    )


def nvfp4(shape: tuple[int, ...], seed: int, divides: bool = False) -> Float4:
    draw = generator(seed)
    packed, scales = byte(draw, *shape[:-1], shape[-1] // 2), byte(draw, *shape[:-1], shape[-1] // 16, high=0x7F)
    outer = scale(draw, *shape[:-1])
    return Float4(
        packed=packed,
        scale=scales,
        kind="e4m3",
        group=16,
        global_scale=1 / outer if divides else outer,
        divides=divides,
    )


def mxfp4(shape: tuple[int, ...], seed: int) -> Float4:
    draw = generator(seed)
    packed, scales = (
        byte(draw, *shape[:-1], shape[-1] // 2),
        byte(draw, *shape[:-1], shape[-1] // 32, low=110, high=131),
    )
    return Float4(packed=packed, scale=scales, kind="e8m0", group=32)


def halves(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> HalfFloats:
    return HalfFloats(values=torch.randn(shape, generator=generator(seed)).to(dtype))


LAYOUTS: dict[str, Make] = {
    "fp8": fp8,
    "fp8 groups": lambda shape, seed: fp8(shape, seed, group=24),
    "int8": int8,
    "int8 asymmetric": lambda shape, seed: int8(shape, seed, asymmetric=True),
    "int8 groups": lambda shape, seed: int8(shape, seed, group=16, asymmetric=True),
    "int4": int4,
    "int4 asymmetric": lambda shape, seed: int4(shape, seed, asymmetric=True),
    "int4 groups": lambda shape, seed: int4(shape, seed, group=32),
    "int4 groups asymmetric": lambda shape, seed: int4(shape, seed, group=8, asymmetric=True),
    "nvfp4": nvfp4,
    "nvfp4 divided": lambda shape, seed: nvfp4(shape, seed, divides=True),
    "mxfp4": mxfp4,
    "bfloat16": halves,
    "float16": lambda shape, seed: halves(shape, seed, torch.float16),
}
"""Makers by name; the columns of a shape are a multiple of 32."""
