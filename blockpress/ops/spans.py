"""Variable-length attention over a flat batch: every span of rows attends to its own keys and values.

    rows     0 1 2 3 4 5 | 6 | 7 8 9 10 11 12          a prefill chunk, a single token, a canvas
    kv       [pages]       [pages]  [pages] [own keys]  pieces: views, concatenated

On a CPU every span runs alone, since the products of a group depend on its size: a query gets the same bits in any
batch, and in any chunk of its prompt. On a GPU without Triton, spans with the same number of queries and about as many
keys run together, the shorter ones padded with masked keys: 32 single tokens are one product. A span that is too large
for that runs alone, a block of queries at a time.

Invariant: every span gets what `attention.plain` gives for its queries over its joined pieces, within float rounding,
whatever else is in the batch.
Run it:  python -m pytest tests/ops/test_spans.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import attention
from blockpress.ops.attention import AttentionSpan, Piece
from blockpress.ops.cpu import attention as in_cpp
from blockpress.ops.cpu import bridge
from blockpress.ops.linear import FEWEST
from blockpress.ops.transfer import to_device

SCORES = 1 << 23
"""Most scores held at once: 16 MiB in bfloat16."""

BLOCK = 64
"""On a CPU the keys of causal queries are padded to whole blocks of this many positions: products of a number of keys
that comes from a chunk would sum in an order that comes from it too."""


def varlen_attention(
    query: Float[Tensor, "heads rows dim"], spans: Sequence[AttentionSpan]
) -> Float[Tensor, "heads rows dim"]:
    """The attention output of every span's rows. Each row is in exactly one span.

    The result's memory is [rows, heads, dim], so that `mixed.transpose(0, 1).flatten(1)` copies nothing.
    """
    heads, rows, dim = query.shape
    assert sum(span.queries for span in spans) == rows, "every row is in one span"
    if rows and _in_cpp(query, spans):
        return in_cpp.attend(query, spans)
    out = query.new_empty(rows, heads, dim)
    alone = query.device.type == "cpu"
    for group in [[span] for span in spans] if alone else group_spans(spans, heads):
        _attend_group(query, [_whole_blocks(span) for span in group] if alone else group, out)
    return out.transpose(0, 1)


def _in_cpp(query: Tensor, spans: Sequence[AttentionSpan]) -> bool:
    """Whether the C++ version takes them: CPU tensors of one type."""
    pieces = (tensor for span in spans for piece in span.kv for tensor in piece)
    return bridge.supports(query) and all(tensor.dtype == query.dtype for tensor in pieces)


def group_spans(spans: Sequence[AttentionSpan], heads: int) -> Iterator[list[AttentionSpan]]:
    """The spans in groups with one number of queries and similar numbers of keys; within a group in order of rows.

    >>> kv = torch.zeros(1, 90, 4)
    >>> def span(start, queries, keys):
    ...     return AttentionSpan(start=start, stop=start + queries, kv=((kv[:, :keys], kv[:, :keys]),))
    >>> groups = group_spans([span(0, 1, 5), span(1, 3, 9), span(4, 1, 90), span(5, 1, 8)], heads=1)
    >>> [[(span.start, span.keys) for span in group] for group in groups]
    [[(4, 90)], [(0, 5), (5, 8)], [(1, 9)]]
    """
    ordered = sorted((span.queries, -span.keys, index) for index, span in enumerate(spans))
    group: list[int] = []
    first = (0, 0)
    for queries, less_keys, index in ordered:
        most, keys = first[1], -less_keys
        similar = queries == first[0] and (keys >= most - 16 or 4 * keys >= 3 * most)
        if not similar or (len(group) + 1) * heads * queries * most > SCORES:
            if group:
                yield [spans[i] for i in sorted(group)]
            group, first = [], (queries, keys)
        group.append(index)
    if group:
        yield [spans[i] for i in sorted(group)]


def _whole_blocks(span: AttentionSpan) -> AttentionSpan:
    """The span with masked keys of zeros around its own, up to whole blocks of positions; a canvas as it is."""
    if span.first_key is None:
        return span
    example, before = span.kv[0], span.first_key % BLOCK
    after = -(before + span.keys) % BLOCK
    mask = span.mask if span.mask is not None else torch.ones(1, span.keys, dtype=torch.bool)

    def zeros(count: int) -> Piece:
        key, value = (x.new_zeros(x.shape[0], count, x.shape[2]) for x in example)
        return key, value

    kv = (zeros(before), *span.kv, zeros(after))
    return replace(span, kv=kv, mask=F.pad(mask, (before, after)), first_key=span.first_key - before)


def _attend_group(query: Tensor, group: list[AttentionSpan], out: Float[Tensor, "rows heads dim"]) -> None:
    """Write a group's outputs to its rows of `out`. Batch entries are [key heads, spans], as in the joined keys."""
    count, queries, (heads, _, dim) = len(group), group[0].queries, query.shape
    most = max(span.keys for span in group)
    key, value = (_join(group, most, which) for which in (0, 1))
    kv = key.shape[0]
    key, value = key.view(kv * count, most, dim), value.view(kv * count, most, dim)
    mask = _masks(group, most)
    adjacent = all(before.stop == after.start for before, after in pairwise(group))
    first, last = group[0].start, group[-1].stop
    gathered = (
        query[:, first:last] if adjacent else torch.cat([query[:, span.start : span.stop] for span in group], dim=1)
    )
    gathered = (
        gathered.unflatten(1, (count, queries)).unflatten(0, (kv, -1)).transpose(1, 2)
    )  # kv, spans, heads / kv, queries, dim
    step = max(1, SCORES // (heads * count * most))
    in_blocks = query.device.type == "cpu" and group[0].first_key is not None
    outputs = []
    for at in range(0, queries, step):
        part = gathered[:, :, :, at : at + step]
        packed = part.reshape(kv * count, -1, dim)
        number = packed.shape[1]
        spare = max(0, FEWEST - number)  # torch has kernels of its own for few rows
        scores = torch.bmm(F.pad(packed, (0, 0, 0, spare)), key.transpose(1, 2))[:, :number].contiguous()
        visible = mask if mask is None or mask.shape[1] == 1 else mask[:, at : at + step]
        shares = attention.softmax(scores.view(kv * count, heads // kv, -1, most), visible).view(scores.shape)
        weighed = (_in_blocks if in_blocks else torch.bmm)(F.pad(shares, (0, 0, 0, spare)), value)
        outputs.append(weighed[:, :number].reshape(part.shape))
    mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    mixed = mixed.permute(1, 3, 0, 2, 4)  # spans, queries, kv, heads / kv, dim
    if adjacent:
        out[first:last].view(mixed.shape).copy_(mixed)
    else:
        for span, result in zip(group, mixed.unbind(), strict=True):
            out[span.start : span.stop].view(result.shape).copy_(result)


def _in_blocks(
    shares: Float[Tensor, "batch queries keys"], value: Float[Tensor, "batch keys dim"]
) -> Float[Tensor, "batch queries dim"]:
    """shares @ value, a block of keys after the other: the last ones, which a longer span has more of, add zeros."""
    total = torch.zeros(*shares.shape[:-1], value.shape[-1])
    for at in range(0, shares.shape[-1], BLOCK):
        total += torch.bmm(shares[..., at : at + BLOCK].float(), value[:, at : at + BLOCK].float())
    return total.to(shares.dtype)


def _join(group: list[AttentionSpan], most: int, which: int) -> Float[Tensor, "kv_heads keys dim"]:
    """All keys (which=0) or values (1) of a group, concatenated; a span with fewer than `most` is padded with zeros."""
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
    """One mask per span; None where nothing is masked, and one row for all queries where only padding is."""
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
