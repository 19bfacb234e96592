"""Attention over a boolean mask, scale 1 (the queries and keys are normed, so there is no 1/sqrt(dim)).

`plain` is the truth: explicit products and a float32 softmax. `fused` is torch's scaled_dot_product_attention, which
is faster forward but, on a CPU, three to four times slower backward at short lengths; training uses `plain`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from blockpress.shapes import Heads, KeyHeads, Mask

AttentionOp = Callable[[Heads, KeyHeads, KeyHeads, Mask | None], Heads]


def plain(query: Heads, key: KeyHeads, value: KeyHeads, mask: Mask | None) -> Heads:
    """softmax(q k^T) v with grouped heads: query has g times the heads of key and value.

    Args:
        query: [batch, heads, queries, dim]; key, value: [batch, heads / g, keys, dim].
        mask: [batch or 1, queries, keys], True where a query may look; None lets every query see every key.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


def fused(query: Heads, key: KeyHeads, value: KeyHeads, mask: Mask | None) -> Heads:
    """The same function through torch's scaled_dot_product_attention."""
    grouped = query.shape[1] != key.shape[1]
    visible: Tensor | None = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0, enable_gqa=grouped)
