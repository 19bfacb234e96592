"""Attention over a boolean mask, scale 1 (queries and keys are normed, so there is no 1/sqrt(dim)).

`plain` is the reference: explicit products and a float32 softmax. `grouped` computes the same with the query heads of a
key head as rows of one product, and mask and softmax in one pass, forwards and backwards. `fused` is torch's
scaled_dot_product_attention, slower than either on a CPU (backward three to four times at short lengths).

Attention over a flat batch takes `AttentionSpan`s instead of one mask: `spans.py` in torch, `cpu/attention.py` in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import rows
from blockpress.shapes import Heads, KeyHeads, Mask

AttentionOp = Callable[[Heads, KeyHeads, KeyHeads, Mask | None], Heads]

Piece = tuple[Float[Tensor, "kv_heads _keys dim"], Float[Tensor, "kv_heads _keys dim"]]
"""Keys and values, of any strides."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSpan:
    """Rows start to stop of a flat batch, and the keys and values that they attend to.

    Args:
        start, stop: the rows of the queries.
        kv: keys and values in pieces, in the order of the mask's columns: the context, then a canvas's own.
        mask: True where a query attends to a key, over all pieces; None: every query attends to every key.
        first_key: the position of the first key of causal queries; None for a canvas. Sums over keys run in lanes or
            blocks, and a key's place in them follows from its position: so a query's bits do not depend on where the
            keys of its span begin and end.
    """

    start: int
    stop: int
    kv: tuple[Piece, ...]
    mask: Bool[Tensor, "#queries keys"] | None = None
    first_key: int | None = None

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return sum(key.shape[1] for key, _ in self.kv)


def plain(query: Heads, key: KeyHeads, value: KeyHeads, mask: Mask | None) -> Heads:
    """softmax(q k^T) v with grouped heads: query has g times the heads of key and value.

    Args:
        query: [batch, heads, queries, dim]; key, value: [batch, heads / g, keys, dim].
        mask: [batch or 1, queries, keys], True where a query attends to a key; None: every query to every key.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


def grouped(query: Heads, key: KeyHeads, value: KeyHeads, mask: Mask | None) -> Heads:
    """`plain` without copies of keys and values for every query head; `plain` itself for gradients on other devices."""
    if torch.is_grad_enabled() and not rows.differentiates(query):
        return plain(query, key, value, mask)
    batch, heads, queries, dim = query.shape
    kv, keys = key.shape[1], key.shape[2]
    packed = query.reshape(batch * kv, heads // kv * queries, dim)
    scores = torch.bmm(packed, key.reshape(batch * kv, keys, dim).transpose(1, 2))
    shares = softmax(scores.view(batch, heads, queries, keys), mask).view(scores.shape)
    return torch.bmm(shares, value.reshape(batch * kv, keys, dim)).view(query.shape)


def softmax(
    scores: Float[Tensor, "batch heads queries keys"], mask: Bool[Tensor, "#masks #queries keys"] | None
) -> Float[Tensor, "batch heads queries keys"]:
    """Softmax over the visible keys, in float32, returned in the scores' type; may overwrite the scores.

    Args:
        mask: batch entry b uses mask b % masks.
    """
    if rows.supports(scores):
        return rows.softmax_(scores, mask)
    if (torch.is_grad_enabled() or torch.compiler.is_compiling()) and rows.differentiates(scores):
        return rows.softmax(scores, mask)
    if mask is not None:
        repeated = mask.repeat(len(scores) // len(mask), 1, 1) if len(mask) > 1 else mask
        scores = scores.masked_fill(~repeated[:, None], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def fused(query: Heads, key: KeyHeads, value: KeyHeads, mask: Mask | None) -> Heads:
    """`plain` through torch's scaled_dot_product_attention."""
    grouped = query.shape[1] != key.shape[1]
    visible: Tensor | None = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0, enable_gqa=grouped)
