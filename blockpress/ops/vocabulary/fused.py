"""A step's pass over the vocabulary in C++, a tile of tokens at a time (`ops/native/head.h`): float32, on a CPU.

    hidden [n, hidden] --tile of the head--> products --statistics, weights--> mean embedding += weights @ tile

Products are never in memory: a tile's are used up while they, and the tile itself, lie in the caches. `blocks.py` reads
the weight four times for a canvas, and writes and reads its products.

Invariant: a row's results are those of `blocks.py`, but for rounding, and do not depend on the other rows.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from jaxtyping import Bool, Float32, Float64, Int
from torch import Tensor

from blockpress.costs import FUSED
from blockpress.ops.cpu import bridge
from blockpress.ops.vocabulary.types import BannedTokens, SampleStats
from blockpress.ops.weight import Weight


class Head(ctypes.Structure):
    """Mirrors `native/head.h`."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("weight", bridge.Matrix),
        *((name, ctypes.c_void_p) for name in ("temperature", "uniform", "banned", "where")),
        ("bans", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("argmax", "sample", "entropy", "mean", "room")),
        ("cap", ctypes.c_float),
    ]


def readable(hidden: Tensor, weight: Weight) -> bridge.Matrix | None:
    """The weight as C++ reads it; None where the pass is not for these: the vocabulary is small, or not float32."""
    if hidden.dtype != torch.float32 or weight.shape[0] < FUSED or _library() is None:
        return None
    found = bridge.for_product(hidden, weight)
    return None if found is None or found.kind == bridge.INT8_ROWS else found


def sample_from_hidden(
    hidden: Float32[Tensor, "n hidden"],
    weight: bridge.Matrix,
    *,
    cap: float | None,
    temperature: Float32[Tensor, " n"],
    uniform: Float64[Tensor, " n"],
    mean: bool,
    banned: BannedTokens | None = None,
) -> SampleStats:
    """See `step.sample_from_hidden`; `signal` is the mean embedding without its scale, None unless `mean`."""
    library = _library()
    assert library is not None and hidden.shape[1] == weight.columns, "C++ would read beyond the rows"
    n, columns = hidden.shape
    hidden, temperature, uniform = hidden.contiguous(), temperature.contiguous(), uniform.contiguous()
    ids, where = _ascending(banned, n)
    argmax, sample = torch.empty(2, n, dtype=torch.int64)
    entropy = torch.empty(n)
    embedded = torch.empty(n, columns) if mean else None
    room = torch.empty(library.room_for_head(n, weight.rows, columns, mean), dtype=torch.uint8)
    head = Head(
        hidden=hidden.data_ptr(),
        rows=n,
        weight=weight,
        temperature=temperature.data_ptr(),
        uniform=uniform.data_ptr(),
        banned=ids.data_ptr(),
        where=where.data_ptr(),
        bans=len(ids),
        argmax=argmax.data_ptr(),
        sample=sample.data_ptr(),
        entropy=entropy.data_ptr(),
        mean=None if embedded is None else embedded.data_ptr(),
        room=room.data_ptr(),
        cap=cap or 0.0,
    )
    library.sample_from_hidden(ctypes.byref(head), torch.get_num_threads())
    return SampleStats(argmax, sample, entropy, embedded)


def _ascending(banned: BannedTokens | None, n: int) -> tuple[Int[Tensor, " ids"], Bool[Tensor, "n ids"]]:
    """The ids in ascending order: a tile's are found among them."""
    if banned is None:
        return torch.empty(0, dtype=torch.int64), torch.empty(n, 0, dtype=torch.bool)
    ids, order = banned[0].sort()
    return ids, banned[1][:, order].contiguous()


@cache
def _library() -> ctypes.CDLL | None:
    library = bridge.library()
    if library is not None:
        library.sample_from_hidden.argtypes = [ctypes.POINTER(Head), ctypes.c_int]
        library.sample_from_hidden.restype = None
        library.room_for_head.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        library.room_for_head.restype = ctypes.c_long
    return library
