"""The statistics of a block of products of the head, and the torch version: the reference over a few rows at a time.

Invariant: a product of -inf is a banned token, under a cap too: its logit is -inf.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from blockpress.ops.vocabulary import plain
from blockpress.ops.vocabulary.types import ClassBias, ClassStats, TokenClasses

Probabilities = Literal["whole", "sparse", "few"] | None
"""The probabilities that a self-conditioning embedding is computed from: all of them, the largest alone, all of those
that float32 can tell from 0 where they are few, or none."""

MOST = 256
"""Most tokens with sparse probabilities; more are no cheaper than the whole vocabulary."""

DROPPED = 2.0**-9
"""Most probability that the sparse form leaves out."""

LIMITS = {"sparse": (MOST, DROPPED - 1e-6), "few": (1024, 2.0**-22)}
"""Most tokens, and most probability that is left out."""

AT_ONCE = {"cpu": 1 << 22, "other": 1 << 26}
"""Float32 logits that the torch version holds at a time: what fits caches, and elsewhere what is worth a launch."""


@dataclass(frozen=True)
class Sparse:
    """Each row's likeliest tokens and probabilities: the first `counts` of `ids` and `shares`; -1: it needs more."""

    counts: Int[Tensor, " rows"]
    ids: Int[Tensor, "rows most"]
    shares: Float32[Tensor, "rows most"]


@dataclass(frozen=True)
class BlockStats:
    """Statistics of a block; entropies and `total`, the log of the sum of exp(scaled), in nats.

    `probabilities` are rounded to the products' dtype and overwrite the products. With `sparse`, only rows of count -1
    have them; the other rows are undefined. Without probabilities and bias the products are unchanged.
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
    probabilities: Probabilities = None,
    bias: ClassBias | None = None,
) -> BlockStats:
    """Read a block in slices of rows, so that few are float32 at a time; probabilities overwrite the products.

    Args:
        cap: the softcap of the logits; None: no cap.
        uniform: 0 <= u < 1 for each row's sample; None: no samples.
        probabilities: which probabilities to compute; "few" are all of them here.
        bias: what is added to the scaled logits; None: nothing.
    """
    rows, vocab = product.shape
    step = max(1, AT_ONCE["cpu" if product.device.type == "cpu" else "other"] // vocab)
    if rows == 1 and product.device.type == "cpu":  # threads would share one row's sums; of two, each has its own
        pair = product.repeat(2, 1)
        draws = None if uniform is None else uniform.repeat(2)
        double = bias and ClassBias(bias.classes, bias.values.repeat(2, 1))
        stats = block_stats(pair, cap, temperature.repeat(2), draws, probabilities, double)
        return _first(stats, product.copy_(pair[:1]) if probabilities else None)
    parts = []
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        draws = None if uniform is None else uniform[chunk]
        parts.append(_some(product[chunk], cap, temperature[chunk], draws, probabilities, bias and bias.rows(chunk)))
    argmax, sample, entropy, total = (torch.cat(x) if x[0] is not None else None for x in zip(*parts, strict=True))
    assert argmax is not None and entropy is not None and total is not None
    return BlockStats(
        argmax,
        sample,
        entropy,
        total,
        product if probabilities else None,
        _sparse(product) if probabilities == "sparse" else None,
    )


def _first(stats: BlockStats, probabilities: Tensor | None) -> BlockStats:
    """The first row alone."""
    sparse = stats.sparse and Sparse(stats.sparse.counts[:1], stats.sparse.ids[:1], stats.sparse.shares[:1])
    sample = None if stats.sample is None else stats.sample[:1]
    return BlockStats(stats.argmax[:1], sample, stats.entropy[:1], stats.total[:1], probabilities, sparse)


def _some(
    product: Float[Tensor, "some vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " some"],
    uniform: Float64[Tensor, " some"] | None,
    probabilities: Probabilities,
    bias: ClassBias | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    scaled = scaled_logits(product, cap, temperature)
    if bias is not None:
        scaled = bias.added(scaled)
    sample = None if uniform is None else plain.sample(scaled[None], uniform[None])[0]
    result = scaled.argmax(-1), sample, plain.entropy(scaled[None])[0], scaled.logsumexp(-1)
    if probabilities is not None:
        product.copy_(torch.softmax(scaled.to(product.dtype), dim=-1, dtype=torch.float32))
    return result


def _sparse(probabilities: Float[Tensor, "rows vocab"]) -> Sparse:
    """The likeliest tokens of each row: as few as leave out no more than DROPPED."""
    shares, ids = probabilities.topk(min(MOST, probabilities.shape[-1]), dim=-1)
    shares = shares.float()
    total = probabilities.sum(-1, dtype=torch.float32)
    left_out = total[:, None] - shares.cumsum(-1)
    enough = left_out <= DROPPED / 2  # half of it is a margin for rounded probabilities
    counts = torch.where(enough[:, -1], (~enough).sum(-1) + 1, -1)
    return Sparse(counts, ids, shares)


def class_stats(
    product: Float[Tensor, "rows held"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    classes: TokenClasses,
) -> ClassStats:
    """The statistics of each class of tokens, from products of a row for each position; see `block_stats`.

    A class's sum is relative to its own largest logit, so one that is far below others keeps all of its digits.
    """
    shape, held = (len(product), len(classes)), classes.starts.tolist()
    mass, best = product.new_empty(shape, dtype=torch.float64), product.new_empty(shape, dtype=torch.float32)
    token = classes.starts.new_empty(shape)
    step = max(1, AT_ONCE["cpu" if product.device.type == "cpu" else "other"] // product.shape[1])
    for start in range(0, len(product), step):
        rows = slice(start, start + step)
        scaled = scaled_logits(product[rows], cap, temperature[rows])
        for label, (first, stop) in enumerate(itertools.pairwise(held)):
            tokens = classes.members[first:stop]
            own = scaled[:, tokens]
            highest, place = own.max(-1)
            finite = highest.masked_fill(highest.isneginf(), 0)
            weight = (own - finite[:, None]).exp().sum(-1, dtype=torch.float64)
            mass[rows, label], best[rows, label], token[rows, label] = (
                weight.log() + finite,
                highest,
                tokens[place].long(),
            )
    return ClassStats(mass, best, token)
