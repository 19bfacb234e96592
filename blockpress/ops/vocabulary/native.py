"""The pass over a block of products in C++ (`ops/native/vocabulary.cpp`): bfloat16 and float32, on a CPU.

The products are read where they lie, and a whole belief is written over them. Many rows of bfloat16 are read through a
table of the scaled logits of all 65,536 values, made by torch here: to the last bit what the truth computes.

Invariant: `block_stats` and `in_torch.block_stats` give the same `BlockStats`.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from blockpress.ops import compiled
from blockpress.ops.vocabulary.passes import MOST, BlockStats, Probabilities, Sparse, scaled_logits
from blockpress.ops.vocabulary.plain import TILE

FEW = 1 << 19
"""Products that are read sooner than tables of 65,536 values are made."""

LARGEST = 84.0
"""The largest logit whose exp, and that of its negative, is a normal float32, and so are sums of 64 of them."""

_BELIEFS: dict[Probabilities, int] = {None: 0, "whole": 1, "sparse": 2}


class Block(ctypes.Structure):
    """A block of rows, as the C++ declares it."""

    _fields_ = [
        ("products", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("vocab", "tile", "most")),
        *((name, ctypes.c_void_p) for name in ("temperature", "uniform", "tables", "table")),
        *((name, ctypes.c_void_p) for name in ("argmax", "sample", "entropy", "total", "counts", "ids", "shares")),
        ("cap", ctypes.c_float),
        ("belief", ctypes.c_int32),
    ]


def supports(product: Tensor) -> bool:
    """Whether this version can read these products here."""
    return product.dtype in (torch.bfloat16, torch.float32) and product.device.type == "cpu" and _library() is not None


def block_stats(
    product: Float[Tensor, "rows vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    uniform: Float64[Tensor, " rows"] | None = None,
    belief: Probabilities = None,
) -> BlockStats:
    """See `passes.BlockStats`; a whole belief takes the place of the products."""
    library = _library()
    assert library is not None and product.is_contiguous()
    rows, vocab = product.shape
    temperature = temperature.contiguous()
    uniform = None if uniform is None else uniform.contiguous()
    # Tensors keep their names for as long as C++ holds pointers to them.
    tables = _tables(product, cap, temperature)
    argmax, sample = torch.empty(2, rows, dtype=torch.int64)
    entropy, total = torch.empty(2, rows, dtype=torch.float32)
    sparse = None
    if belief == "sparse":
        sparse = Sparse(
            counts=torch.empty(rows, dtype=torch.int64),
            ids=torch.empty(rows, MOST, dtype=torch.int64),
            shares=torch.empty(rows, MOST, dtype=torch.float32),
        )
    block = Block(
        products=product.data_ptr(),
        vocab=vocab,
        tile=min(TILE, vocab),
        most=MOST,
        temperature=temperature.data_ptr(),
        uniform=None if uniform is None else uniform.data_ptr(),
        tables=None if tables is None else tables[0].data_ptr(),
        table=None if tables is None else tables[1].data_ptr(),
        argmax=argmax.data_ptr(),
        sample=sample.data_ptr(),
        entropy=entropy.data_ptr(),
        total=total.data_ptr(),
        counts=None if sparse is None else sparse.counts.data_ptr(),
        ids=None if sparse is None else sparse.ids.data_ptr(),
        shares=None if sparse is None else sparse.shares.data_ptr(),
        cap=cap or 0.0,
        belief=_BELIEFS[belief],
    )
    narrow = product.dtype == torch.bfloat16
    library.see(ctypes.byref(block), narrow, rows, torch.get_num_threads())
    return BlockStats(argmax, None if uniform is None else sample, entropy, total, product if belief else None, sparse)


def combine_sparse(sparse: Sparse, weight: Float[Tensor, "vocab hidden"]) -> Float32[Tensor, "rows hidden"]:
    """The sum of the embedding rows of every sparse belief, each with its share; 0 for a row without one."""
    library = _library()
    assert library is not None and weight.is_contiguous()
    rows, hidden = len(sparse.counts), weight.shape[1]
    out = torch.empty(rows, hidden)
    block = Block(
        most=sparse.ids.shape[1],
        counts=sparse.counts.data_ptr(),
        ids=sparse.ids.data_ptr(),
        shares=sparse.shares.data_ptr(),
    )
    narrow = weight.dtype == torch.bfloat16

    values = int(sparse.counts.clamp(min=0).sum())
    given = (weight.data_ptr(), narrow, hidden, out.data_ptr(), rows, values)
    library.combine(ctypes.byref(block), *given, torch.get_num_threads())
    return out


def _tables(
    product: Float[Tensor, "rows vocab"], cap: float | None, temperature: Float32[Tensor, " rows"]
) -> tuple[Float32[Tensor, "kinds three codes"], Int[Tensor, " rows"]] | None:
    """Of every bfloat16 at each temperature: its scaled logit, the exp of it, and of it rounded; and each row's kind.

    None where tables cost more than they save, or where exp leaves the floats.
    """
    if product.dtype != torch.bfloat16 or cap is None or product.numel() < FEW:
        return None
    kinds, table = temperature.unique(return_inverse=True)
    if product.numel() < FEW * len(kinds) or cap > LARGEST * float(kinds[0]):
        return None
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).roll(1 << 15).view(torch.bfloat16)
    logits = scaled_logits(every.expand(len(kinds), -1), cap, kinds)
    return torch.stack((logits, logits.exp(), logits.to(torch.bfloat16).float().exp()), dim=1), table


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library("vocabulary")
    if library is not None:
        block, long, number = ctypes.POINTER(Block), ctypes.c_int64, ctypes.c_int32
        library.see.argtypes = [block, number, long, number]
        library.see.restype = None
        library.combine.argtypes = [block, ctypes.c_void_p, number, long, ctypes.c_void_p, long, long, number]
        library.combine.restype = None
    return library
