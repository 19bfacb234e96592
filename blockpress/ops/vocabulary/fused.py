"""A step's pass over the vocabulary in C++, a tile of tokens at a time (`ops/native/head.h`): on a CPU, float32, and
bfloat16 where the processor multiplies it on matrix tiles.

    hidden [n, hidden] --tile of the head--> products --statistics, weights--> mean embedding += weights @ tile

Products are never in memory: a tile's are used up while they, and the tile itself, lie in the caches. `blocks.py` reads
the weight four times for a canvas, and writes and reads its products. In bfloat16 products are computed twice: on
tiles that costs less.

Invariant: a row's results are those of `blocks.py`, but for rounding, and do not depend on the other rows.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from blockpress.costs import FUSED
from blockpress.ops.cpu import bridge
from blockpress.ops.vocabulary import native
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
        *((name, ctypes.c_void_p) for name in ("tables", "table", "terms")),
        *((name, ctypes.c_void_p) for name in ("argmax", "sample", "entropy", "mean", "room")),
        ("cap", ctypes.c_float),
    ]


def readable(hidden: Tensor, weight: Weight) -> bridge.Matrix | None:
    """The weight as C++ reads it; None where the pass is not for these: a small vocabulary, or another type."""
    library = _library()
    if library is None or weight.shape[0] < FUSED or hidden.dtype not in bridge.SUFFIXES:
        return None
    found = bridge.for_product(hidden, weight)
    if found is None or found.kind == bridge.INT8_ROWS:
        return None
    return found if hidden.dtype == torch.float32 or bridge.takes_tiles(found) else None


def sample_from_hidden(
    hidden: Float[Tensor, "n hidden"],
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
    tables = native.tables(hidden.dtype, weight.rows, cap, temperature)
    terms = None if tables is None else _terms(tables[0])
    suffix = bridge.SUFFIXES[hidden.dtype]
    ids, where = _ascending(banned, n)
    argmax, sample = torch.empty(2, n, dtype=torch.int64)
    entropy = torch.empty(n)
    embedded = torch.empty(n, columns) if mean else None
    room = torch.empty(getattr(library, f"room_for_head_{suffix}")(n, weight.rows, columns, mean), dtype=torch.uint8)
    head = Head(
        hidden=hidden.data_ptr(),
        rows=n,
        weight=weight,
        temperature=temperature.data_ptr(),
        uniform=uniform.data_ptr(),
        banned=ids.data_ptr(),
        where=where.data_ptr(),
        bans=len(ids),
        tables=None if tables is None else tables[0].data_ptr(),
        table=None if tables is None else tables[1].data_ptr(),
        terms=None if terms is None else terms.data_ptr(),
        argmax=argmax.data_ptr(),
        sample=sample.data_ptr(),
        entropy=entropy.data_ptr(),
        mean=None if embedded is None else embedded.data_ptr(),
        room=room.data_ptr(),
        cap=cap or 0.0,
    )
    getattr(library, f"sample_from_hidden_{suffix}")(ctypes.byref(head), torch.get_num_threads())
    return SampleStats(argmax, sample, entropy, None if embedded is None else embedded.to(hidden.dtype))


def _terms(tables: Float32[Tensor, "kinds three codes"]) -> Float32[Tensor, "kinds codes four"]:
    """What one product adds to the sums of its row: its weight, that times its scaled logit, its belief, and 0."""
    logits, weights, beliefs = tables.unbind(1)
    terms = tables.new_zeros(*logits.shape, 4)
    terms[..., 0], terms[..., 2] = weights, beliefs
    torch.mul(weights, logits, out=terms[..., 1]).nan_to_num_(0)  # of a banned token, whose logit is -inf
    return terms


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
        for suffix in bridge.SUFFIXES.values():
            function = getattr(library, f"sample_from_hidden_{suffix}")
            function.argtypes, function.restype = [ctypes.POINTER(Head), ctypes.c_int], None
            room = getattr(library, f"room_for_head_{suffix}")
            room.argtypes, room.restype = [*[ctypes.c_long] * 3, ctypes.c_int], ctypes.c_long
    return library
