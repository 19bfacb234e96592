"""Paged attention of a flat batch, on a GPU: canvases and causal spans of any lengths in one launch.

    rows      0 1 2 3 4 5 | 6 | 7 8 9 10 11 12          a prefill chunk, a single token, a canvas
    kv        [pages]       [pages]  [pages] [7 .. 12]  a canvas: its context's pages, then its own rows

    block table   [7, 8, 3]   positions 0 .. P-1 are in page 7, P .. 2P-1 in page 8, 2P .. 3P-1 in page 3

    causal    the span's keys are already in its pages (`write_kv`); row i is at position stop - count + i and attends
              to positions up to its own, `window` of them where the layer has a window
    canvas    every row attends to the last window - 1 of `stop` context tokens, and to all rows of the span

Lengths, tables and spans are read on the device, and the grid depends only on the numbers of rows and slots: one
captured graph serves all lengths. A slot of 0 rows is empty, and a row that is in no span gets zeros.

The query heads of a key head are rows of one tile: a key is read once for all of them. The keys of a tile are split
over `parts` programs, so that few rows fill a GPU too; `combine` merges the partial results. No mask is ever in memory.
The tokens of a picture, which attend to each other in both directions, go through `ops.attention.plain` instead.

Invariant: a span gets what `ops.attention.plain` gives for its rows over its joined keys, within float rounding,
whichever pages it has and whatever else is in the batch.
Run it:  TRITON_INTERPRET=1 python -m blockpress.bench.gpu check --part attention; make bench-gpu PART=attention

Compiled for sm_90 (`compile_check`): products use wgmma from 64 rows per tile, and nothing is spilled. Head size 512
goes through `combine` even with one part: written by the program itself, the result would spill 224 bytes.

Predicted for one canvas of 256 rows in bfloat16 on an H200, not measured; floors are arithmetic at 790 TFLOP/s:

                            context      floor      attend     combine
    sliding (8 x 256)       any > 1,023   6.8 us     14 us      4 us
    full (2 x 512)          2,048         24 us      45 us      7 us
    full (2 x 512)         32,768        350 us     560 us      7 us
"""

# A kernel's constants are in capitals, and its other arguments have no types, as in Triton's own code.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blockpress.ops.kernels.jit import cdiv, kernel, power

PROCESSORS = 132
"""Multiprocessors that splitting the keys should fill: those of an H100 or H200."""

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, kw_only=True)
class SpanTable:
    """The spans of a flat batch, on the device, for one kind of layer; entries that no row reads may be any page.

    Args:
        first: the first row of each span. count: its number of rows; 0: the slot is empty.
        stop: tokens of its context in pages; a causal span's own rows are included.
        causal: whether it belongs to the causal pass, or is a canvas.
        table: the block table of its context.
    """

    first: Int[Tensor, " spans"]
    count: Int[Tensor, " spans"]
    stop: Int[Tensor, " spans"]
    causal: Bool[Tensor, " spans"]
    table: Int[Tensor, "spans width"]


@dataclass(frozen=True, kw_only=True)
class AttentionTile:
    """Rows (tokens x query heads of one key head) and keys per program, parts of the keys, warps and stages."""

    rows: int
    keys: int
    parts: int
    warps: int = 8
    stages: int = 2
    joined: bool = False
    """Whether the result goes through `combine` even with one part: large heads have no registers left to write it
    themselves."""

    @property
    def parted(self) -> bool:
        return self.joined or self.parts > 1


Pages = Float[Tensor, "kv_heads pages page dim"]


def choose_tile(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> AttentionTile:
    """The tile for a flat batch of `tokens` rows: the largest whose queries, keys and values fit, split to fill a GPU.

    >>> choose_tile(256, 16, 2, 512, torch.bfloat16)
    AttentionTile(rows=64, keys=32, parts=2, warps=8, stages=2, joined=True)
    >>> choose_tile(256, 16, 8, 256, torch.bfloat16).parts, choose_tile(8192, 16, 8, 256, torch.bfloat16).parts
    (4, 1)
    """
    rows, keys = 64 if dim > 256 else 128, 32
    if dtype.itemsize > 2:
        rows, keys = rows // 4, keys // 2
    packed = tokens * (heads // kv_heads)
    rows = max(16, min(rows, power(packed)))
    programs = cdiv(packed, rows) * kv_heads
    parts = max(1, min(4, PROCESSORS // programs))
    warps, stages = 8 if rows >= 64 else 4, 2 if dim > 256 else 3
    return AttentionTile(rows=rows, keys=keys, parts=parts, warps=warps, stages=stages, joined=dim > 256)


def attend(
    query: Float[Tensor, "rows heads dim"],
    key: Float[Tensor, "rows kv_heads dim"],
    value: Float[Tensor, "rows kv_heads dim"],
    pages: tuple[Pages, Pages],
    spans: SpanTable,
    *,
    window: int | None = None,
    tile: AttentionTile | None = None,
) -> Float[Tensor, "rows heads dim"]:
    """The attention output of every span's rows, at scale 1. The last axis is dense, all other strides are free.

    Args:
        key, value: of the rows; only those of canvases are read. pages: a layer's keys and values.
        window: of a sliding layer: how many tokens a causal row attends to, itself included.
    """
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    assert dim == power(dim) >= 16, f"head size {dim} is no power of two"
    if tokens == 0 or len(spans.count) == 0:
        return query.new_zeros(tokens, heads, dim)
    tile = tile or choose_tile(tokens, heads, kv_heads, dim, query.dtype)
    group, slots = heads // kv_heads, len(spans.count)
    out = (query.new_empty if tile.parted else query.new_zeros)(tokens, heads, dim)
    # The tiles of all spans, each rounded up to whole tiles, are at most this many.
    grid = (cdiv(tokens * group, tile.rows) + slots, kv_heads, tile.parts)
    sums = torch.zeros((2, tile.parts, tokens, heads), dtype=torch.float32, device=query.device)
    partial = query.new_empty(tile.parts, tokens, heads, dim, dtype=torch.float32) if tile.parted else out
    attend_kernel[grid](
        query, *query.stride()[:2], key, *key.stride()[:2], value, *value.stride()[:2],
        *pages, *pages[0].stride()[:3], *pages[1].stride()[:3],
        spans.first, spans.count, spans.stop, spans.causal.view(torch.int8), spans.table, spans.table.stride(0),
        partial, *sums, tokens, heads, window or 0,
        SLOTS=slots, WIDTH=power(slots), GROUP=group, PAGE=pages[0].shape[2], DIM=dim, ROWS=tile.rows, KEYS=tile.keys,
        WINDOWED=window is not None, PARTED=tile.parted, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if tile.parted:
        joined = tokens * heads
        combine_kernel[(cdiv(joined, 16),)](partial, *sums, out, joined, PARTS=tile.parts, ROWS=16, DIM=dim)
    return out


def write_kv(
    key: Float[Tensor, "rows kv_heads dim"],
    value: Float[Tensor, "rows kv_heads dim"],
    pages: tuple[Pages, Pages],
    slot_mapping: Int[Tensor, " rows"],
) -> None:
    """Write the rows' keys and values to pages: row i at `slot_mapping[i]` = page * P + offset; below 0, nowhere.

    Rows must not share a slot. Predicted on an H200: 3 us for 512 rows of any layer.
    """
    rows, kv_heads, dim = key.shape
    if rows:
        write_kernel[(rows, kv_heads)](
            key, *key.stride()[:2], value, *value.stride()[:2], *pages, *pages[0].stride()[:3], *pages[1].stride()[:3],
            slot_mapping, PAGE=pages[0].shape[2], DIM=dim, WIDTH=power(dim), num_warps=1,
        )  # fmt: skip


@kernel
def write_kernel(
    key, key_row, key_head, value, value_row, value_head,
    key_pages, value_pages, key_pages_head, key_pages_page, key_pages_token,
    value_pages_head, value_pages_page, value_pages_token,
    slot_mapping, PAGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of one key head."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        column = tl.arange(0, WIDTH)
        page, offset, inside = (slot // PAGE).to(tl.int64), slot % PAGE, column < DIM
        far = head.to(tl.int64)
        k = tl.load(key + row * key_row + head * key_head + column, mask=inside)
        v = tl.load(value + row * value_row + head * value_head + column, mask=inside)
        at = far * key_pages_head + page * key_pages_page + offset * key_pages_token
        tl.store(key_pages + at + column, k, mask=inside)
        at = far * value_pages_head + page * value_pages_page + offset * value_pages_token
        tl.store(value_pages + at + column, v, mask=inside)


@kernel
def attend_tile(query, key, value, visible, highest, total, mixed):
    """The running maximum, sum and weighted values after one tile of keys [dim, keys] and values [keys, dim]."""
    scores = tl.dot(query, key, input_precision="ieee") * LOG2E
    scores = tl.where(visible, scores, float("-inf"))
    now = tl.maximum(highest, tl.max(scores, 1))
    zero = tl.where(now == float("-inf"), 0.0, now)
    shares = tl.math.exp2(scores - zero[:, None])
    fade = tl.math.exp2(highest - zero)
    mixed = tl.dot(shares.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return now, total * fade + tl.sum(shares, 1), mixed


@kernel
def attend_kernel(
    query, query_row: tl.constexpr, query_head, key, key_row: tl.constexpr, key_head,
    value, value_row: tl.constexpr, value_head, key_pages, value_pages,
    key_pages_head, key_pages_page, key_pages_token: tl.constexpr,
    value_pages_head, value_pages_page, value_pages_token: tl.constexpr,
    firsts, counts, stops, causals, table, table_row, partial, highests, totals, tokens, heads, window,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, PARTED: tl.constexpr,
):  # fmt: skip
    """One tile of a span's rows, one key head, one part of these rows' keys."""
    block, kv, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.arange(0, WIDTH)
    tiles = tl.cdiv(tl.load(counts + slot, mask=slot < SLOTS, other=0) * GROUP, ROWS)
    span = tl.sum((tl.cumsum(tiles, 0) <= block).to(tl.int32), 0)
    if span >= SLOTS:
        return
    begin = (block - tl.sum(tl.where(slot < span, tiles, 0), 0)) * ROWS
    first, count, stop = tl.load(firsts + span), tl.load(counts + span), tl.load(stops + span)
    causal = tl.load(causals + span) != 0
    packed, column, at = begin + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    inside, token, head = packed < count * GROUP, first + packed // GROUP, kv * GROUP + packed % GROUP
    q = tl.load(
        query + token[:, None] * query_row + head[:, None] * query_head + column[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    # All rows of a canvas attend as far back as its first row; the context ends before all of them.
    newest = tl.where(causal, stop - count + packed // GROUP, stop - 1)
    high = tl.where(causal, tl.minimum(stop, stop - count + (begin + ROWS - 1) // GROUP + 1), stop)
    low = stop * 0
    if WINDOWED:
        reach = tl.where(causal, window, window - 1).to(tl.uint32)
        low = tl.maximum(tl.where(causal, stop - count + begin // GROUP, stop) - window + 1, 0)
    bottom = low // KEYS
    context = tl.where(high > low, tl.cdiv(high, KEYS) - bottom, 0)
    total_tiles = context + tl.where(causal, 0, tl.cdiv(count, KEYS))
    per_part = tl.cdiv(total_tiles, tl.num_programs(2))
    start = part * per_part
    end = tl.minimum(start + per_part, total_tiles)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    key_pages += kv * key_pages_head
    value_pages += kv * value_pages_head
    key += kv * key_head
    value += kv * value_head
    for step in range(start, tl.minimum(end, context)):
        position = (bottom + step) * KEYS + at
        valid = (position >= low) & (position < high)
        entry = table + span * table_row
        if PAGE % KEYS == 0:  # a tile of keys is within one page
            page = tl.load(entry + (bottom + step) * KEYS // PAGE).to(tl.int64)
        else:
            page = tl.load(entry + position // PAGE, mask=valid, other=0).to(tl.int64)
        row_k = page * key_pages_page + (position % PAGE) * key_pages_token
        row_v = page * value_pages_page + (position % PAGE) * value_pages_token
        k = tl.load(key_pages + row_k[None, :] + column[:, None], mask=valid[None, :], other=0.0)
        v = tl.load(value_pages + row_v[:, None] + column[None, :], mask=valid[:, None], other=0.0)
        visible = position[None, :] <= newest[:, None]
        if WINDOWED:  # as unsigned numbers, negative distances (the future) are larger than any window
            visible = (newest[:, None] - position[None, :]).to(tl.uint32, bitcast=True) < reach
        highest, total, mixed = attend_tile(q, k, v, visible, highest, total, mixed)
    for step in range(tl.maximum(start, context), end):
        row = (step - context) * KEYS + at
        valid = row < count
        row_k, row_v = (first + row).to(tl.int64) * key_row, (first + row).to(tl.int64) * value_row
        k = tl.load(key + row_k[None, :] + column[:, None], mask=valid[None, :], other=0.0)
        v = tl.load(value + row_v[:, None] + column[None, :], mask=valid[:, None], other=0.0)
        highest, total, mixed = attend_tile(q, k, v, valid[None, :], highest, total, mixed)

    index = token * heads + head
    if PARTED:
        index += part * tokens * heads
        tl.store(highests + index, highest, mask=inside)
        tl.store(totals + index, total, mask=inside)
    else:
        mixed = mixed * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    out = partial + index.to(tl.int64)[:, None] * DIM + column[None, :]
    tl.store(out, mixed.to(partial.dtype.element_ty), mask=inside[:, None])


@kernel
def combine_kernel(
    partial, highests, totals, out, rows, PARTS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Merge the parts of ROWS rows and heads, each with a maximum and a sum. A part without visible keys has sum 0."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = row < rows
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        nonempty = tl.load(totals + part * rows + row, mask=inside, other=0.0) > 0
        top = tl.maximum(top, tl.load(highests + part * rows + row, mask=nonempty, other=float("-inf")))
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    for part in tl.static_range(PARTS):
        index = part * rows + row
        share = tl.load(totals + index, mask=inside, other=0.0)
        fade = tl.math.exp2(
            tl.load(highests + index, mask=share > 0, other=float("-inf")) - tl.where(share > 0, top, 0.0)
        )
        total += share * fade
        at = index.to(tl.int64)[:, None] * DIM + column[None, :]
        mixed += fade[:, None] * tl.load(partial + at, mask=(share > 0)[:, None], other=0.0)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    at = row.to(tl.int64)[:, None] * DIM + column[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside[:, None])
