"""What a step needs from the logits over the vocabulary: argmax, entropy, a sample.

The sample comes from one uniform number by inverse CDF: weights are summed in float64 over tiles of 4,096 tokens, first
the tile is found, then the token in it, so that a version that never holds all logits samples the same token.
Invariant: everything here works on temperature-scaled float32 logits, as the reference model does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Float64
from torch import Tensor
from torch.nn import functional as F

from blockpress.shapes import Canvas, Entropy, Logits

TILE = 4096


def entropy(scaled: Logits) -> Entropy:
    """Shannon entropy of softmax(scaled) at every position, in nats.

    A token of logit -inf has probability 0 and adds nothing. With x the logits minus the largest, w = exp(x) and t the
    sum of w without the largest one's 1, it is log(1 + t) - sum(w x) / (1 + t): neither term loses digits. float32
    `log_softmax` loses small weights next to that 1, which costs up to 4e-3 nats over 262,144 tokens.
    """
    largest = scaled.max(-1, keepdim=True)
    below = scaled - largest.values
    weights = below.exp().scatter_(-1, largest.indices, 0.0)
    others = weights.sum(-1)
    moment = below.clamp_(min=torch.finfo(below.dtype).min).mul_(weights).sum(-1)
    return others.log1p() - moment / (1 + others)


def sample(scaled: Logits, uniform: Float64[Tensor, "batch canvas"]) -> Canvas:
    """The token whose interval of the cumulative distribution contains `uniform` (0 <= u < 1).

    >>> even = torch.zeros(1, 4, 4)
    >>> sample(even, torch.tensor([[0.0, 0.25, 0.74, 0.999]], dtype=torch.float64)).tolist()
    [[0, 1, 2, 3]]
    """
    weights = _tiles((scaled - scaled.amax(-1, keepdim=True)).exp())
    through = weights.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform * through[..., -1]
    tile = _first_above(through, target)
    before = torch.where(tile > 0, through.gather(-1, (tile - 1).clamp(min=0)[..., None])[..., 0], 0.0)
    inside = weights.gather(-2, tile[..., None, None].expand(*tile.shape, 1, weights.shape[-1]))[..., 0, :]
    token = _first_above(inside.double().cumsum(-1), target - before)
    return tile * weights.shape[-1] + token


def _tiles(weights: Float32[Tensor, "batch canvas vocab"]) -> Float32[Tensor, "batch canvas tiles tile"]:
    """The last axis split into tiles, the last one padded with weight 0."""
    size = min(TILE, weights.shape[-1])
    return F.pad(weights, (0, -weights.shape[-1] % size)).unflatten(-1, (-1, size))


def _first_above(through: Float64[Tensor, "batch canvas n"], target: Float64[Tensor, "batch canvas"]) -> Canvas:
    """The first index whose running sum exceeds the target; if rounding leaves none, the last one with weight."""
    above = (through <= target[..., None]).sum(-1)
    last = (through < through[..., -1:]).sum(-1)
    return torch.minimum(above, last)
