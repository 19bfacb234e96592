"""Paged attention: checked against `ops.attention.plain`, and timed against its roofline.

Checks draw spans of mixed kinds and lengths, write their contexts into pages in random order, with NaN in all slots
that no token was written to, and compare every span with the plain version over its keys, gathered and concatenated.

Invariant: what is measured is what `ops.kernels.attention.attend` calls, captured in a graph.
Run it:  make check-gpu; make bench-gpu PART=attention
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockpress.bench.gpu.check import KernelCheck, distance
from blockpress.bench.gpu.report import GpuReport
from blockpress.bench.gpu.timing import DEVICE, captured
from blockpress.ops.attention import plain

if TYPE_CHECKING:
    from blockpress.ops.kernels.attention import AttentionTile, SpanTable


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """A layer's heads, and the page size in tokens."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    page: int = 8
    window: int | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class SpanCase:
    """`count` rows after, or (causal) at the end of, `stop` context tokens."""

    count: int
    stop: int
    causal: bool


SLIDING = AttentionShape(heads=16, kv_heads=8, dim=256, page=256, window=1024, dtype=torch.bfloat16)
FULL = AttentionShape(heads=16, kv_heads=2, dim=512, page=256, dtype=torch.bfloat16)
CANVAS = [SpanCase(8, stop, causal=False) for stop in (0, 1, 7, 8, 9, 40)]
CAUSAL = [
    SpanCase(count, stop, causal=True) for count, stop in ((1, 1), (1, 9), (7, 7), (8, 8), (8, 16), (3, 17), (20, 41))
]
MIXED = [CAUSAL[6], CANVAS[4], SpanCase(0, 5, causal=False), CAUSAL[1], CANVAS[0], SpanCase(33, 21, causal=False)]
SETS = {"canvases": CANVAS, "causal": CAUSAL, "mixed": MIXED, "reversed": MIXED[::-1]}
BETWEEN = tuple(f"mixed {what}" for what in ("window=1", "window=30", "page=32", "parts=3"))
BETWEEN += ("mixed bfloat16 dim=128", "mixed bfloat16 dim=256")
"""Checks that lie between two others: a CPU leaves them out."""


def checks() -> list[KernelCheck]:
    """Lengths around a page's, windows, KV heads, head sizes, splits of keys, rounding; the published sizes once."""
    small, cases = AttentionShape(), []
    for label, spans in SETS.items():
        for window in (None, 1, 9, 30) if label != "reversed" else (9,):
            cases.append(_case(f"{label} window={window}", replace(small, window=window), spans, 2e-6, parts=2))
    for heads, kv_heads in ((4, 4), (6, 1), (3, 1)):
        shape = replace(small, heads=heads, kv_heads=kv_heads)
        cases.append(_case(f"mixed heads={heads}/{kv_heads}", shape, MIXED, 2e-6, parts=1))
    for page in (1, 5, 32, 64):
        cases.append(_case(f"mixed page={page}", replace(small, page=page, window=12), MIXED, 2e-6, parts=2))
    for parts in (1, 3, 4):
        cases.append(_case(f"mixed parts={parts}", replace(small, window=30), MIXED, 2e-6, parts=parts))
    for dim in (16, 64, 128, 256, 512):
        shape = replace(small, dim=dim, page=32, dtype=torch.bfloat16)
        cases.append(_case(f"mixed bfloat16 dim={dim}", shape, MIXED, 8e-3, parts=1 + (dim > 64)))
    cases.append(KernelCheck(name="rows of no span", limit=0, error=_uncovered))
    cases.append(KernelCheck(name="pages written", limit=0, error=_written))
    large = [SpanCase(256, 5000, causal=False), SpanCase(512, 3000, causal=True), SpanCase(1, 2049, causal=True)]
    for label, shape in (("sliding", SLIDING), ("full", FULL)):
        cases.append(_case(f"published {label}", shape, large, 8e-3, large=True))
    return cases


def _case(
    name: str,
    shape: AttentionShape,
    spans: Sequence[SpanCase],
    limit: float,
    parts: int | None = None,
    large: bool = False,
) -> KernelCheck:
    return KernelCheck(
        name=name, limit=limit, error=partial(_error, shape, spans, parts), large=large or name in BETWEEN
    )


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """A flat batch, the pages of its contexts, and for each span the keys and values in its pages."""

    query: Tensor
    key: Tensor
    value: Tensor
    pages: tuple[Tensor, Tensor]
    spans: SpanTable
    contexts: list[tuple[Tensor, Tensor]]


def draw_inputs(
    shape: AttentionShape, spans: Sequence[SpanCase], device: torch.device, extra: int = 3
) -> AttentionInputs:
    """Random rows, `extra` of them in no span, and contexts in pages of random order; seeded on a CPU."""
    from blockpress.ops.kernels.attention import SpanTable

    if device.type == "cpu":
        torch.manual_seed(len(spans) + shape.page)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(shape.dtype)

    rows = sum(span.count for span in spans) + extra
    query = normal(shape.heads, rows, shape.dim).transpose(0, 1) * (3 / shape.dim**0.5)
    key, value = (normal(shape.kv_heads, rows, shape.dim).transpose(0, 1) for _ in range(2))
    needed = [-(-span.stop // shape.page) for span in spans]
    numbers = torch.randperm(sum(needed) + 2).tolist()
    table = torch.full((len(spans), max(1, *needed)), -1, dtype=torch.int32)
    keys, values = (
        torch.full((shape.kv_heads, sum(needed) + 2, shape.page, shape.dim), torch.nan, device=device).to(shape.dtype)
        for _ in range(2)
    )
    contexts = []
    for index, span in enumerate(spans):
        table[index, : needed[index]] = torch.tensor([numbers.pop() for _ in range(needed[index])], dtype=torch.int32)
        contexts.append((normal(shape.kv_heads, span.stop, shape.dim), normal(shape.kv_heads, span.stop, shape.dim)))
        for at in range(span.stop):
            page = int(table[index, at // shape.page])
            keys[:, page, at % shape.page], values[:, page, at % shape.page] = (part[:, at] for part in contexts[-1])
    firsts = [sum(span.count for span in spans[:index]) for index in range(len(spans))]
    columns = [firsts, [span.count for span in spans], [span.stop for span in spans]]
    first, count, stop = (torch.tensor(column, dtype=torch.int32, device=device) for column in columns)
    causal = torch.tensor([span.causal for span in spans], device=device)
    on_device = SpanTable(first=first, count=count, stop=stop, causal=causal, table=table.to(device))
    return AttentionInputs(query=query, key=key, value=value, pages=(keys, values), spans=on_device, contexts=contexts)


def truth(shape: AttentionShape, spans: Sequence[SpanCase], batch: AttentionInputs) -> Tensor:
    """`ops.attention.plain`, span by span, in float32; rows in no span stay zero."""
    out = torch.zeros(batch.query.shape, device=batch.query.device)
    start = 0
    for span, (key, value) in zip(spans, batch.contexts, strict=True):
        rows = slice(start, start + span.count)
        start += span.count
        if not span.causal:
            key = torch.cat((key, batch.key[rows].transpose(0, 1)), dim=1)
            value = torch.cat((value, batch.value[rows].transpose(0, 1)), dim=1)
        query = batch.query[rows].transpose(0, 1)[None].float()
        mask = _mask(span, shape.window).to(query.device)
        out[rows] = plain(query, key[None].float(), value[None].float(), mask[None])[0].transpose(0, 1)
    return out


def _mask(span: SpanCase, window: int | None) -> Tensor:
    """The mask, pair by pair: the definition in `ops.kernels.attention`, not its arithmetic."""
    first = span.stop - span.count if span.causal else span.stop
    keys = span.stop if span.causal else span.stop + span.count
    mask = torch.ones(span.count, keys, dtype=torch.bool)
    for row in range(span.count):
        for key in range(keys):
            if span.causal:
                visible = key <= first + row and (window is None or first + row - key < window)
            else:
                visible = key >= span.stop or window is None or span.stop - key < window
            mask[row, key] = visible
    return mask


def _error(shape: AttentionShape, spans: Sequence[SpanCase], parts: int | None, device: torch.device) -> float:
    from blockpress.ops.kernels.attention import attend, choose_tile

    batch = draw_inputs(shape, spans, device)
    tile = choose_tile(len(batch.query), shape.heads, shape.kv_heads, shape.dim, shape.dtype)
    tile = replace(tile, parts=parts or tile.parts)
    got = attend(batch.query, batch.key, batch.value, batch.pages, batch.spans, window=shape.window, tile=tile)
    return distance(got, truth(shape, spans, batch))


def _uncovered(device: torch.device) -> float:
    """How many values of rows in no span are not 0, with the keys split and not."""
    from blockpress.ops.kernels.attention import AttentionTile, attend

    batch = draw_inputs(AttentionShape(), MIXED, device, extra=5)
    tiles: list[AttentionTile] = [AttentionTile(rows=32, keys=32, parts=parts) for parts in (1, 3)]
    outs = [attend(batch.query, batch.key, batch.value, batch.pages, batch.spans, tile=tile) for tile in tiles]
    return float(sum((out[-5:] != 0).sum() for out in outs))


def _written(device: torch.device) -> float:
    """How many values of the pages differ from copying row by row."""
    from blockpress.ops.kernels.attention import write_kv

    key, value = (torch.randn(2, 9, 24, device=device).transpose(0, 1) for _ in range(2))
    slot_mapping = torch.tensor([12, -1, 0, 1, 19, -1, 3, 7, 8], device=device)
    pages = [torch.randn(2, 4, 5, 24, device=device) for _ in range(2)]
    expected = [part.clone() for part in pages]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            for whole, part in zip(expected, (key, value), strict=True):
                whole[:, slot // 5, slot % 5] = part[row]
    write_kv(key, value, (pages[0], pages[1]), slot_mapping)
    return float(sum((got != want).sum() for got, want in zip(pages, expected, strict=True)))


def bench(report: GpuReport) -> None:
    """One canvas and 16, after contexts of several lengths; then prefill; then other splits of the keys."""
    for label, shape in (("sliding", SLIDING), ("full", FULL)):
        for canvases, stops in ((1, (256, 2048, 32768, 131072)), (16, (2048, 32768))):
            for stop in stops:
                _measure(
                    report,
                    f"{label} canvases={canvases} context={stop}",
                    shape,
                    [SpanCase(256, stop, False)] * canvases,
                )
        _measure(report, f"{label} prefill 512 of 8192", shape, [SpanCase(512, 8192, True)])
        _measure(report, f"{label} tokens=32 context=2048", shape, [SpanCase(1, 2048, True)] * 32)
        for parts in (1, 2, 3, 4, 8):
            _measure(
                report, f"{label} canvases=1 context=2048 parts={parts}", shape, [SpanCase(256, 2048, False)], parts
            )


def _measure(
    report: GpuReport, name: str, shape: AttentionShape, spans: Sequence[SpanCase], parts: int | None = None
) -> None:
    from blockpress.ops.kernels.attention import attend, choose_tile

    floor = _floor_us(shape, spans)
    try:
        batch = _filled(shape, spans)
        tile = choose_tile(len(batch.query), shape.heads, shape.kv_heads, shape.dim, shape.dtype)
        tile = replace(tile, parts=parts or tile.parts)

        def run() -> None:
            attend(batch.query, batch.key, batch.value, batch.pages, batch.spans, window=shape.window, tile=tile)

        taken = captured(run)
    except Exception as reason:  # a tile that does not fit must not end the other figures
        report.note(f"{name}: {type(reason).__name__}: {reason}")
        return
    report.add(name, 1000 * taken.least, "us", floor)
    report.add(f"{name} median", 1000 * taken.median, "us", floor)


def _filled(shape: AttentionShape, spans: Sequence[SpanCase]) -> AttentionInputs:
    """Random rows over random pages: like `draw_inputs`, but without a loop over tokens."""
    from blockpress.ops.kernels.attention import SpanTable

    device = torch.device("cuda")

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=shape.dtype)

    rows, needed = sum(span.count for span in spans), max(-(-span.stop // shape.page) for span in spans)
    pages = [normal(shape.kv_heads, needed * len(spans), shape.page, shape.dim) for _ in range(2)]
    firsts = [sum(span.count for span in spans[:index]) for index in range(len(spans))]
    columns = [firsts, [span.count for span in spans], [span.stop for span in spans]]
    first, count, stop = (torch.tensor(column, dtype=torch.int32, device=device) for column in columns)
    causal = torch.tensor([span.causal for span in spans], device=device)
    table = torch.randperm(needed * len(spans), device=device).int().view(len(spans), needed)
    return AttentionInputs(
        query=normal(rows, shape.heads, shape.dim) * (3 / shape.dim**0.5),
        key=normal(rows, shape.kv_heads, shape.dim),
        value=normal(rows, shape.kv_heads, shape.dim),
        pages=(pages[0], pages[1]),
        spans=SpanTable(first=first, count=count, stop=stop, causal=causal, table=table),
        contexts=[],
    )


def _floor_us(shape: AttentionShape, spans: Sequence[SpanCase]) -> float:
    """Microseconds of the two products of every query with its visible keys, or of reading keys and values, if longer.

    >>> [round(_floor_us(shape, [SpanCase(256, 2048, causal=False)]), 1) for shape in (FULL, SLIDING)]
    [24.5, 6.8]
    """
    flops = bytes_ = 0
    for span in spans:
        if span.causal:
            ends = range(span.stop - span.count + 1, span.stop + 1)
            pairs = sum(min(end, shape.window or end) for end in ends)
            keys = min(span.stop, span.count - 1 + (shape.window or span.stop))
        else:
            keys = span.count + min(span.stop, (shape.window or span.stop + 1) - 1)
            pairs = span.count * keys
        flops += 4 * pairs * shape.heads * shape.dim
        bytes_ += 2 * keys * shape.kv_heads * shape.dim * shape.dtype.itemsize
    return 1e6 * max(flops / DEVICE.rate("bfloat16"), bytes_ / DEVICE.bandwidth)
