"""The gated activation of every feed-forward part: gelu_tanh(gate) * up."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import rows


def geglu(gate: Float[Tensor, "*rows size"], up: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
    """With the tanh approximation of GELU that the checkpoints were trained with; in one C++ pass where possible."""
    return rows.geglu(gate, up) if rows.supports(gate, up) else plain(gate, up)


def plain(gate: Float[Tensor, "*rows size"], up: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
    """The same in torch.

    On a CPU torch computes a tensor's last few values with another tanh than the others: only with gradients, where the
    same bits in any batch are not promised.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or gate.device.type != "cpu":
        return F.gelu(gate, approximate="tanh") * up
    x = gate.float()
    share = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).add_(1)
    return (0.5 * x * share).to(gate.dtype) * up
