"""What is read from a block of products of the head, and the version in torch: the truth over a few rows at a time.

Invariant: a product of -inf is a banned token, under a cap too: its logit is -inf.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from blockpress.ops.vocabulary import plain

Probabilities = Literal["whole", "sparse"] | None
"""The probabilities that a signal is made of: all of them, the largest alone, or none."""

MOST = 256
"""Tokens of a sparse belief; more are no cheaper than the whole vocabulary."""

DROPPED = 2.0**-9
"""The most probability that a sparse belief leaves out."""

AT_ONCE = {"cpu": 1 << 22, "other": 1 << 26}
"""Float32 logits that the version in torch holds at a time: what caches hold, and elsewhere what a launch is worth."""


@dataclass(frozen=True)
class Sparse:
    """Of each row the tokens that hold its belief: the first `counts` of `ids` and `shares`; -1 where it needs more."""

    counts: Int[Tensor, " rows"]
    ids: Int[Tensor, "rows most"]
    shares: Float32[Tensor, "rows most"]


@dataclass(frozen=True)
class BlockStats:
    """What is read from a block; entropies and `total`, the log of the sum of exp(scaled), in nats.

    `probabilities` are rounded to the products' dtype and written over the products. With "sparse", only the rows of
    count -1 have them there, and the other rows hold nothing of use. Without probabilities the products are left alone.
    """

    argmax: Int[Tensor, " rows"]
    sample: Int[Tensor, " rows"] | None
    entropy: Float32[Tensor, " rows"]
    total: Float32[Tensor, " rows"]
    probabilities: Float[Tensor, "rows vocab"] | None
    sparse: Sparse | None


def scaled_logits(
    product: Float[Tensor, "rows some"], cap: float | None, temperature: Float32[Tensor, " rows"]
) -> Float32[Tensor, "rows some"]:
    """Products capped and divided by their row's temperature, in float32."""
    wide = product.float()
    if cap is None:
        return wide / temperature[:, None]
    scaled = (torch.tanh(wide / cap) * cap).div_(temperature[:, None])
    return scaled.masked_fill_(product.isneginf(), float("-inf"))


def block_stats(
    product: Float[Tensor, "rows vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    uniform: Float64[Tensor, " rows"] | None = None,
    belief: Probabilities = None,
) -> BlockStats:
    """Read a block in slices of rows, so that few of them are float32 at a time; beliefs take the products' place.

    Args:
        cap: of the logits; None: none.
        uniform: 0 <= u < 1 for each row, for its sample; None: no samples.
        belief: which probabilities are wanted.
    """
    rows, vocab = product.shape
    step = max(1, AT_ONCE["cpu" if product.device.type == "cpu" else "other"] // vocab)
    parts = []
    for start in range(0, rows, step):
        here = slice(start, start + step)
        numbers = None if uniform is None else uniform[here]
        parts.append(_few(product[here], cap, temperature[here], numbers, belief))
    argmax, sample, entropy, total = (torch.cat(x) if x[0] is not None else None for x in zip(*parts, strict=True))
    assert argmax is not None and entropy is not None and total is not None
    return BlockStats(
        argmax, sample, entropy, total, product if belief else None, _sparse(product) if belief == "sparse" else None
    )


def _few(
    product: Float[Tensor, "few vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " few"],
    uniform: Float64[Tensor, " few"] | None,
    belief: Probabilities,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    scaled = scaled_logits(product, cap, temperature)
    sample = None if uniform is None else plain.sample(scaled[None], uniform[None])[0]
    answers = scaled.argmax(-1), sample, plain.entropy(scaled[None])[0], scaled.logsumexp(-1)
    if belief is not None:
        product.copy_(torch.softmax(scaled.to(product.dtype), dim=-1, dtype=torch.float32))
    return answers


def _sparse(belief: Float[Tensor, "rows vocab"]) -> Sparse:
    """The likeliest tokens of each row up to the first that leaves out no more than may be."""
    shares, ids = belief.topk(min(MOST, belief.shape[-1]), dim=-1)
    shares = shares.float()
    whole = belief.sum(-1, dtype=torch.float32)
    open_ = whole[:, None] - shares.cumsum(-1)
    enough = open_ <= DROPPED / 2  # rounded probabilities: half is kept in hand
    counts = torch.where(enough[:, -1], (~enough).sum(-1) + 1, -1)
    return Sparse(counts, ids, shares)
