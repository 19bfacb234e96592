"""Who may look at whom, drawn. A row of a drawing is a query, a column a key; the bar parts context from own tokens.

Invariant: a causal query never sees a later token, a canvas token sees all of its canvas, and on sliding layers every
canvas token sees the same last `window - 1` tokens of the context, however long the canvas is. The one exception to the
first: the tokens of one picture see each other, before and after, whatever the window.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from blockpress.shapes import Mask

Lengths = Int[Tensor, " batch"]


def causal_mask(
    lengths: Lengths, width: int, own: int, window: int | None, runs: Int[Tensor, "batch own"] | None = None
) -> Mask:
    """Prefill and commit: `own` new tokens behind `lengths` cached ones.

    Args:
        lengths: cached tokens of each row; `width` is the cache's, so keys from lengths[b] to width are padding.
        own: new tokens a row. window: how far a sliding layer looks back, the token itself included; None: no limit.
        runs: for each new token the number of the picture that it belongs to, -1 for text.

    >>> print(draw(causal_mask(torch.tensor([2]), 3, 4, None), 3))
    11. | 1...
    11. | 11..
    11. | 111.
    11. | 1111
    >>> print(draw(causal_mask(torch.tensor([2]), 3, 4, 3), 3))
    11. | 1...
    .1. | 11..
    ... | 111.
    ... | .111
    >>> print(draw(causal_mask(torch.tensor([2]), 3, 4, 2, torch.tensor([[-1, 0, 0, 0]])), 3))
    .1. | 1...
    ... | 1111
    ... | .111
    ... | .111
    """
    device = lengths.device
    query = lengths[:, None] + torch.arange(own, device=device)
    cached = torch.arange(width, device=device).expand(len(lengths), width)
    key = torch.cat((cached, query), dim=1)
    real = torch.cat((cached < lengths[:, None], torch.ones_like(query, dtype=torch.bool)), dim=1)
    # Compared, never subtracted: of a long prompt the distances would be eight times the mask.
    seen = (key[:, None, :] <= query[:, :, None]) & real[:, None, :]
    if window is not None:
        seen &= key[:, None, :] > query[:, :, None] - window
    if runs is not None:
        seen[:, :, width:] |= (runs[:, :, None] == runs[:, None, :]) & (runs >= 0)[:, :, None]
    return seen


def canvas_mask(lengths: Lengths, width: int, canvas: int, window: int | None, start: int = 0) -> Mask:
    """Denoise: a canvas behind `lengths` cached tokens, of which a sliding layer sees the last `window - 1`.

    Args:
        lengths: cached tokens of each row that the canvas may see (strictly before it).
        width: keys handed over, the first of them token `start` of the row.

    >>> print(draw(canvas_mask(torch.tensor([3]), 4, 3, None), 4))
    111. | 111
    111. | 111
    111. | 111
    >>> print(draw(canvas_mask(torch.tensor([3]), 4, 3, 3), 4))
    .11. | 111
    .11. | 111
    .11. | 111
    """
    device = lengths.device
    key = torch.arange(start, start + width, device=device).expand(len(lengths), width)
    seen = key < lengths[:, None]
    if window is not None:
        seen = seen & (key >= lengths[:, None] - (window - 1))
    own = torch.ones(len(lengths), canvas, dtype=torch.bool, device=device)
    return torch.cat((seen, own), dim=1)[:, None].expand(-1, canvas, -1)


def draw_mask(mask: Mask, width: int) -> str:
    """The first row's mask as text: 1 sees, . does not; the bar stands behind `width` context keys."""
    lines = ("".join("1" if seen else "." for seen in query) for query in mask[0].tolist())
    return "\n".join(f"{line[:width]} | {line[width:]}" for line in lines)
