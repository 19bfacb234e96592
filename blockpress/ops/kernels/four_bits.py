"""The experts' two products with 4-bit weights, which become bfloat16 in registers.

A 32-bit word holds columns 8i to 8i+7 of a row, the lowest first, as `ops/packed.py` stores them. Shifted right by 4t,
its halves hold columns 8i+t and 8i+4+t: the instructions for one value decode two, and they stay adjacent.

    int4   (word >> 4t) & 0x000F000F | 0x43004300       as two bfloat16: 128 + code; minus 136 the value, exactly
    e2m1   sign to bit 15, the other three to bits 8..6  as two bfloat16: the value * 2^-126, exactly

So the activations are in the same order, `paired`: for each t in turn all columns 8i+t, 8i+4+t. A scale per row, or a
global scale, multiplies the sum; a group's scale multiplies the value, rounded to bfloat16 as `unpack` rounds it (e2m1
* e4m3 is exact).

Invariant: nothing is repacked; a weight is read as stored, in words.

Run it:  TRITON_INTERPRET=1 python -m blockpress.bench.gpu check --part experts --only 4
Predicted for the published layer and 256 tokens on an H200, not measured (floor: 0.5625 bytes a weight, 0.100 ms):

                 gate_up    down       total
    int4 g32     0.085 ms   0.050 ms   0.15 ms
    nvfp4        0.095 ms   0.055 ms   0.17 ms
"""

# A kernel's constants are in capitals, and its other arguments have no types, as in Triton's own code.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from blockpress.ops.kernels.jit import kernel
from blockpress.ops.kernels.products import deliver, geglu

# They undo the 2^-126. With e4m3 scales in two factors, since no bfloat16 is as large as 448 * 2^126: 2^118 with the
# group's scale, 2^8 with the sum.
E4M3_LIFT, SUM_LIFT, WHOLE_LIFT = tl.constexpr(2.0**118), tl.constexpr(2.0**8), tl.constexpr(2.0**126)


def paired(x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
    """The columns in the order in which the kernels of this module read them.

    >>> import torch
    >>> paired(torch.arange(16.0)[None]).int().tolist()
    [[0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]]
    """
    return x.unflatten(-1, (-1, 2, 4)).permute(0, 3, 1, 2).flatten(1)


@kernel
def halves(words):
    """The two bfloat16 in each word, the low half first: [rows, words] -> [rows, 2 * words]."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], 2 * words.shape[1])


@kernel
def values(words, scale, T: tl.constexpr, KIND: tl.constexpr, GROUPED: tl.constexpr):
    """Columns 8i+T and 8i+4+T of a tile of words, times their groups' scales."""
    if KIND == "int4":
        value = halves((words >> (4 * T)) & 0x000F000F | 0x43004300) - tl.full((1, 1), 136.0, tl.float32).to(
            tl.bfloat16
        )
    else:
        nibble = words >> (4 * T)
        value = halves(((nibble & 0x00080008) << 12) | ((nibble & 0x00070007) << 6))
        if KIND == "mxfp4":
            value = value * tl.full((1, 1), WHOLE_LIFT, tl.float32).to(tl.bfloat16)
    if GROUPED:
        rows: tl.constexpr = words.shape[0]
        groups: tl.constexpr = scale.shape[1]
        run: tl.constexpr = 2 * words.shape[1] // groups
        value = (value.reshape(rows, groups, run) * scale[:, :, None]).reshape(rows, 2 * words.shape[1])
    return value


@kernel
def group_scale(base, row, start, limit, COLUMNS: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr,
                KIND: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """The scales of DEPTH columns as bfloat16, [rows, groups]."""
    group = start // GROUP + tl.arange(0, DEPTH // GROUP)
    at = base + row[:, None] * (COLUMNS // GROUP) + group[None, :]
    if EVEN:
        raw = tl.load(at)
    else:
        raw = tl.load(at, mask=(row < limit)[:, None] & (group < COLUMNS // GROUP)[None, :], other=0)
    if KIND == "nvfp4":
        return (raw.to(tl.float8e4nv, bitcast=True).to(tl.float32) * E4M3_LIFT).to(tl.bfloat16)
    if KIND == "mxfp4":
        # The bits of the exponent are the power of two; the smallest, 2^-127, becomes 0.
        return (raw.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True)
    return raw.to(tl.bfloat16)


@kernel
def tile_words(base, row, start, limit, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr):
    """DEPTH columns of the rows, as words."""
    word = start // 8 + tl.arange(0, DEPTH // 8)
    at = base + row[:, None] * (COLUMNS // 8) + word[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(row < limit)[:, None] & (word < COLUMNS // 8)[None, :], other=0)


@kernel
def input_tile(base, line, valid, start, T: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The paired activations that belong to `values` of T: [DEPTH / 4, tokens]."""
    column = start // 4 + tl.arange(0, DEPTH // 4)
    mask = valid[:, None] & (column < COLUMNS // 4)[None, :]
    return tl.trans(
        tl.load(base + line[:, None] * COLUMNS + (T * (COLUMNS // 4) + column)[None, :], mask=mask, other=0.0)
    )


@kernel
def row_scale(scale, outer, row, limit, KIND: tl.constexpr, GROUPED: tl.constexpr, OUTER: tl.constexpr):
    """The factor of a row's sum: its only scale, or its global one. OUTER: 0 none, 1 a factor, 2 a divisor."""
    factor = tl.full(row.shape, 1.0, tl.float32)
    if KIND == "nvfp4":
        factor *= SUM_LIFT
    if not GROUPED:
        factor *= tl.load(scale + row, mask=row < limit, other=0.0).to(tl.float32)
    if OUTER == 1:
        factor *= tl.load(outer + row, mask=row < limit, other=0.0)
    if OUTER == 2:
        factor /= tl.load(outer + row, mask=row < limit, other=1.0)
    return factor[:, None]


@kernel
def gate_up_kernel(
    x, order, work, weight, scale, outer, hidden,
    TOP: tl.constexpr, HIDDEN: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    OUTER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`products.gate_up_kernel` over words; GROUP 0: a scale per row. `x` and the output are paired."""
    parts: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    part, item = tl.program_id(0) % parts, tl.program_id(0) // parts
    expert = tl.load(work + item * 4)
    if expert < 0:
        return
    slot = tl.load(work + item * 4 + 1) + tl.arange(0, TOKENS)
    valid = slot < tl.load(work + item * 4 + 2)
    token = (tl.load(order + slot, mask=valid, other=0) // TOP).to(tl.int64)
    row, top = part * ROWS + tl.arange(0, ROWS), expert.to(tl.int64) * (2 * SIZE)
    groups: tl.constexpr = HIDDEN // GROUP if GROUP else 1
    low, high = weight + top * (HIDDEN // 8), weight + (top + SIZE) * (HIDDEN // 8)
    low_scale, high_scale = scale + top * groups, scale + (top + SIZE) * groups
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        gates = tile_words(low, row, start, SIZE, HIDDEN, DEPTH, EVEN)
        ups = tile_words(high, row, start, SIZE, HIDDEN, DEPTH, EVEN)
        if GROUP:
            gate_scale = group_scale(low_scale, row, start, SIZE, HIDDEN, GROUP, DEPTH, KIND, EVEN)
            up_scale = group_scale(high_scale, row, start, SIZE, HIDDEN, GROUP, DEPTH, KIND, EVEN)
        else:
            gate_scale, up_scale = 1.0, 1.0
        for t in tl.static_range(4):
            inputs = input_tile(x, token, valid, start, t, HIDDEN, DEPTH)
            gate = tl.dot(values(gates, gate_scale, t, KIND, GROUP > 0), inputs, gate)
            up = tl.dot(values(ups, up_scale, t, KIND, GROUP > 0), inputs, up)
    gate *= row_scale(low_scale, outer + top, row, SIZE, KIND, GROUP > 0, OUTER)
    up *= row_scale(high_scale, outer + top + SIZE, row, SIZE, KIND, GROUP > 0, OUTER)
    column = (row % 4) * (SIZE // 4) + row // 8 * 2 + row % 8 // 4
    at = slot.to(tl.int64)[:, None] * SIZE + column[None, :]
    y = tl.trans(geglu(gate, up)).to(hidden.dtype.element_ty)
    tl.store(hidden + at, y, mask=valid[:, None] & (row < SIZE)[None, :])


@kernel
def down_kernel(
    hidden, order, work, share, weight, scale, outer, out,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    OUTER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`products.down_kernel` over words."""
    parts: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    part, item = tl.program_id(0) % parts, tl.program_id(0) // parts
    expert = tl.load(work + item * 4)
    if expert < 0:
        return
    slot = tl.load(work + item * 4 + 1) + tl.arange(0, TOKENS)
    valid = slot < tl.load(work + item * 4 + 2)
    row, top = part * ROWS + tl.arange(0, ROWS), expert.to(tl.int64) * HIDDEN
    base, base_scale = weight + top * (SIZE // 8), scale + top * (SIZE // GROUP if GROUP else 1)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, SIZE, DEPTH):
        words = tile_words(base, row, start, HIDDEN, SIZE, DEPTH, EVEN)
        scales = group_scale(base_scale, row, start, HIDDEN, SIZE, GROUP, DEPTH, KIND, EVEN) if GROUP else 1.0
        for t in tl.static_range(4):
            inputs = input_tile(hidden, slot.to(tl.int64), valid, start, t, SIZE, DEPTH)
            total = tl.dot(values(words, scales, t, KIND, GROUP > 0), inputs, total)
    total *= row_scale(base_scale, outer + top, row, HIDDEN, KIND, GROUP > 0, OUTER)
    deliver(total, order, share, out, slot, valid, row, HIDDEN)
