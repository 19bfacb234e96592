"""Products with a weight matrix, stored as floats or packed into fewer bits.

A packed weight (`ops/weight.py`) is unpacked in tiles of rows where it is used, and the tile is dropped: memory holds
the packed bytes and one tile.

Invariant: `lookup` and `combine` give for a packed weight what they give for its `unpack`ed floats. So does `linear`,
except that where a row has one scale it rounds after the sum what `unpack` rounds before it (code times scale).

Run it:  python -m pytest tests/ops/test_linear.py
"""

from __future__ import annotations

import math
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
"""Most values unpacked at once on a CPU, 2 MiB in bfloat16, and half as many in float32: they stay in its caches, and
the allocator keeps their memory (tiles of 4 MiB take more than twice as long per value)."""

FEWEST = 16
"""Fewest rows that torch multiplies on a CPU without gradients: MKL and oneDNN have kernels of their own for 1 to 3
rows, whose sums run in another order."""

SMALL = 16 * 16 * 16
"""Most multiplications for which torch leaves 16-bit floats to a kernel of its own."""

GPU_TILE = 1 << 24
"""The same on other devices, where launches cost time."""


def linear(x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"] | Packed) -> Float[Tensor, "*rows out"]:
    """x @ weight^T in x's type."""
    readable = bridge.for_product(x, weight)
    if readable is not None:
        return in_cpp.linear(x, readable)
    if isinstance(weight, integers.IntegerWeight):
        return integers.matmul(x, weight)
    if isinstance(weight, Tensor):
        return _in_torch(_onednn if _suits_onednn(x, weight) else F.linear, x, weight)
    parts = [part for _, part in products(x, weight)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def into(out: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"]) -> None:
    """`linear` in torch, written to `out`."""
    if len(x) < _least_rows(x, weight):
        out.copy_(_in_torch(F.linear, x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


def products(x: Float[Tensor, "*rows in"], weight: Packed) -> Iterator[tuple[int, Float[Tensor, "*rows _some"]]]:
    """`linear` by tiles of the weight: the first output column of each tile, and its product."""
    for start, (matrix, scale) in _unpacked(weight, x.dtype, lambda tile: tile.factors(x.dtype)):
        part = linear(x, matrix)
        yield start, part if scale is None else (part.float() * scale).to(x.dtype)


def _unpacked(
    weight: Packed, dtype: torch.dtype, read: Callable[[Packed], tuple[Tensor, Tensor | None]]
) -> Iterator[tuple[int, tuple[Tensor, Tensor | None]]]:
    """Tiles and first rows, through `read`. Tiles of 16-bit floats share one buffer, each valid until the next: if the
    allocator returned the memory after each, faulting its pages in again would take longer than the values."""
    buffer: Tensor | None = None
    for start, tile in tiles(weight, dtype):
        if not isinstance(tile, HalfFloats) or torch.is_grad_enabled():
            yield start, read(tile)
            continue
        if buffer is None:
            buffer = torch.empty(tile.shape, dtype=dtype, device=tile.device)
        yield start, (buffer[: tile.shape[0]].copy_(tile.values), None)


def _in_torch(
    multiply: Callable[[Tensor, Tensor], Tensor], x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"]
) -> Float[Tensor, "*rows out"]:
    """x @ weight^T, never of fewer rows than FEWEST: zeros are added."""
    rows, least = math.prod(x.shape[:-1]), _least_rows(x, weight)
    if not 0 < rows < least:
        return multiply(x, weight)
    padded = x.new_zeros(least, x.shape[-1])
    padded[:rows] = x.reshape(rows, -1)
    return multiply(padded, weight)[:rows].view(*x.shape[:-1], weight.shape[0])


def _least_rows(x: Tensor, weight: Tensor) -> int:
    """The rows from which torch's bits no longer depend on their number: see FEWEST."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return 0
    return max(FEWEST, SMALL // max(1, weight.numel()) + 1)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN should compute it: float32 on a processor where oneDNN is faster."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or torch.is_grad_enabled() or float32_way() == "mkl":
        return False
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in (x, weight))
    return plain and weight.dtype == torch.float32


def _onednn(x: Float32[Tensor, "*rows in"], weight: Float32[Tensor, "out in"]) -> Float32[Tensor, "*rows out"]:
    """True float32 for this one product: the global precision switch would change other products too."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def lookup(
    ids: Int[Tensor, "*rows"], weight: Float[Tensor, "vocab hidden"] | Packed, dtype: torch.dtype
) -> Float[Tensor, "*rows hidden"]:
    """The rows `ids` of the weight."""
    if isinstance(weight, Tensor):
        return F.embedding(ids, weight)
    return weight[ids.flatten()].unpack(dtype).unflatten(0, ids.shape)


def combine(
    share: Float[Tensor, "*rows vocab"], weight: Float[Tensor, "vocab hidden"] | Packed
) -> Float[Tensor, "*rows hidden"]:
    """share @ weight in share's type: the sum of the weight's rows, each times its share."""
    readable = bridge.for_product(share, weight)
    if readable is not None:
        return in_cpp.combine(share, readable)
    if isinstance(weight, Tensor):
        return _in_torch(F.linear, share, weight.t())
    total = torch.zeros(*share.shape[:-1], weight.shape[-1], dtype=torch.float32, device=share.device)
    for start, (rows, _) in _unpacked(weight, share.dtype, lambda tile: (tile.unpack(share.dtype), None)):
        total += _in_torch(F.linear, share[..., start : start + len(rows)], rows.t())
    return total.to(share.dtype)


def tiles(weight: Packed, dtype: torch.dtype) -> Iterator[tuple[int, Packed]]:
    """A matrix in slices of rows, each with the index of its first row and at most a tile of values (or one row).

    Args:
        dtype: the type that they will be unpacked into.
    """
    rows, columns = weight.shape
    most = TILE * 2 // dtype.itemsize if weight.device.type == "cpu" else GPU_TILE
    step = max(1, most // columns)
    for start in range(0, rows, step):
        yield start, weight[start : start + step]
