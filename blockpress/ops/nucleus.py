"""Which tokens may be sampled: the k likeliest, the likeliest that together reach a probability, or those that have a
share of the likeliest one's.

    logits             2.0   1.0   0.0  -1.0        probabilities   0.64  0.24  0.09  0.03
    keep_top_k(2)      2.0   1.0  -inf  -inf
    keep_top_p(0.9)    2.0   1.0   0.0  -inf        0.64 + 0.24 < 0.9: the token that crosses 0.9 is kept
    keep_min_p(0.2)    2.0   1.0  -inf  -inf        0.09 / 0.64 < 0.2

Invariant: at least one token is kept, and the logits of kept tokens are unchanged.
Run it:  python -m pytest --doctest-modules blockpress/ops/nucleus.py tests/ops/test_vocabulary_changes.py
Source: `TopKLogitsWarper`, `TopPLogitsWarper` and `MinPLogitsWarper` of `transformers` 5.23; Holtzman et al., arXiv
1904.09751; Nguyen et al., arXiv 2407.01082.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from blockpress.shapes import Logits

MANY, BUCKETS = 4096, 1 << 16
"""Tokens from which a row is not sorted as a whole on a processor, and the buckets that it is put into, each of 2^-10
nats: sorting takes up to ten times as long."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """All three, one after another: each is of the probabilities that the one before has left."""

    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __call__(self, scaled: Logits) -> Logits:
        """The logits, -inf for tokens that may not be sampled."""
        if self.top_k is not None:
            scaled = keep_top_k(scaled, self.top_k)
        if self.top_p < 1:
            scaled = keep_top_p(scaled, self.top_p)
        return keep_min_p(scaled, self.min_p) if self.min_p > 0 else scaled

    def kept(
        self, falling: Float32[Tensor, "rows few"], total: Float32[Tensor, " rows"] | None
    ) -> tuple[Bool[Tensor, "rows few"], Bool[Tensor, " rows"]]:
        """Which of each row's likeliest tokens may be sampled, and whether no other token may be.

        Args:
            falling: their scaled logits, of equal ones that of the last token first. total: the log of the sum of exp
                over all tokens; it is needed for top_p without top_k.
        """
        kept, last = torch.ones_like(falling, dtype=torch.bool), falling[:, -1]
        whole = torch.ones_like(last, dtype=torch.bool)
        if self.top_k is not None:
            kept = falling >= falling[:, [min(self.top_k, falling.shape[1]) - 1]]
            whole = ~kept[:, -1]
            total = falling.masked_fill(~kept, float("-inf")).logsumexp(-1)
        if self.top_p < 1:
            assert total is not None
            through = (falling - total[:, None]).exp().cumsum(-1)
            kept[:, 1:] &= through[:, :-1] < self.top_p  # the likeliest one stays, though top_p were 0 in float32
        if self.min_p > 0:
            kept &= falling >= falling[:, :1] + math.log(self.min_p)
        least = falling.gather(1, kept.sum(-1, keepdim=True) - 1)[:, 0]
        return kept, whole & (last < least)


def keep_top_k(scaled: Logits, k: int) -> Logits:
    """The logits, -inf below the k-th largest of each position; ties with it are kept.

    >>> import torch
    >>> keep_top_k(torch.tensor([[[2.0, 1.0, 0.0, -1.0]]]), 2)
    tensor([[[2., 1., -inf, -inf]]])
    """
    least = scaled.topk(min(k, scaled.shape[-1]), dim=-1).values[..., -1:]
    return scaled.masked_fill(scaled < least, float("-inf"))


def keep_top_p(scaled: Logits, p: float) -> Logits:
    """The logits, -inf for the unlikeliest tokens whose probabilities add up to at most 1 - p; of equal ones the first.

    >>> import torch
    >>> keep_top_p(torch.tensor([[[2.0, 1.0, 0.0, -1.0]]]), 0.9)
    tensor([[[2., 1., 0., -inf]]])
    """
    if scaled.shape[-1] > MANY and scaled.device.type == "cpu":
        flat = scaled.flatten(0, -2)
        kept = torch.stack([_nucleus(row, p) for row in flat]) if len(flat) else flat.bool()
        return scaled.masked_fill(~kept.view_as(scaled), float("-inf"))
    rising, order = scaled.sort(dim=-1, stable=True)
    dropped = rising.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return scaled.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def _nucleus(scaled: Float32[Tensor, " vocab"], p: float) -> Bool[Tensor, " vocab"]:
    """What `keep_top_p` keeps of a row, by the masses of buckets of nearly equal tokens; only one bucket is sorted."""
    below = scaled.amax() - scaled
    mass = (-below).exp()
    bucket = (below * (BUCKETS / 64)).nan_to_num(posinf=BUCKETS).clamp(max=BUCKETS - 1).int()
    through = torch.bincount(bucket, weights=mass.double(), minlength=BUCKETS).cumsum(0)
    target = p * through[-1]
    last = int((through < target).sum().clamp(max=BUCKETS - 1))
    ids = (bucket == last).nonzero()[:, 0].flip(0)  # of equal tokens the last one comes first
    _, order = scaled[ids].sort(descending=True, stable=True)
    before = mass[ids[order]].double().cumsum(0) - mass[ids[order]]
    kept = bucket < last
    kept[ids[order[before + (through[last - 1] if last else 0.0) < target]]] = True
    return kept


def keep_min_p(scaled: Logits, p: float) -> Logits:
    """The logits, -inf for tokens with less than the share `p` of the likeliest one's probability.

    >>> import torch
    >>> keep_min_p(torch.tensor([[[2.0, 1.0, 0.0, -1.0]]]), 0.2)
    tensor([[[2., 1., -inf, -inf]]])
    """
    return scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + math.log(p), float("-inf"))
