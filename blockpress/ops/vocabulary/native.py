"""The pass over a block of products in C++ (`ops/native/vocabulary.cpp`): bfloat16 and float32, on a CPU.

The products are read in place, and full probabilities are written over them. bfloat16 of a large vocabulary is read
through a table of the scaled logits of all 65,536 values, computed here by torch: equal to the reference to the last
bit. Whether a row is depends on the vocabulary and on its own temperature, not on the other rows.

Invariant: `block_stats` and `passes.block_stats` give the same `BlockStats`.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from blockpress.costs import TABLED
from blockpress.ops import compiled
from blockpress.ops.vocabulary.passes import LIMITS, BlockStats, Probabilities, Sparse, scaled_logits
from blockpress.ops.vocabulary.plain import TILE
from blockpress.ops.vocabulary.types import ClassBias, ClassStats, TokenClasses

LARGEST = 80.0
"""The largest logit for which its exp, that of its negative, and sums of 64 times both the exp and the logit are normal
float32 numbers."""

_PROBABILITIES: dict[Probabilities, int] = {None: 0, "whole": 1, "sparse": 2, "few": 2}


class Block(ctypes.Structure):
    """A block of rows; mirrors `native/vocabulary.cpp`."""

    _fields_ = [
        ("products", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("vocab", "tile", "most")),
        *((name, ctypes.c_void_p) for name in ("temperature", "uniform", "tables", "table")),
        *((name, ctypes.c_void_p) for name in ("argmax", "sample", "entropy", "total", "counts", "ids", "shares")),
        ("dropped", ctypes.c_double),
        ("cap", ctypes.c_float),
        ("belief", ctypes.c_int32),
        ("classes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("class_of", "members", "starts", "bias", "mass", "best", "token")),
    ]


def supports(product: Tensor) -> bool:
    """Whether C++ can read these products here."""
    return product.dtype in (torch.bfloat16, torch.float32) and product.device.type == "cpu" and _library() is not None


def block_stats(
    product: Float[Tensor, "rows vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    uniform: Float64[Tensor, " rows"] | None = None,
    probabilities: Probabilities = None,
    bias: ClassBias | None = None,
) -> BlockStats:
    """`passes.block_stats` in C++; full probabilities overwrite the products, and with a bias float32 logits do."""
    rows = len(product)
    # Every tensor stays bound to a name for as long as C++ holds a pointer to it.
    uniform = None if uniform is None else uniform.contiguous()
    argmax, sample = torch.empty(2, rows, dtype=torch.int64)
    entropy, total = torch.empty(2, rows, dtype=torch.float32)
    sparse, most, dropped = None, 0, 0.0
    if probabilities == "sparse" or probabilities == "few":
        most, dropped = LIMITS[probabilities]
        sparse = Sparse(
            counts=torch.empty(rows, dtype=torch.int64),
            ids=torch.empty(rows, most, dtype=torch.int64),
            shares=torch.empty(rows, most, dtype=torch.float32),
        )
    values = None if bias is None else bias.values.contiguous()
    block = Block(
        most=most,
        dropped=dropped,
        uniform=_pointer(uniform),
        argmax=argmax.data_ptr(),
        sample=sample.data_ptr(),
        entropy=entropy.data_ptr(),
        total=total.data_ptr(),
        counts=None if sparse is None else sparse.counts.data_ptr(),
        ids=None if sparse is None else sparse.ids.data_ptr(),
        shares=None if sparse is None else sparse.shares.data_ptr(),
        belief=_PROBABILITIES[probabilities],
        bias=_pointer(values),
    )
    _see(block, product, cap, temperature, None if bias is None else bias.classes)
    return BlockStats(
        argmax, None if uniform is None else sample, entropy, total, product if probabilities else None, sparse
    )


def class_stats(
    product: Float[Tensor, "rows held"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    classes: TokenClasses,
) -> ClassStats:
    """`passes.class_stats` in C++."""
    shape = len(product), len(classes)
    stats = ClassStats(
        torch.empty(shape, dtype=torch.float64), torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    )
    block = Block(mass=stats.mass.data_ptr(), best=stats.best.data_ptr(), token=stats.token.data_ptr())
    _see(block, product, cap, temperature, classes)
    return stats


def _see(
    block: Block,
    product: Float[Tensor, "rows vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    classes: TokenClasses | None,
) -> None:
    """Run C++ over a block that has its outputs; what it reads is added here."""
    library = _library()
    assert library is not None and product.is_contiguous()
    rows, vocab = product.shape
    temperature = temperature.contiguous()
    known = tables(product.dtype, vocab, cap, temperature)
    block.products, block.vocab, block.tile = product.data_ptr(), vocab, min(TILE, vocab)
    block.temperature, block.cap = temperature.data_ptr(), cap or 0.0
    if known is not None:
        block.tables, block.table = known[0].data_ptr(), known[1].data_ptr()
    if classes is not None:
        assert len(classes.class_of) == vocab, "a class for every column"
        block.classes, block.class_of = len(classes), classes.class_of.data_ptr()
        block.members, block.starts = classes.members.data_ptr(), classes.starts.data_ptr()
    library.see(ctypes.byref(block), product.dtype == torch.bfloat16, rows, torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def combine_sparse(sparse: Sparse, weight: Float[Tensor, "vocab hidden"]) -> Float32[Tensor, "rows hidden"]:
    """`blocks.combine_sparse` in C++, in float32."""
    library = _library()
    assert library is not None and weight.is_contiguous()
    rows, hidden = len(sparse.counts), weight.shape[1]
    out = torch.empty(rows, hidden, dtype=torch.float32)
    block = Block(
        most=sparse.ids.shape[1],
        counts=sparse.counts.data_ptr(),
        ids=sparse.ids.data_ptr(),
        shares=sparse.shares.data_ptr(),
    )
    narrow = weight.dtype == torch.bfloat16

    values = int(sparse.counts.clamp(min=0).sum())
    arguments = (weight.data_ptr(), narrow, hidden, out.data_ptr(), rows, values)
    library.combine(ctypes.byref(block), *arguments, torch.get_num_threads())
    return out


def tables(
    dtype: torch.dtype, vocab: int, cap: float | None, temperature: Float32[Tensor, " rows"]
) -> tuple[Float32[Tensor, "kinds three codes"], Int[Tensor, " rows"]] | None:
    """The table of each temperature for products of that dtype, and each row's index among them: -1 where its exp would
    overflow.

    None where tables cost more than they save.
    """
    if dtype != torch.bfloat16 or cap is None or vocab < TABLED:
        return None
    kinds, table = temperature.unique(return_inverse=True)
    stacked = torch.stack([_table(cap, kind) for kind in kinds.tolist()])
    return stacked, torch.where(cap > LARGEST * temperature, -1, table)


@lru_cache(maxsize=16)
def _table(cap: float, temperature: float) -> Float32[Tensor, "three codes"]:
    """For every bfloat16: the scaled logit, its exp, and its exp when rounded."""
    codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).roll(1 << 15).view(torch.bfloat16)
    [logits] = scaled_logits(codes[None], cap, torch.tensor([temperature]))
    return torch.stack((logits, logits.exp(), logits.to(torch.bfloat16).float().exp()))


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
