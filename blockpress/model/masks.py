"""Attention masks, drawn. A row of a drawing is a query, a column a key; the bar separates the context from new tokens.

Invariant: a causal query never sees a later token, a canvas token sees all of its canvas, and on sliding layers every
canvas token sees the same last `window - 1` tokens of the context, however long the canvas is. The one exception to the
first: the tokens of one picture see each other, earlier and later ones, whatever the window.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from blockpress.shapes import Mask

Lengths = Int[Tensor, " batch"]


def causal_mask(
    lengths: Lengths,
    width: int,
    length: int,
    window: int | None,
    picture_ids: Int[Tensor, "batch length"] | None = None,
) -> Mask:
    """Prefill and commit: `length` new tokens after `lengths` cached ones.

    Args:
        lengths: cached tokens of each row; `width` is the cache's, so keys from lengths[b] to width are padding.
        length: new tokens per row. window: how far a sliding layer looks back, the token itself included; None: no
            limit.
        picture_ids: for each new token the number of its picture, -1 for text.

    >>> print(draw_mask(causal_mask(torch.tensor([2]), 3, 4, None), 3))
    11. | 1...
    11. | 11..
    11. | 111.
    11. | 1111
    >>> print(draw_mask(causal_mask(torch.tensor([2]), 3, 4, 3), 3))
    11. | 1...
    .1. | 11..
    ... | 111.
    ... | .111
    >>> print(draw_mask(causal_mask(torch.tensor([2]), 3, 4, 2, torch.tensor([[-1, 0, 0, 0]])), 3))
    .1. | 1...
    ... | 1111
    ... | .111
    ... | .111
    """
    device = lengths.device
    query = lengths[:, None] + torch.arange(length, device=device)
    cached = torch.arange(width, device=device).expand(len(lengths), width)
    key = torch.cat((cached, query), dim=1)
    real = torch.cat((cached < lengths[:, None], torch.ones_like(query, dtype=torch.bool)), dim=1)
    # Compared, never subtracted: the distances of a long prompt would take eight times the mask's memory.
    visible = (key[:, None, :] <= query[:, :, None]) & real[:, None, :]
    if window is not None:
        visible &= key[:, None, :] > query[:, :, None] - window
    if picture_ids is not None:
        visible[:, :, width:] |= (picture_ids[:, :, None] == picture_ids[:, None, :]) & (picture_ids >= 0)[:, :, None]
    return visible


def canvas_mask(lengths: Lengths, width: int, canvas: int, window: int | None, start: int = 0) -> Mask:
    """Denoise: a canvas after `lengths` cached tokens, of which a sliding layer sees the last `window - 1`.

    Args:
        lengths: cached tokens of each row that the canvas may see (all before it).
        width: keys passed to attention, the first of which is token `start` of the row.

    >>> print(draw_mask(canvas_mask(torch.tensor([3]), 4, 3, None), 4))
    111. | 111
    111. | 111
    111. | 111
    >>> print(draw_mask(canvas_mask(torch.tensor([3]), 4, 3, 3), 4))
    .11. | 111
    .11. | 111
    .11. | 111
    """
    device = lengths.device
    key = torch.arange(start, start + width, device=device).expand(len(lengths), width)
    visible = key < lengths[:, None]
    if window is not None:
        visible = visible & (key >= lengths[:, None] - (window - 1))
    own_keys = torch.ones(len(lengths), canvas, dtype=torch.bool, device=device)
    return torch.cat((visible, own_keys), dim=1)[:, None].expand(-1, canvas, -1)


def draw_mask(mask: Mask, width: int) -> str:
    """The first row's mask as text: 1 visible, . masked; the bar comes after `width` context keys."""
    lines = ("".join("1" if visible else "." for visible in query) for query in mask[0].tolist())
    return "\n".join(f"{line[:width]} | {line[width:]}" for line in lines)
