"""The experts' two products in bfloat16 and in fp8, each over tiles of one expert's tokens.

    gate_up   hidden[a] = gelu_tanh(gate x) * (up x)       a: an index of `order`, x the row of its token
    down      out[order[a]] = weight * (down hidden[a])    a row for every assignment, each written by one program
    combine   y[token] = sum of its rows of `out`, in the order of its chosen experts

Operands are swapped: a weight's rows are the rows of a matrix instruction (64, as wgmma needs) and an expert's 16 to
128 tokens its columns, so that 16 tokens per expert fill it. A program of gate_up computes 64 gate rows and the same 64
up rows; weights stay as `ops/experts.py` and `ops/packed.py` store them, nothing is repacked.

In fp8, a token has one scale for gate_up, and `hidden` one per 64 features, which a program computes by itself; sums
stay in the matrix unit's accumulators for at most 128 columns, since those round to about 14 bits.

Invariant: a row's value does not depend on its tile.

Run it:  TRITON_INTERPRET=1 python -m blockpress.bench.gpu check --part experts
Predicted for the published layer (128 experts, 2816 x 704, top 8) and 256 tokens on an H200, not measured:

                 floor      gate_up    down       total
    bfloat16     0.354 ms   0.255 ms   0.130 ms   0.41 ms
    fp8          0.177 ms   0.135 ms   0.070 ms   0.23 ms
"""

# A kernel's constants are in capitals, and its other arguments have no types, as in Triton's own code.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton.language as tl

from blockpress.ops.kernels.jit import kernel

E4M3_MAX = tl.constexpr(448.0)
CURVE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)


@kernel
def geglu(gate, up):
    """gelu_tanh(gate) * up: 0.5 * (1 + tanh(z)) is the logistic function of 2z."""
    return gate * tl.sigmoid(CURVE * (gate + 0.044715 * gate * gate * gate)) * up


@kernel
def whole(base, rows, columns, limit_rows, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a matrix with WIDTH columns; if not EVEN, zeros beyond the matrix's edges."""
    at = base + rows[:, None] * WIDTH + columns[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(rows < limit_rows)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@kernel
def product(weight, inputs, total):
    """total + weight @ inputs; fp8 sums leave the matrix unit every 128 columns."""
    if weight.dtype.is_fp8():
        return tl.dot(weight, inputs, total, max_num_imprecise_acc=128)
    return tl.dot(weight, inputs, total, input_precision="ieee")


@kernel
def gate_up_kernel(
    x, x_scale, order, work, weight, weight_scale, hidden, hidden_scale,
    TOP: tl.constexpr, HIDDEN: tl.constexpr, SIZE: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """ROWS features of `hidden` for one tile of tokens. DESCRIPTOR: `weight` is a descriptor, else a pointer."""
    parts: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    part, item = tl.program_id(0) % parts, tl.program_id(0) // parts
    expert = tl.load(work + item * 4)
    if expert < 0:
        return
    slot = tl.load(work + item * 4 + 1) + tl.arange(0, TOKENS)
    valid = slot < tl.load(work + item * 4 + 2)
    token = (tl.load(order + slot, mask=valid, other=0) // TOP).to(tl.int64)
    row, depth = part * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    top = expert.to(tl.int64) * (2 * SIZE)
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        mask = valid[:, None] & (start + depth < HIDDEN)[None, :]
        inputs = tl.load(x + token[:, None] * HIDDEN + (start + depth)[None, :], mask=mask, other=0.0)
        if DESCRIPTOR:
            gates = weight.load([expert * (2 * SIZE) + part * ROWS, start])
            ups = weight.load([expert * (2 * SIZE) + SIZE + part * ROWS, start])
        else:
            gates = whole(weight + top * HIDDEN, row, start + depth, SIZE, HIDDEN, EVEN)
            ups = whole(weight + (top + SIZE) * HIDDEN, row, start + depth, SIZE, HIDDEN, EVEN)
        gate, up = product(gates, tl.trans(inputs), gate), product(ups, tl.trans(inputs), up)
    if FP8:
        token_scale = tl.load(x_scale + token)[None, :]
        gate *= tl.load(weight_scale + top + row, mask=row < SIZE, other=0.0).to(tl.float32)[:, None] * token_scale
        up *= tl.load(weight_scale + top + SIZE + row, mask=row < SIZE, other=0.0).to(tl.float32)[:, None] * token_scale
    y = geglu(gate, up)
    if FP8:
        scale = tl.maximum(tl.max(tl.abs(y), axis=0), 1e-12) / E4M3_MAX
        tl.store(hidden_scale + slot * parts + part, scale, mask=valid)
        y = y / scale[None, :]
    at = slot.to(tl.int64)[:, None] * SIZE + row[None, :]
    tl.store(hidden + at, tl.trans(y).to(hidden.dtype.element_ty), mask=valid[:, None] & (row < SIZE)[None, :])


@kernel
def down_kernel(
    hidden, hidden_scale, order, work, share, weight, weight_scale, out,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """ROWS features of one tile of tokens' output rows. In fp8, DEPTH is the GROUP that shares a scale."""
    tl.static_assert(not FP8 or DEPTH == GROUP)
    parts: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    part, item = tl.program_id(0) % parts, tl.program_id(0) // parts
    expert = tl.load(work + item * 4)
    if expert < 0:
        return
    slot = tl.load(work + item * 4 + 1) + tl.arange(0, TOKENS)
    valid = slot < tl.load(work + item * 4 + 2)
    row, depth = part * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    top = expert.to(tl.int64) * HIDDEN
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, SIZE, DEPTH):
        mask = valid[:, None] & (start + depth < SIZE)[None, :]
        inputs = tl.load(hidden + slot.to(tl.int64)[:, None] * SIZE + (start + depth)[None, :], mask=mask, other=0.0)
        if DESCRIPTOR:
            tile = weight.load([expert * HIDDEN + part * ROWS, start])
        else:
            tile = whole(weight + top * SIZE, row, start + depth, HIDDEN, SIZE, EVEN)
        if FP8:
            scales = tl.load(
                hidden_scale + slot * ((SIZE + GROUP - 1) // GROUP) + start // GROUP, mask=valid, other=0.0
            )
            total += tl.dot(tile, tl.trans(inputs)) * scales[None, :]
        else:
            total = product(tile, tl.trans(inputs), total)
    if FP8:
        total *= tl.load(weight_scale + top + row, mask=row < HIDDEN, other=0.0).to(tl.float32)[:, None]
    deliver(total, order, share, out, slot, valid, row, HIDDEN)


@kernel
def deliver(total, order, share, out, slot, valid, row, HIDDEN: tl.constexpr):
    """Write sums [features, tokens], times their weights, to the rows of their assignments."""
    assignment = tl.load(order + slot, mask=valid, other=0)
    y = tl.trans(total * tl.load(share + assignment, mask=valid, other=0.0)[None, :])
    at = assignment.to(tl.int64)[:, None] * HIDDEN + row[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=valid[:, None] & (row < HIDDEN)[None, :])


@kernel
def combine_kernel(out, y, tokens, TOP: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of a token's rows in float32, always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for choice in tl.static_range(TOP):
        at = out + (token * TOP + choice) * HIDDEN + column
        total += tl.load(at, mask=column < HIDDEN, other=0.0).to(tl.float32)
    tl.store(y + token * HIDDEN + column, total.to(y.dtype.element_ty), mask=column < HIDDEN)


@kernel
def quantise_kernel(x, codes, scale, HIDDEN: tl.constexpr, WIDTH: tl.constexpr):
    """A token's features as e4m3 with one scale, which makes the largest magnitude 448."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    values = tl.load(x + token * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    token_scale = tl.maximum(tl.max(tl.abs(values)), 1e-12) / E4M3_MAX
    tl.store(codes + token * HIDDEN + column, (values / token_scale).to(codes.dtype.element_ty), mask=column < HIDDEN)
    tl.store(scale + token, token_scale)
