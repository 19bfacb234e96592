"""The gated activation of every feed-forward part: gelu_tanh(gate) * up."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import rows


def geglu(gate: Float[Tensor, "*rows size"], up: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
    """With the tanh approximation of GELU that the checkpoints were trained with; in one C++ pass where possible."""
    return rows.geglu(gate, up) if rows.supports(gate, up) else plain(gate, up)


def plain(gate: Float[Tensor, "*rows size"], up: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
    """The same in torch."""
    return F.gelu(gate, approximate="tanh") * up
