"""Products with a weight matrix, whether it lies in memory as floats or packed into fewer bits.

A packed weight (`ops/weight.py`) is unpacked in tiles of rows, where it is used, and the tile is dropped: memory stays
that of the packed bytes and one tile.

Invariant: `lookup` and `combine` give for a packed weight what they give for its `unpack`ed floats; so does `linear`,
but that it rounds after the sum what `unpack` rounds before (code times scale), where a row has one scale.

Run it:  python -m pytest tests/ops/test_linear.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.nn import functional as F

from blockpress.hardware import float32_way
from blockpress.ops import integers
from blockpress.ops.cpu import bridge
from blockpress.ops.cpu import products as in_cpp
from blockpress.ops.packed import HalfFloats
from blockpress.ops.weight import Packed

TILE = 1 << 20
"""Most values that are unpacked at once on a CPU, 2 MiB in bfloat16, and half as many in float32: they stay in its
caches, and the allocator keeps their memory (tiles of 4 MiB take twice as long a value and more)."""

GPU_TILE = 1 << 24
"""The same on other devices, where every launch costs time."""


def linear(x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"] | Packed) -> Float[Tensor, "*rows out"]:
    """x @ weight^T in x's type."""
    readable = bridge.for_product(x, weight)
    if readable is not None:
        return in_cpp.linear(x, readable)
    if isinstance(weight, integers.IntegerWeight):
        return integers.matmul(x, weight)
    if isinstance(weight, Tensor):
        return _onednn(x, weight) if _suits_onednn(x, weight) else F.linear(x, weight)
    parts = [part for _, part in products(x, weight)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def products(x: Float[Tensor, "*rows in"], weight: Packed) -> Iterator[tuple[int, Float[Tensor, "*rows _some"]]]:
    """`linear` a tile of the weight after another: the number of its first column, and the product."""
    for start, (matrix, scale) in _unpacked(weight, x.dtype, lambda tile: tile.factors(x.dtype)):
        part = linear(x, matrix)
        yield start, part if scale is None else (part.float() * scale).to(x.dtype)


def _unpacked(
    weight: Packed, dtype: torch.dtype, read: Callable[[Packed], tuple[Tensor, Tensor | None]]
) -> Iterator[tuple[int, tuple[Tensor, Tensor | None]]]:
    """Tiles as `read` reads them. Those of 16-bit floats lie in one buffer, each good until the next comes: the
    pages of many, which the allocator may give back after each, would take longer than the values."""
    room: Tensor | None = None
    for start, tile in tiles(weight, dtype):
        if not isinstance(tile, HalfFloats) or torch.is_grad_enabled():
            yield start, read(tile)
            continue
        if room is None:
            room = torch.empty(tile.shape, dtype=dtype, device=tile.device)
        yield start, (room[: tile.shape[0]].copy_(tile.values), None)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product for oneDNN: float32 on a processor where that is the better way, more than one row."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or torch.is_grad_enabled() or float32_way() == "mkl":
        return False
    plain = all(type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" for each in (x, weight))
    return plain and weight.dtype == torch.float32 and x.numel() // x.shape[-1] > 1


def _onednn(x: Float32[Tensor, "*rows in"], weight: Float32[Tensor, "out in"]) -> Float32[Tensor, "*rows out"]:
    """True float32, asked for this one product: the global precision switch would change what others compute."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def lookup(
    ids: Int[Tensor, "*rows"], weight: Float[Tensor, "vocab hidden"] | Packed, dtype: torch.dtype
) -> Float[Tensor, "*rows hidden"]:
    """The rows of the weight that `ids` name."""
    if isinstance(weight, Tensor):
        return F.embedding(ids, weight)
    return weight[ids.flatten()].unpack(dtype).unflatten(0, ids.shape)


def combine(
    share: Float[Tensor, "*rows vocab"], weight: Float[Tensor, "vocab hidden"] | Packed
) -> Float[Tensor, "*rows hidden"]:
    """share @ weight in share's type: the rows of the weight, each taken with its share."""
    readable = bridge.for_product(share, weight)
    if readable is not None:
        return in_cpp.combine(share, readable)
    if isinstance(weight, Tensor):
        return share @ weight
    total = torch.zeros(*share.shape[:-1], weight.shape[-1], dtype=torch.float32, device=share.device)
    for start, (rows, _) in _unpacked(weight, share.dtype, lambda tile: (tile.unpack(share.dtype), None)):
        total += share[..., start : start + len(rows)] @ rows
    return total.to(share.dtype)


def tiles(weight: Packed, dtype: torch.dtype) -> Iterator[tuple[int, Packed]]:
    """A matrix in slices of rows, each with the number of its first row and at most a tile of values (or one row).

    Args:
        dtype: that they are to be unpacked into.
    """
    rows, columns = weight.shape
    most = TILE * 2 // dtype.itemsize if weight.device.type == "cpu" else GPU_TILE
    step = max(1, most // columns)
    for start in range(0, rows, step):
        yield start, weight[start : start + step]
