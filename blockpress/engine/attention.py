"""What the rows of a forward look at: their requests' pages and, of a canvas, each other.

    PagedLook     in torch, on any device, pictures included: the truth
    KernelLook    in one launch a layer, what to look at read on the device: `ops/kernels/attention.py`

Invariant: in every layer all causal keys and values are written before any row looks, so a canvas sees what was
committed beside it, as if it had been read one forward earlier. Both kinds see the same, within float rounding.
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
    """What `ops/kernels/attention.py` offers; tests put the same in torch in its place."""

    @property
    def SpanTable(self) -> Callable[..., Any]: ...  # noqa: N802

    @property
    def attend(self) -> Callable[..., Tensor]: ...

    @property
    def write_kv(self) -> Callable[..., None]: ...


def kernels_for(kv_cache: KVCache) -> PagedAttention | None:
    """The kernels, where they can read these pages: on a GPU with Triton, heads of a power of two."""
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
    """How the rows of every layer look.

    Args:
        windows: how far each kind of layer looks back, the token itself included; None: without limit.
        runs: for the parts that show pictures, the picture of each token, -1 for text.
        attention: kernels, which take what shows no pictures; None: `TorchPagedAttention` for all.
    """
    causal = (*batch.kv_only, *batch.with_logits)
    places = {}
    for kind in windows:
        listed = [
            place for part in causal for place in kv_cache.slot_mapping(part.request.tables[kind], part.first, part.end)
        ]
        places[kind] = to_device(torch.tensor(listed, dtype=torch.long), device)
    if attention is not None and not image_runs:
        spans = {kind: _spans(batch, kind, device, attention) for kind in windows}
        return [
            TritonPagedAttention(attention, kv_cache.pages(layer), spans[kind], windows[kind], places[kind])
            for layer, kind in enumerate(kv_cache.kinds)
        ]
    masks = {
        kind: [_mask(part, windows[kind], image_runs.get(part), device) for part in batch.parts] for kind in windows
    }
    return [
        TorchPagedAttention(kv_cache, layer, batch, windows[kind], places[kind], masks[kind])
        for layer, kind in enumerate(kv_cache.kinds)
    ]


class TritonPagedAttention:
    """One layer's rows look at pages and each other through the kernels.

    Args:
        spans: of all rows. places: where the first rows, those of the causal pass, are written; None: there are none.
    """

    def __init__(
        self,
        attention: PagedAttention,
        pages: tuple[Tensor, Tensor],
        spans: Any,
        window: int | None,
        slot_mapping: Int[Tensor, " read"] | None = None,
    ) -> None:
        self.attention, self.pages, self.spans, self.window, self.slot_mapping = (
            attention,
            pages,
            spans,
            window,
            slot_mapping,
        )

    def __call__(self, query: Heads, key: KeyHeads, value: KeyHeads) -> Heads:
        """Write the causal rows, then look; where there are fewer queries than keys, those of the last rows."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        gone = len(key) - len(query)
        if self.slot_mapping is not None and len(self.slot_mapping):
            read = len(self.slot_mapping)
            self.attention.write_kv(key[:read], value[:read], self.pages, self.slot_mapping)
        spans = self.spans if not gone else _behind(self.spans, gone)
        seen = self.attention.attend(query, key[gone:], value[gone:], self.pages, spans, window=self.window)
        return seen.transpose(0, 1)[None]


def _spans(batch: Batch, kind: LayerKind, device: torch.device, attention: PagedAttention) -> Any:
    """The parts of a batch for layers of one kind, on the device."""
    tables = [part.request.tables[kind] for part in batch.parts]
    width = max(1, *map(len, tables))
    table = torch.tensor([[*each, *[0] * (width - len(each))] for each in tables], dtype=torch.int32)
    columns = [
        [part.start, part.stop - part.start, part.first if part.canvas else part.end, not part.canvas]
        for part in batch.parts
    ]
    first, count, stop, causal = to_device(torch.tensor(columns, dtype=torch.int32).t().contiguous(), device)
    return attention.SpanTable(first=first, count=count, stop=stop, causal=causal != 0, table=to_device(table, device))


def _behind(spans: Any, gone: int) -> Any:
    """The spans of the rows from `gone` on; those before it stay as empty slots."""
    return replace(spans, first=spans.first - gone, count=spans.count * (spans.first >= gone))


class TorchPagedAttention:
    """One layer's rows look at their requests' pages and, of a canvas, at each other."""

    def __init__(
        self,
        kv_cache: KVCache,
        layer: int,
        batch: Batch,
        window: int | None,
        slot_mapping: Int[Tensor, " read"],
        masks: Sequence[Bool[Tensor, "_queries _seen"] | None],
    ) -> None:
        self.kv_cache, self.layer, self.batch, self.window = kv_cache, layer, batch, window
        self.slot_mapping, self.masks = slot_mapping, masks

    def __call__(self, query: Heads, key: KeyHeads, value: KeyHeads) -> Heads:
        """Write the causal rows, then look; where there are fewer queries than keys, those of the last rows."""
        read, gone = self.batch.num_causal, key.shape[2] - query.shape[2]
        key, value = key[0], value[0]
        if read:
            self.kv_cache.write(self.layer, self.slot_mapping, key[:, :read], value[:, :read])
        kind = self.kv_cache.kinds[self.layer]
        spans = []
        for part, mask in zip(self.batch.parts, self.masks, strict=True):
            if part.start < gone:
                continue
            stop = part.first if part.canvas else part.end
            seen = [
                self.kv_cache.view(self.layer, part.request.tables[kind], oldest_visible(part.first, self.window), stop)
            ]
            if part.canvas:
                seen.append((key[:, part.start : part.stop], value[:, part.start : part.stop]))
            spans.append(AttentionSpan(start=part.start - gone, stop=part.stop - gone, kv=tuple(seen), mask=mask))
        return varlen_attention(query[0], spans)[None]


def oldest_visible(position: int, window: int | None) -> int:
    """The first token that one at `position` sees, itself being the last of its window."""
    return 0 if window is None else max(0, position - (window - 1))


def _mask(
    part: Part, window: int | None, runs: Int[Tensor, " own"] | None, device: torch.device
) -> Bool[Tensor, "queries seen"] | None:
    """None for a canvas, which sees all that it is given, and for a single token."""
    own = part.stop - part.start
    if part.canvas or own == 1:
        return None
    width = part.first - oldest_visible(part.first, window)
    lengths = torch.full((1,), width, device=device)
    return causal_mask(lengths, width, own, window, None if runs is None else runs[None])[0]
