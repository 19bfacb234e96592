"""The self-conditioning embedding: the expected embedding under a row's probabilities, from `head.py`'s product.

    exact     softmax_weights: product --> probabilities in the same memory, rounded as the reference rounds them
              multiply over splits of the vocabulary --> float32 parts --> reduce_split_k: sum, rounded, times scale
    sparse    select_top: tokens of probability above LEAST, at most KEPT per row, that cover nearly all of its mass
              weighted_sum: their embedding rows, weighted; a row that they do not cover takes the exact path

`order` lists the rows that take the exact path and `amount` is their number: both are on the device, so that no step
waits for the host, and programs past the number return at once.

Invariant: sums have a fixed order, so the same inputs give the same embedding; no memory grows with rows x vocabulary
except the product itself.
Run it:  TRITON_INTERPRET=1 python -m pytest tests/ops/kernels/test_vocabulary.py
"""

# A kernel's constants are in capitals, and its other arguments have no types, as in Triton's own code.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton.language as tl

from blockpress.ops.kernels.head import scaled_logits
from blockpress.ops.kernels.jit import cdiv, kernel, power

LEAST = 2.0**-17
"""The sparse form leaves out tokens of a smaller probability ..."""

KEPT = 128
"""... and keeps at most this many; a row that needs more takes the exact path ..."""

DROPPED = 2.0**-9
"""... and so does a row that would leave out this much or more: half a step of bfloat16 below 1."""

GROUP = 32
"""Tiles that `select_top` reads together: one comparison skips all of their 4,096 tokens."""

SPAN = 4096
"""Tokens per program of `softmax_weights`."""

COLUMNS = 1024
"""Features per program of `reduce_split_k` and `weighted_sum`."""


def launch_shape(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages of `multiply`."""
    wide = dtype.itemsize == 2
    return {
        "ROWS": min(128, max(16, power(rows))),
        "COLUMNS": (256 if rows > 64 else 128) if wide else 64,
        "INNER": 64 if wide else 32,
        "num_warps": 8 if rows > 64 and wide else 4,
        "num_stages": 3,
    }


def split_k(tiles: int, processors: int) -> int:
    """Into how many parts the vocabulary is split, at most 8: the number whose last wave of programs is fullest.

    >>> split_k(22, 132), split_k(88, 132), split_k(704, 132)
    (6, 3, 3)
    """
    return max(range(1, 9), key=lambda parts: (round(parts * tiles / cdiv(parts * tiles, processors), 6), -parts))


@kernel
def softmax_weights(
    product, order, amount, highest, rough, temperature, vocab, cap, CAPPED: tl.constexpr, SPAN: tl.constexpr
):
    """Turn the listed rows' logits into probabilities in place: e^(x' - max') / sum, x' rounded to the weight's type.

    Predicted on an H200, 256 rows, 262,144 tokens: 75 us; the floor is 62 (268 MB).
    """
    slot = tl.program_id(0)
    if slot >= tl.load(amount):
        return
    row = tl.load(order + slot)
    token = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    address = product + row.to(tl.int64) * vocab + token
    z = tl.load(address, mask=token < vocab, other=0.0)
    kind = product.dtype.element_ty
    x = scaled_logits(z.to(tl.float32), cap, tl.load(temperature + row), CAPPED).to(kind).to(tl.float32)
    top = tl.load(highest + row).to(kind).to(tl.float32)
    tl.store(address, tl.div_rn(tl.exp(x - top), tl.load(rough + row)).to(kind), mask=token < vocab)


@kernel
def multiply(
    share,
    weight,
    parts,
    order,
    amount,
    n,
    vocab,
    width,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """share @ weight over one split of the vocabulary, for the listed rows: parts [splits, rows, width], float32.

    128 x 256 x 64, 8 warps, 3 stages on sm_90: 255 registers, none spilled. Predicted on an H200, 256 rows, 262,144
    tokens, width 2,816, not measured: 0.62 ms; the floor is 0.48 (arithmetic).
    """
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tl.load(amount):
        return
    row = tl.load(order + tl.minimum(slot, n - 1))
    column, inner = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, INNER)
    steps = tl.cdiv(tl.cdiv(vocab, INNER), tl.num_programs(2))
    start = tl.program_id(2) * steps * INNER
    stop = tl.minimum(start + steps * INNER, vocab)
    left = share + row.to(tl.int64)[:, None] * vocab + (start + inner)[None, :]
    down = inner[:, None] * width + tl.minimum(column, width - 1)[None, :]
    right = weight + start.to(tl.int64) * width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(start, stop, INNER):
        if EVEN:
            a, b = tl.load(left), tl.load(right + down)
        else:
            a = tl.load(left, mask=(at + inner < stop)[None, :], other=0.0)
            b = tl.load(right + down, mask=(at + inner < stop)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += INNER
        right += INNER * width
    address = (tl.program_id(2) * n + slot).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(parts + address, total, mask=(slot < n)[:, None] & (column < width)[None, :])


@kernel
def reduce_split_k(
    parts,
    signal,
    order,
    amount,
    scale,
    n,
    width,
    splits,
    COLUMNS: tl.constexpr,
):
    """The sum of a listed row's parts, rounded, times the scale of the embedding, rounded again."""
    slot = tl.program_id(0)
    if slot >= tl.load(amount):
        return
    row = tl.load(order + slot)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + (split * n + slot).to(tl.int64) * width + column, mask=column < width, other=0.0)
    kind = signal.dtype.element_ty
    rounded = total.to(kind).to(tl.float32) * tl.load(scale).to(tl.float32)
    tl.store(signal + row.to(tl.int64) * width + column, rounded.to(kind), mask=column < width)


@kernel
def select_top(
    product,
    peak,
    rest,
    highest,
    mass,
    temperature,
    chosen,
    share,
    counts,
    vocab,
    tiles,
    cap,
    least,
    dropped,
    CAPPED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
):
    """A row's tokens of probability above `least`, and these probabilities, in the order of their ids.

    counts: how many; 0 where they do not cover all but `dropped` of the row's mass, or are more than KEPT. A tile's
    mass tells whether its tokens have to be read. Predicted on an H200, 256 rows: 40 us where the model is sure, 90 us
    where no tile can be skipped (floor 31: 134 MB).
    """
    row, at = tl.program_id(0), tl.arange(0, GROUP)
    top, whole = tl.load(highest + row), tl.load(mass + row)
    row_temperature = tl.load(temperature + row)
    number, total = 0, 0.0
    for start in range(0, tiles, GROUP):
        inside = start + at < tiles
        tops = tl.load(peak + row * tiles + start + at, mask=inside, other=float("-inf"))
        rests = tl.load(rest + row * tiles + start + at, mask=inside, other=0.0)
        if tl.max((1.0 + rests) * tl.exp(tops - top), 0) > least * whole:
            token = start * TILE + tl.arange(0, TILE * GROUP)
            address = product + row.to(tl.int64) * vocab + token
            z = tl.load(address, mask=token < vocab, other=float("-inf")).to(tl.float32)
            p = tl.exp(scaled_logits(z, cap, row_temperature, CAPPED) - top) / whole
            keep = p > least
            slot = number + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(chosen + row * KEPT + slot, token, mask=keep & (slot < KEPT))
            tl.store(share + row * KEPT + slot, p, mask=keep & (slot < KEPT))
            number += tl.sum(keep.to(tl.int32), 0)
            total += tl.sum(tl.where(keep, p, 0.0), 0)
    enough = (number <= KEPT) & (total > 1.0 - dropped)
    tl.store(counts + row, tl.where(enough, number, 0))


@kernel
def weighted_sum(
    chosen,
    share,
    counts,
    weight,
    signal,
    scale,
    width,
    KEPT: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The weighted sum of the selected tokens' embedding rows.

    Predicted on an H200, 256 rows of 64 tokens, width 2,816: 45 us; the floor is 22 (92 MB).
    """
    row = tl.program_id(0)
    count = tl.load(counts + row)
    if count == 0:
        return
    column, at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, AT_ONCE)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, count, AT_ONCE):
        inside = start + at < count
        token = tl.load(chosen + row * KEPT + start + at, mask=inside, other=0).to(tl.int64)
        p = tl.load(share + row * KEPT + start + at, mask=inside, other=0.0)
        mask = inside[:, None] & (column < width)[None, :]
        rows = tl.load(weight + token[:, None] * width + column[None, :], mask=mask, other=0.0)
        total += tl.sum(p[:, None] * rows.to(tl.float32), 0)
    kind = signal.dtype.element_ty
    mean = total.to(kind).to(tl.float32)
    tl.store(
        signal + row.to(tl.int64) * width + column, (mean * tl.load(scale).to(tl.float32)).to(kind), mask=column < width
    )
