"""RMSNorm in float32, cast back at the end: `x * (mean(x^2) + eps)^-0.5 * weight`.

The weight is used as stored (not 1 + weight). Source: reference model, `DiffusionGemmaRMSNorm`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from blockpress.ops import rows


def rms_norm(
    x: Float[Tensor, "*rows features"], weight: Float[Tensor, " features"] | None, eps: float
) -> Float[Tensor, "*rows features"]:
    """Normalise the last axis to a root mean square of 1, then scale by `weight` (None: no scale).

    The result has x's dtype; everything in between is float32. One C++ pass where possible, else `plain`.
    """
    return rows.rms_norm(x, weight, eps) if rows.supports(x, weight) else plain(x, weight, eps)


def plain(
    x: Float[Tensor, "*rows features"], weight: Float[Tensor, " features"] | None, eps: float
) -> Float[Tensor, "*rows features"]:
    """The same in torch."""
    wide = x.float()
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        normed = normed * weight.float()
    return normed.type_as(x)
