"""The head: logits of a tile of tokens, and their statistics while the product is still in registers.

    multiply        hidden @ weight^T, 128 rows by 128 tokens per program --> the rounded product, and a record per tile
    sample_kernel   the records of a row --> argmax, entropy, and the tile and token that its uniform number selects

    a record   peak     the largest scaled logit x of the tile, -inf where all are banned
               best     its token's index in the tile; the first of ties
               rest     sum of e^(x - peak) over the others: separate from the 1 of the peak, so that an entropy far
                        below 1e-3 nat keeps its digits
               moment   sum of (x - peak) e^(x - peak)
               coarse   sum of e^(x' - peak'), x' the logits rounded to the weight's type (for the soft embedding)

The product is stored rounded, 2 bytes per logit in bfloat16: everything after it is a function of it, so a logit that
is needed again is the same one. A banned token's product is stored as -inf.

The sample comes from float64 sums over the tiles of 128, each of which is a float32 sum, and then from a float64 sum
within the tile. The reference (`ops.vocabulary.sample`) sums float32 weights in float64: both agree unless the uniform
number is within 1e-6 of the boundary between two tokens.

Invariant: a row's results are a function of that row; a NaN in it shows in its entropy, and its tokens stay in range.
Run it:  TRITON_INTERPRET=1 python -m pytest tests/ops/kernels/test_vocabulary.py
"""

# A kernel's constants are in capitals, and its other arguments have no types, as in Triton's own code.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton.language as tl

from blockpress.ops.kernels.jit import kernel, power

TILE = 128
"""Tokens per record: the columns of a program."""


def launch_shape(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages of `multiply`."""
    wide = dtype.itemsize == 2
    return {
        "ROWS": min(128, max(16, power(rows))),
        "INNER": 64 if wide else 32,
        "num_warps": 8 if rows > 64 else 4,
        "num_stages": 4 if wide else 3,
    }


@kernel
def scaled_logits(product, cap, temperature, CAPPED: tl.constexpr):
    """Float32 logits from the rounded product: cap * tanh(product / cap) / temperature; -inf stays -inf.

    tanh in two pieces, each within 2e-7 of it: the odd polynomial of Cephes below 0.625, 1 - 2 / (e^2t + 1) above.
    """
    capped = product
    if CAPPED:
        t = product / cap
        s = t * t
        odd = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
        small = t + t * s * (odd * s - 3.33332819422e-1)
        large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(t)) + 1.0)
        capped = cap * tl.where(tl.abs(t) < 0.625, small, tl.where(t < 0, -large, large))
    return tl.where(product == float("-inf"), product, tl.div_rn(capped, temperature))


@kernel
def multiply(
    hidden,
    weight,
    product,
    peak,
    best,
    rest,
    moment,
    coarse,
    temperature,
    ids,
    banned,
    edges,
    n,
    vocab,
    width,
    count,
    cap,
    CAPPED: tl.constexpr,
    BANNED: tl.constexpr,
    COARSE: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    INNER: tl.constexpr,
):
    """The product of ROWS rows and TILE tokens, and the tile's records.

    Row blocks are the fastest axis of the grid, so that weights that the first one reads are in L2 for the others.
    `ids` are sorted, and those of tile i are at edges[i] to edges[i + 1].

    128 x 128 x 64, 8 warps, 4 stages on sm_90: 220 registers, one program per multiprocessor, so that no other
    program's product overlaps the statistics. Predicted on an H200, 256 rows, 262,144 tokens, hidden 2,816, bfloat16,
    not measured: 0.75 ms; the floor is 0.48 (arithmetic).
    """
    row, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    column = tl.arange(0, TILE)
    token, inner = tile * TILE + column, tl.arange(0, INNER)
    # Rows and tokens past the end repeat the last one: no load in the loop needs a mask.
    left = hidden + tl.minimum(row, n - 1).to(tl.int64)[:, None] * width + inner[None, :]
    right = weight + tl.minimum(token, vocab - 1).to(tl.int64)[None, :] * width + inner[:, None]
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, width, INNER):
        if EVEN:
            a, b = tl.load(left + start), tl.load(right + start)
        else:
            a = tl.load(left + start, mask=(start + inner < width)[None, :], other=0.0)
            b = tl.load(right + start, mask=(start + inner < width)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    z = total.to(product.dtype.element_ty).to(tl.float32)
    if BANNED:
        for at in range(tl.load(edges + tile), tl.load(edges + tile + 1)):
            is_banned = tl.load(banned + tl.minimum(row, n - 1) * count + at) != 0
            z = tl.where((token == tl.load(ids + at))[None, :] & is_banned[:, None], float("-inf"), z)
    here, real = row < n, (token < vocab)[None, :]
    tl.store(
        product + row.to(tl.int64)[:, None] * vocab + token[None, :],
        z.to(product.dtype.element_ty),
        mask=here[:, None] & real,
    )
    row_temperature = tl.load(temperature + tl.minimum(row, n - 1))
    x = tl.where(real, scaled_logits(z, cap, row_temperature[:, None], CAPPED), float("-inf"))
    top = tl.max(x, 1)
    first = tl.minimum(tl.min(tl.where(x == top[:, None], column[None, :], TILE), 1), TILE - 1)
    zero = tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp(x - zero[:, None])
    record = row * tl.num_programs(1) + tile
    tl.store(peak + record, top, mask=here)
    tl.store(best + record, first, mask=here)
    if COARSE:
        near = x.to(product.dtype.element_ty).to(tl.float32) - zero.to(product.dtype.element_ty).to(tl.float32)[:, None]
        tl.store(coarse + record, tl.sum(tl.exp(near), 1), mask=here)
    e = tl.where(column[None, :] == first[:, None], 0.0, e)
    tl.store(rest + record, tl.sum(e, 1), mask=here)
    tl.store(moment + record, tl.sum(tl.where(e > 0, (x - zero[:, None]) * e, 0.0), 1), mask=here)


@kernel
def sample_kernel(
    product,
    peak,
    best,
    rest,
    moment,
    coarse,
    temperature,
    uniform,
    argmax,
    sample,
    entropy,
    highest,
    mass,
    rough,
    vocab,
    tiles,
    cap,
    CAPPED: tl.constexpr,
    COARSE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """One row: merge its records in float64, then read the one tile that the sample is in.

    Writes argmax, sample and entropy, the row's largest logit (`highest`), the sum of e^(x - highest) (`mass`), and
    that of the rounded logits (`rough`). Predicted on an H200, 256 rows of 2,048 records: 8 us; the floor is 2.5
    (10 MB).
    """
    row, tile = tl.program_id(0), tl.arange(0, TILES)
    record, inside = row * tiles + tile, tile < tiles
    tops = tl.load(peak + record, mask=inside, other=float("-inf"))
    rests = tl.load(rest + record, mask=inside, other=0.0).to(tl.float64)
    moments = tl.load(moment + record, mask=inside, other=0.0).to(tl.float64)
    top = tl.max(tops, 0)
    zero = tl.where(top == float("-inf"), 0.0, top)
    below = tl.where(tops == float("-inf"), 0.0, tops - zero).to(tl.float64)
    scale = tl.where(tops == float("-inf"), 0.0, tl.exp(below))
    weight = (1.0 + rests) * scale
    first = tl.minimum(tl.min(tl.where(tops == top, tile, TILES), 0), tiles - 1)
    # The last token of the vocabulary where all logits are NaN, and none equals the largest.
    tl.store(argmax + row, tl.minimum(first * TILE + tl.load(best + row * tiles + first), vocab - 1).to(tl.int64))
    others = tl.sum(tl.where(tile == first, rests, weight), 0)
    spread = tl.sum(scale * moments + below * weight, 0)
    tl.store(entropy + row, (tl.log(1.0 + others) - spread / (1.0 + others)).to(tl.float32))
    tl.store(highest + row, zero)
    tl.store(mass + row, (1.0 + others).to(tl.float32))
    if COARSE:
        kind = product.dtype.element_ty
        near = tops.to(kind).to(tl.float32) - zero.to(kind).to(tl.float32)
        sums = tl.load(coarse + record, mask=inside, other=0.0)
        tl.store(rough + row, tl.sum(tl.where(tops == float("-inf"), 0.0, sums * tl.exp(near)), 0))

    through = tl.cumsum(weight, 0)
    whole = tl.max(through, 0)
    target = tl.load(uniform + row) * whole
    tile_index = tl.minimum(tl.sum((through <= target).to(tl.int32), 0), tl.sum((through < whole).to(tl.int32), 0))
    before = tl.sum(tl.where(tile == tile_index - 1, through, 0.0), 0)
    token = tile_index * TILE + tl.arange(0, TILE)
    z = tl.load(product + row.to(tl.int64) * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    x = scaled_logits(z, cap, tl.load(temperature + row), CAPPED)
    sums = tl.cumsum(tl.exp(x - zero).to(tl.float64), 0)
    end = tl.max(sums, 0)
    above = tl.sum((sums <= target - before).to(tl.int32), 0)
    within = tl.minimum(above, tl.sum((sums < end).to(tl.int32), 0))
    tl.store(sample + row, (tile_index * TILE + within).to(tl.int64))
