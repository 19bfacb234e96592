"""Which tokens may be sampled: the k likeliest, or the likeliest that together reach a probability.

    logits             2.0   1.0   0.0  -1.0        probabilities   0.64  0.24  0.09  0.03
    keep_top_k(2)      2.0   1.0  -inf  -inf
    keep_top_p(0.9)    2.0   1.0   0.0  -inf        0.64 + 0.24 < 0.9: the token that crosses 0.9 is kept

Invariant: at least one token is kept, and the logits of kept tokens are unchanged.
Run it:  python -m pytest --doctest-modules blockpress/ops/nucleus.py
Source: `TopKLogitsWarper` and `TopPLogitsWarper` of `transformers` 5.23; Holtzman et al., arXiv 1904.09751.
"""

from __future__ import annotations

from blockpress.shapes import Logits


def keep_top_k(scaled: Logits, k: int) -> Logits:
    """The logits, -inf below the k-th largest of each position; ties with it are kept.

    >>> import torch
    >>> keep_top_k(torch.tensor([[[2.0, 1.0, 0.0, -1.0]]]), 2)
    tensor([[[2., 1., -inf, -inf]]])
    """
    least = scaled.topk(min(k, scaled.shape[-1]), dim=-1).values[..., -1:]
    return scaled.masked_fill(scaled < least, float("-inf"))


def keep_top_p(scaled: Logits, p: float) -> Logits:
    """The logits, -inf for the unlikeliest tokens whose probabilities add up to at most 1 - p.

    >>> import torch
    >>> keep_top_p(torch.tensor([[[2.0, 1.0, 0.0, -1.0]]]), 0.9)
    tensor([[[2., 1., 0., -inf]]])
    """
    rising, order = scaled.sort(dim=-1)
    dropped = rising.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return scaled.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
