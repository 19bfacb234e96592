"""Paged attention: the rows of a forward attend to their requests' pages and, within a canvas, to each other.

    TorchPagedAttention     in torch, on any device, images included: the reference
    TritonPagedAttention    one launch per layer, attention metadata read on the device: `ops/kernels/attention.py`

Invariant: in every layer all causal keys and values are written before any row attends, so a canvas sees tokens
committed in the same forward as if they had been read one forward earlier. Both give the same within float rounding.
Run it:  python -m pytest tests/engine/test_attention.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blockpress.config import LayerKind
from blockpress.engine.batch import Batch, Part
from blockpress.engine.kv_cache import KVCache
from blockpress.model.layers import Attend
from blockpress.model.masks import causal_mask
from blockpress.ops import kernels
from blockpress.ops.attention import AttentionSpan
from blockpress.ops.spans import varlen_attention
from blockpress.ops.transfer import to_device
from blockpress.shapes import Heads, KeyHeads

Windows = Mapping[LayerKind, int | None]


@runtime_checkable
class PagedAttention(Protocol):
    """The interface of `ops/kernels/attention.py`; tests put a torch version in its place."""

    @property
    def SpanTable(self) -> Callable[..., Any]: ...  # noqa: N802

    @property
    def attend(self) -> Callable[..., Tensor]: ...

    @property
    def write_kv(self) -> Callable[..., None]: ...


def kernels_for(kv_cache: KVCache) -> PagedAttention | None:
    """The kernels, if they can read these pages: on a GPU with Triton, head sizes a power of two from 16 on."""
    if kv_cache.device.type != "cuda" or not kernels.available():
        return None
    if any(dim < 16 or dim & (dim - 1) for dim in kv_cache.dims):
        return None
    from blockpress.ops.kernels import attention

    return attention


def build_attention(
    kv_cache: KVCache,
    batch: Batch,
    windows: Windows,
    image_runs: Mapping[Part, Tensor],
    device: torch.device,
    attention: PagedAttention | None,
) -> Sequence[Attend]:
    """The attention of every layer for a batch.

    Args:
        windows: the attention window of each kind of layer, including the token itself; None: unlimited.
        image_runs: for parts with images, the image of each token, -1 for text.
        attention: kernels, used if no part has images; None: `TorchPagedAttention` for all.
    """
    causal = (*batch.kv_only, *batch.with_logits)
    slot_mappings = {}
    for kind in windows:
        slots = [
            slot for part in causal for slot in kv_cache.slot_mapping(part.request.tables[kind], part.first, part.end)
        ]
        slot_mappings[kind] = to_device(torch.tensor(slots, dtype=torch.long), device)
    if attention is not None and not image_runs:
        spans = {kind: _spans(batch, kind, device, attention) for kind in windows}
        return [
            TritonPagedAttention(attention, kv_cache.pages(layer), spans[kind], windows[kind], slot_mappings[kind])
            for layer, kind in enumerate(kv_cache.kinds)
        ]
    masks = {
        kind: [_mask(part, windows[kind], image_runs.get(part), device) for part in batch.parts] for kind in windows
    }
    return [
        TorchPagedAttention(kv_cache, layer, batch, windows[kind], slot_mappings[kind], masks[kind])
        for layer, kind in enumerate(kv_cache.kinds)
    ]


class TritonPagedAttention:
    """One layer's attention over pages and canvases through the kernels.

    Args:
        spans: attention metadata of all rows. slot_mapping: where the keys and values of the causal rows, which come
            first, are written; None: there are none.
    """

    def __init__(
        self,
        attention: PagedAttention,
        pages: tuple[Tensor, Tensor],
        spans: Any,
        window: int | None,
        slot_mapping: Int[Tensor, " read"] | None = None,
    ) -> None:
        self.attention, self.pages = attention, pages
        self.spans, self.window, self.slot_mapping = spans, window, slot_mapping

    def __call__(self, query: Heads, key: KeyHeads, value: KeyHeads) -> Heads:
        """Write the causal rows, then attend; if there are fewer queries than keys, they are those of the last rows."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        skipped = len(key) - len(query)
        if self.slot_mapping is not None and len(self.slot_mapping):
            written = len(self.slot_mapping)
            self.attention.write_kv(key[:written], value[:written], self.pages, self.slot_mapping)
        spans = self.spans if not skipped else _without_first(self.spans, skipped)
        output = self.attention.attend(query, key[skipped:], value[skipped:], self.pages, spans, window=self.window)
        return output.transpose(0, 1)[None]


def _spans(batch: Batch, kind: LayerKind, device: torch.device, attention: PagedAttention) -> Any:
    """The attention metadata of a batch for layers of one kind, on the device."""
    tables = [part.request.tables[kind] for part in batch.parts]
    width = max(1, *map(len, tables))
    table = torch.tensor([[*pages, *[0] * (width - len(pages))] for pages in tables], dtype=torch.int32)
    columns = [
        [part.start, part.stop - part.start, part.first if part.canvas else part.end, not part.canvas]
        for part in batch.parts
    ]
    first, count, stop, causal = to_device(torch.tensor(columns, dtype=torch.int32).t().contiguous(), device)
    return attention.SpanTable(first=first, count=count, stop=stop, causal=causal != 0, table=to_device(table, device))


def _without_first(spans: Any, skipped: int) -> Any:
    """The spans of the rows from `skipped` on; earlier ones stay as empty entries."""
    return replace(spans, first=spans.first - skipped, count=spans.count * (spans.first >= skipped))


class TorchPagedAttention:
    """One layer's attention over pages and canvases in torch."""

    def __init__(
        self,
        kv_cache: KVCache,
        layer: int,
        batch: Batch,
        window: int | None,
        slot_mapping: Int[Tensor, " read"],
        masks: Sequence[Bool[Tensor, "_queries _keys"] | None],
    ) -> None:
        self.kv_cache, self.layer, self.batch, self.window = kv_cache, layer, batch, window
        self.slot_mapping, self.masks = slot_mapping, masks

    def __call__(self, query: Heads, key: KeyHeads, value: KeyHeads) -> Heads:
        """Write the causal rows, then attend; if there are fewer queries than keys, they are those of the last rows."""
        written, skipped = self.batch.num_causal, key.shape[2] - query.shape[2]
        key, value = key[0], value[0]
        if written:
            self.kv_cache.write(self.layer, self.slot_mapping, key[:, :written], value[:, :written])
        kind = self.kv_cache.kinds[self.layer]
        spans = []
        for part, mask in zip(self.batch.parts, self.masks, strict=True):
            if part.start < skipped:
                continue
            start, stop = oldest_visible(part.first, self.window), part.first if part.canvas else part.end
            kv = [self.kv_cache.view(self.layer, part.request.tables[kind], start, stop)]
            if part.canvas:
                kv.append((key[:, part.start : part.stop], value[:, part.start : part.stop]))
            rows = (part.start - skipped, part.stop - skipped)
            first_key = None if part.canvas else start
            spans.append(AttentionSpan(start=rows[0], stop=rows[1], kv=tuple(kv), mask=mask, first_key=first_key))
        return varlen_attention(query[0], spans)[None]


def oldest_visible(position: int, window: int | None) -> int:
    """The first position that the token at `position` attends to, being itself the last of its window."""
    return 0 if window is None else max(0, position - (window - 1))


def _mask(
    part: Part, window: int | None, image_run: Int[Tensor, " queries"] | None, device: torch.device
) -> Bool[Tensor, "queries keys"] | None:
    """None for a canvas, which attends to all of its keys, and for a single token."""
    count = part.stop - part.start
    if part.canvas or count == 1:
        return None
    width = part.first - oldest_visible(part.first, window)
    lengths = torch.full((1,), width, device=device)
    return causal_mask(lengths, width, count, window, None if image_run is None else image_run[None])[0]
