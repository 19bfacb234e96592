"""The gated activation of every feed-forward part: gelu_tanh(gate) * up."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def geglu(gate: Float[Tensor, "*rows size"], up: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
    """The tanh approximation of GELU, as the checkpoints were trained with."""
    return F.gelu(gate, approximate="tanh") * up
