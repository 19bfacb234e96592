"""Weights in GGUF's block layouts: a row is a sequence of blocks, each of which holds its own scales.

    Q8_0  32 values   d f16 | 32 x int8                                 y = d*q
    Q4_0  32 values   d f16 | 16 bytes of nibbles                       y = d*(q-8)
    Q4_1  32 values   d f16 | m f16 | 16 bytes of nibbles               y = d*q + m
    Q5_0  32 values   d f16 | 4 bytes of fifth bits | 16 of nibbles     y = d*(q-16)
    Q5_1  32 values   d f16 | m f16 | fifth bits | nibbles              y = d*q + m
    Q4_K  256 values  d f16 | dmin f16 | 12 bytes: 8 scales s and 8 minima l of 6 bits | 128 of nibbles
                                                                        y = (d*s)*q - (dmin*l), s and l a run of 32
    Q5_K  256 values  as Q4_K, with 32 bytes of fifth bits before the nibbles
    Q6_K  256 values  128 bytes of nibbles | 64 of upper bits | 16 x int8 scales s | d f16
                                                                        y = (d*s)*(q-32), s a run of 16

Products are float32, in the order written above. A caller adds a layout of its own by passing its `unpack`.

Invariant: `unpack(torch.float32)` equals the dequantiser of the `gguf` package to the last bit, for any bytes.

Run it:  python -m pytest tests/ops/test_blocks.py
Source: ggml's block structs as the `gguf` package documents and dequantises them (`gguf.quants`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

Unpack = Callable[[UInt8[Tensor, "blocks bytes"]], Float32[Tensor, "blocks values"]]

CHUNK = 1 << 20
"""Values unpacked at once on a CPU, 4 MiB of float32: with fewer, calls cost more; with more, cache misses do."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A block of `bytes` bytes that holds `values` values, and the function that unpacks many blocks."""

    name: str
    values: int
    bytes: int
    unpack: Unpack


@final
class Blocks:
    """A packed weight (`ops.weight.Packed`): `data` is uint8 [..., blocks of a row * bytes of a block]."""

    def __init__(self, data: UInt8[Tensor, "*rows bytes"], layout: Layout) -> None:
        assert data.shape[-1] % layout.bytes == 0, "a row is a whole number of blocks"
        self.data, self.layout = data, layout

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], self.data.shape[-1] // self.layout.bytes * self.layout.values)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __getitem__(self, index: int | slice | Tensor) -> Blocks:
        return Blocks(self.data[index], self.layout)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The values as `dtype`, each rounded once from the float32 value that the layout defines."""
        blocks = self.data.reshape(-1, self.layout.bytes)
        # On a GPU many small launches would cost more than its caches save.
        step = CHUNK // self.layout.values if blocks.device.type == "cpu" else max(1, len(blocks))
        out = torch.empty(len(blocks), self.layout.values, dtype=dtype, device=blocks.device)
        for start in range(0, len(blocks), step):
            out[start : start + step] = self.layout.unpack(blocks[start : start + step])
        return out.view(self.shape)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, None]:
        """The values and no scale: scales belong to blocks, not to rows."""
        return self.unpack(dtype), None

    def to(self, device: torch.device) -> Blocks:
        return Blocks(self.data.to(device), self.layout)

    def __repr__(self) -> str:
        return f"Blocks({self.layout.name}, {list(self.shape)}, {self.device})"


def _halves(blocks: Tensor, start: int) -> Float32[Tensor, "blocks 1"]:
    """The float16 at byte `start` of every block, as float32."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _lanes(packed: UInt8[Tensor, "*runs bytes"]) -> Int64[Tensor, "*runs lanes"]:
    """Bytes as lanes of eight: one operation works on eight values, three times as fast as byte by byte."""
    return packed.contiguous().view(torch.int64)


def _repeat_byte(byte: int) -> int:
    """A lane of eight copies of `byte`."""
    return int.from_bytes(bytes([byte] * 8), "little")


def _nibbles(packed: UInt8[Tensor, "blocks runs width"]) -> Int64[Tensor, "blocks runs 2 lanes"]:
    """The low nibbles of every run of bytes, then the high nibbles."""
    lanes = _lanes(packed)
    out = torch.empty(*lanes.shape[:2], 2, lanes.shape[2], dtype=torch.int64, device=lanes.device)
    torch.bitwise_and(lanes, _repeat_byte(15), out=out[:, :, 0])
    torch.bitwise_and(lanes >> 4, _repeat_byte(15), out=out[:, :, 1])
    return out


@cache
def _bit_table(device: torch.device) -> Int64[Tensor, 256]:
    """For every byte, its eight bits as eight bytes, each 0 or 16."""
    rows = [[16 * (byte >> bit & 1) for bit in range(8)] for byte in range(256)]
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int64).flatten().to(device)


def _fifth_bits(packed: UInt8[Tensor, "blocks 4"]) -> Int64[Tensor, "blocks 1 2 2"]:
    """What bit i of 32 adds to value i: 0 or 16."""
    return _bit_table(packed.device)[packed.long()].view(-1, 1, 2, 2)


def _floats(codes: Int64[Tensor, "blocks *runs lanes"]) -> Float32[Tensor, "blocks values"]:
    """Codes from 0 to 63, held in lanes, as floats."""
    return codes.flatten(1).view(torch.int8).float()


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    return _floats(_nibbles(blocks[:, None, 2:])).sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _floats(_nibbles(blocks[:, None, 4:])).mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, None, 6:]).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    return _floats(codes).sub_(16).mul_(_halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, None, 8:]).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    return _floats(codes).mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _six_bit(blocks: Tensor) -> tuple[Float32[Tensor, "blocks 8 1"], Float32[Tensor, "blocks 8 1"]]:
    """Scales and minima of the eight runs of a Q4_K or Q5_K block.

    Of the 12 bytes, the first four hold scales 0 to 3 and the next four minima 0 to 3, 6 bits each. Their upper two
    bits are the upper bits of scales and minima 4 to 7, whose lower four bits are the nibbles of the last four bytes.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1).float()
    least = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1).float()
    return scales.mul_(_halves(blocks, 0))[..., None], least.mul_(_halves(blocks, 2))[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, least = _six_bit(blocks)
    values = _floats(_nibbles(blocks[:, 16:].unflatten(1, (4, 32)))).view(-1, 8, 32)
    return values.mul_(scales).sub_(least).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, least = _six_bit(blocks)
    codes, fifth = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2), _lanes(blocks[:, 16:48])
    for run in range(8):
        moved = fifth << (4 - run) if run < 4 else fifth >> (run - 4)
        codes[:, run] |= moved & _repeat_byte(16)
    return _floats(codes).view(-1, 8, 32).mul_(scales).sub_(least).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    lower = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).unflatten(3, (2, 4)).flatten(2, 3)
    upper = _lanes(blocks[:, 128:192].unflatten(1, (2, 32)))
    for run in range(4):
        moved = upper << (4 - 2 * run) if run < 2 else upper >> (2 * run - 4)
        lower[:, :, run] |= moved & _repeat_byte(48)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_halves(blocks, 208))
    return _floats(lower).sub_(32).view(-1, 16, 16).mul_(scales[..., None]).flatten(1)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(name="Q8_0", values=32, bytes=34, unpack=_q8_0),
        Layout(name="Q4_0", values=32, bytes=18, unpack=_q4_0),
        Layout(name="Q4_1", values=32, bytes=20, unpack=_q4_1),
        Layout(name="Q5_0", values=32, bytes=22, unpack=_q5_0),
        Layout(name="Q5_1", values=32, bytes=24, unpack=_q5_1),
        Layout(name="Q4_K", values=256, bytes=144, unpack=_q4_k),
        Layout(name="Q5_K", values=256, bytes=176, unpack=_q5_k),
        Layout(name="Q6_K", values=256, bytes=210, unpack=_q6_k),
    )
}
"""The layouts found in shared files: those of Q4_K_M, Q5_K_M, Q6_K and Q8_0 files and their fallbacks."""
