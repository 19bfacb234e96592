"""Attention over a flat batch in one call of C++: every span reads its pieces of keys and values in place.

Run it:  python -m pytest tests/ops/test_spans.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

from jaxtyping import Float
from torch import Tensor

from blockpress.ops.attention import AttentionSpan
from blockpress.ops.cpu import bridge


class _Piece(ctypes.Structure):
    _fields_ = [
        ("key", c_void_p),
        ("value", c_void_p),
        *((name, c_int64) for name in ("count", "key_head", "key_row", "value_head", "value_row")),
    ]


class _Span(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("start", "stop", "first", "last")),
        ("mask", c_void_p),
        *((name, c_int64) for name in ("mask_row", "lane")),
    ]


def attend(query: Float[Tensor, "heads rows dim"], spans: Sequence[AttentionSpan]) -> Float[Tensor, "heads rows dim"]:
    """`spans.varlen_attention` without copies of keys and values; the result's memory is [rows, heads, dim]."""
    (heads, rows, dim), dtype = query.shape, query.dtype
    query = bridge.widened(query)
    query = query if query.stride(2) == 1 else query.contiguous()
    out, keep_alive = query.new_empty(rows, heads, dim), []
    pieces: list[_Piece] = []
    table = (_Span * len(spans))()
    for entry, span in zip(table, spans, strict=True):
        entry.start, entry.stop, entry.first = span.start, span.stop, len(pieces)
        for key, value in span.kv:
            if key.dtype != query.dtype:
                key, value = key.to(query.dtype), value.to(query.dtype)
                keep_alive += [key, value]
            if key.stride(2) != 1 or value.stride(2) != 1:
                key, value = key.contiguous(), value.contiguous()
                keep_alive += [key, value]
            (key_head, key_row, _), (value_head, value_row, _) = key.stride(), value.stride()
            pointers = (key.data_ptr(), value.data_ptr(), key.shape[1])
            pieces.append(_Piece(*pointers, key_head, key_row, value_head, value_row))
        entry.last, entry.lane = len(pieces), span.first_key or 0
        if span.mask is not None:
            mask = span.mask if span.mask.stride(-1) == 1 else span.mask.contiguous()
            keep_alive.append(mask)
            entry.mask, entry.mask_row = mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0
    kv = spans[0].kv[0][0].shape[0] if spans else heads
    arguments = (query.data_ptr(), query.stride(0), query.stride(1), heads, kv, dim)
    bridge.call("attend", query.dtype, *arguments, table, len(spans), (_Piece * len(pieces))(*pieces), out.data_ptr())
    return out.to(dtype).transpose(0, 1)
