"""Attention over a flat batch: every span of rows looks at keys and values of its own, wherever these lie.

    rows     0 1 2 3 4 5 | 6 | 7 8 9 10 11 12          a prefill chunk, a single token, a canvas
    seen     [pages]       [pages]  [pages] [own keys]  pieces: views, one after another

Spans of as many queries and about as many keys are looked up together, the shorter ones filled up with keys that nobody
sees: 32 single tokens are one product. What is too large for that goes alone, a block of its queries at a time.

Invariant: every span gets what `attention.plain` gives for its queries over its joined pieces, within float rounding,
whichever spans stand beside it.
Run it:  python -m pytest tests/ops/test_spans.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from blockpress.ops import attention
from blockpress.ops.attention import AttentionSpan
from blockpress.ops.cpu import attention as in_cpp
from blockpress.ops.cpu import bridge
from blockpress.ops.transfer import to_device

SCORES = 1 << 23
"""Most scores that are held at once: 16 MiB in bfloat16."""


def varlen_attention(
    query: Float[Tensor, "heads rows dim"], spans: Sequence[AttentionSpan]
) -> Float[Tensor, "heads rows dim"]:
    """What the rows of every span see. The spans part the rows: each row is in exactly one of them.

    The result lies in memory as [rows, heads, dim], so that `mixed.transpose(0, 1).flatten(1)` copies nothing.
    """
    heads, rows, dim = query.shape
    assert sum(span.queries for span in spans) == rows, "every row is in one span"
    if rows and _in_cpp(query, spans):
        return in_cpp.attend(query, spans)
    out = query.new_empty(rows, heads, dim)
    for group in group_spans(spans, heads):
        _attend_group(query, group, out)
    return out.transpose(0, 1)


def _in_cpp(query: Tensor, spans: Sequence[AttentionSpan]) -> bool:
    """Whether the version in C++ may take them: a CPU's tensors of one type."""
    pieces = (tensor for span in spans for piece in span.kv for tensor in piece)
    return bridge.supports(query) and all(tensor.dtype == query.dtype for tensor in pieces)


def group_spans(spans: Sequence[AttentionSpan], heads: int) -> Iterator[list[AttentionSpan]]:
    """The spans in groups of one number of queries and similar numbers of keys, in order of the rows within a group.

    >>> none = torch.zeros(1, 90, 4)
    >>> def span(at, queries, keys): return Span(start=at, stop=at + queries, seen=((none[:, :keys], none[:, :keys]),))
    >>> groups = together([span(0, 1, 5), span(1, 3, 9), span(4, 1, 90), span(5, 1, 8)], heads=1)
    >>> [[(one.start, one.keys) for one in group] for group in groups]
    [[(4, 90)], [(0, 5), (5, 8)], [(1, 9)]]
    """
    ordered = sorted((span.queries, -span.keys, place) for place, span in enumerate(spans))
    group: list[int] = []
    first = (0, 0)
    for queries, less_keys, place in ordered:
        most, keys = first[1], -less_keys
        similar = queries == first[0] and (keys >= most - 16 or 4 * keys >= 3 * most)
        if not similar or (len(group) + 1) * heads * queries * most > SCORES:
            if group:
                yield [spans[i] for i in sorted(group)]
            group, first = [], (queries, keys)
        group.append(place)
    if group:
        yield [spans[i] for i in sorted(group)]


def _attend_group(query: Tensor, group: list[AttentionSpan], out: Float[Tensor, "rows heads dim"]) -> None:
    """Write what a group sees into its rows of `out`. Batch entries are [key heads, spans], as joined keys lie."""
    count, queries, (heads, _, dim) = len(group), group[0].queries, query.shape
    most = max(span.keys for span in group)
    key, value = (_join(group, most, which) for which in (0, 1))
    kv = key.shape[0]
    key, value = key.view(kv * count, most, dim), value.view(kv * count, most, dim)
    mask = _masks(group, most)
    adjacent = all(before.stop == after.start for before, after in pairwise(group))
    first, last = group[0].start, group[-1].stop
    own = query[:, first:last] if adjacent else torch.cat([query[:, span.start : span.stop] for span in group], dim=1)
    own = (
        own.unflatten(1, (count, queries)).unflatten(0, (kv, -1)).transpose(1, 2)
    )  # kv, spans, heads / kv, queries, dim
    step = max(1, SCORES // (heads * count * most))
    seen = []
    for at in range(0, queries, step):
        part = own[:, :, :, at : at + step]
        packed = part.reshape(kv * count, -1, dim)
        scores = torch.bmm(packed, key.transpose(1, 2))
        visible = mask if mask is None or mask.shape[1] == 1 else mask[:, at : at + step]
        shares = attention.softmax(scores.view(kv * count, heads // kv, -1, most), visible)
        seen.append(torch.bmm(shares.view(scores.shape), value).view(part.shape))
    mixed = seen[0] if len(seen) == 1 else torch.cat(seen, dim=3)
    mixed = mixed.permute(1, 3, 0, 2, 4)  # spans, queries, kv, heads / kv, dim
    if adjacent:
        out[first:last].view(mixed.shape).copy_(mixed)
    else:
        for span, one in zip(group, mixed.unbind(), strict=True):
            out[span.start : span.stop].view(one.shape).copy_(one)


def _join(group: list[AttentionSpan], most: int, which: int) -> Float[Tensor, "kv_heads keys dim"]:
    """All keys (0) or values (1) of a group one after another, zeros behind a span that has fewer than `most`."""
    example = group[0].kv[0][which]
    spare = max(most - span.keys for span in group)
    zeros = example.new_zeros(example.shape[0], spare, example.shape[2]) if spare else example
    parts: list[Tensor] = []
    for span in group:
        parts.extend(piece[which] for piece in span.kv)
        if span.keys < most:
            parts.append(zeros[:, : most - span.keys])
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)


def _masks(group: list[AttentionSpan], most: int) -> Bool[Tensor, "spans queries most"] | None:
    """One mask a span; None where all see all, and one row for all queries where only the filling is unseen."""
    device = group[0].kv[0][0].device
    if all(span.mask is None for span in group):
        if all(span.keys == most for span in group):
            return None
        keys = to_device(torch.tensor([span.keys for span in group]), device)
        return (torch.arange(most, device=device) < keys[:, None])[:, None]
    masks = torch.zeros(len(group), group[0].queries, most, dtype=torch.bool, device=device)
    for mask, span in zip(masks, group, strict=True):
        mask[:, : span.keys] = True if span.mask is None else span.mask
    return masks
