"""The signal: the expected embedding under a row's probabilities, from the product that `head.py` left.

    exact     spread: product --> probabilities, rounded as the reference rounds them, in the same memory
              multiply over stretches of the vocabulary --> float32 parts --> gather: their sum, rounded, times scale
    sparse    pick: tokens of probability above LEAST, at most KEPT a row, nearest to all of its mass
              weigh: their embedding rows, weighted; a row that they do not cover goes the exact way

`order` lists the rows that take the dense way, `count` says how many: both lie on the device, so that no step waits for
the host, and programs past the count end at once.

Invariant: sums are taken in one order, so the same inputs give the same signal; no memory grows with rows x vocabulary
but the product itself.
Run it:  TRITON_INTERPRET=1 python -m pytest tests/ops/kernels/test_vocabulary.py
"""

# A kernel's constants are written in capitals, and its other arguments have no types, as Triton's own.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton.language as tl

from blockpress.ops.kernels.head import scaled_logits
from blockpress.ops.kernels.jit import cdiv, kernel, power

LEAST = 2.0**-17
"""The sparse signal leaves tokens of a smaller probability out ..."""

KEPT = 128
"""... and keeps at most so many; a row that would need more takes the dense way ..."""

DROPPED = 2.0**-9
"""... and so does one where what is left out is not less than this: half a step of bfloat16 below 1."""

GROUP = 32
"""Tiles that are picked from together: one comparison passes over all 4,096 tokens of them."""

SPAN = 4096
"""Tokens of a program of `softmax_weights`."""

COLUMNS = 1024
"""Features of a program of `reduce_split_k` and `weighted_sum`."""


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
    """Into how many stretches the vocabulary is cut, at most 8: so many that the last wave of programs is fullest.

    >>> stretches(22, 132), stretches(88, 132), stretches(704, 132)
    (6, 3, 3)
    """
    return max(range(1, 9), key=lambda parts: (round(parts * tiles / cdiv(parts * tiles, processors), 6), -parts))


@kernel
def softmax_weights(
    product, order, amount, highest, rough, temperature, vocab, cap, CAPPED: tl.constexpr, SPAN: tl.constexpr
):
    """Logits of the listed rows become probabilities in place: e^(x' - max') / sum, x' rounded to the weight's type.

    Predicted on an H200, 256 rows, 262,144 tokens: 75 us over a floor of 62 (268 MB).
    """
    slot = tl.program_id(0)
    if slot >= tl.load(amount):
        return
    row = tl.load(order + slot)
    token = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    place = product + row.to(tl.int64) * vocab + token
    z = tl.load(place, mask=token < vocab, other=0.0)
    kind = product.dtype.element_ty
    x = scaled_logits(z.to(tl.float32), cap, tl.load(temperature + row), CAPPED).to(kind).to(tl.float32)
    top = tl.load(highest + row).to(kind).to(tl.float32)
    tl.store(place, tl.div_rn(tl.exp(x - top), tl.load(rough + row)).to(kind), mask=token < vocab)


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
    """share @ weight of one stretch of the vocabulary, for the listed rows: parts [stretches, rows, width], float32.

    128 x 256 x 64, 8 warps, 3 stages on sm_90: 255 registers, none spilled. Predicted on an H200, 256 rows, 262,144
    tokens, width 2,816, not measured: 0.62 ms over a floor of 0.48 (arithmetic).
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
    place = (tl.program_id(2) * n + slot).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(parts + place, total, mask=(slot < n)[:, None] & (column < width)[None, :])


@kernel
def reduce_split_k(
    parts,
    signal,
    order,
    amount,
    scale,
    n,
    width,
    stretches,
    COLUMNS: tl.constexpr,
):
    """The sum of the parts of a listed row, rounded, times the scale of the embedding, rounded again."""
    slot = tl.program_id(0)
    if slot >= tl.load(amount):
        return
    row = tl.load(order + slot)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for stretch in range(stretches):
        total += tl.load(parts + (stretch * n + slot).to(tl.int64) * width + column, mask=column < width, other=0.0)
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
    kept,
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
    """The tokens of a row whose probability is above `least`, with it, in the order of their ids.

    kept: how many; 0 where they do not cover all but `dropped` of the row's mass, or are more than KEPT. A tile's mass
    says whether its tokens have to be looked at. Predicted on an H200, 256 rows: 40 us where rows
    are sure, 90 us where no tile can be passed over (floor 31: 134 MB).
    """
    row, at = tl.program_id(0), tl.arange(0, GROUP)
    top, whole = tl.load(highest + row), tl.load(mass + row)
    degree = tl.load(temperature + row)
    number, total = 0, 0.0
    for start in range(0, tiles, GROUP):
        inside = start + at < tiles
        tops = tl.load(peak + row * tiles + start + at, mask=inside, other=float("-inf"))
        rests = tl.load(rest + row * tiles + start + at, mask=inside, other=0.0)
        if tl.max((1.0 + rests) * tl.exp(tops - top), 0) > least * whole:
            token = start * TILE + tl.arange(0, TILE * GROUP)
            place = product + row.to(tl.int64) * vocab + token
            z = tl.load(place, mask=token < vocab, other=float("-inf")).to(tl.float32)
            p = tl.exp(scaled_logits(z, cap, degree, CAPPED) - top) / whole
            keep = p > least
            slot = number + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(chosen + row * KEPT + slot, token, mask=keep & (slot < KEPT))
            tl.store(share + row * KEPT + slot, p, mask=keep & (slot < KEPT))
            number += tl.sum(keep.to(tl.int32), 0)
            total += tl.sum(tl.where(keep, p, 0.0), 0)
    enough = (number <= KEPT) & (total > 1.0 - dropped)
    tl.store(kept + row, tl.where(enough, number, 0))


@kernel
def weighted_sum(
    chosen,
    share,
    kept,
    weight,
    signal,
    scale,
    width,
    KEPT: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The picked tokens' embedding rows, weighted.

    Predicted on an H200, 256 rows of 64 tokens, width 2,816: 45 us over a floor of 22 (92 MB).
    """
    row = tl.program_id(0)
    count = tl.load(kept + row)
    if count == 0:
        return
    column, at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, AT_ONCE)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, count, AT_ONCE):
        inside = start + at < count
        token = tl.load(chosen + row * KEPT + start + at, mask=inside, other=0).to(tl.int64)
        p = tl.load(share + row * KEPT + start + at, mask=inside, other=0.0)
        seen = inside[:, None] & (column < width)[None, :]
        rows = tl.load(weight + token[:, None] * width + column[None, :], mask=seen, other=0.0)
        total += tl.sum(p[:, None] * rows.to(tl.float32), 0)
    kind = signal.dtype.element_ty
    mean = total.to(kind).to(tl.float32)
    tl.store(
        signal + row.to(tl.int64) * width + column, (mean * tl.load(scale).to(tl.float32)).to(kind), mask=column < width
    )
