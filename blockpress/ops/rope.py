"""Rotary position embedding: angles in float32, cosine and sine cast to the activations' dtype before the product.

Feature i rotates with feature i + dim/2. `proportional` leaves the pairs beyond its part at angle 0.
Source: reference model, `DiffusionGemmaTextRotaryEmbedding`; `transformers` `_compute_proportional_rope_parameters`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from blockpress.config import Rope
from blockpress.ops import rows
from blockpress.shapes import Heads, Positions


def inverse_frequencies(rope: Rope, head_dim: int) -> Float32[Tensor, " half"]:
    """Radians per position for each of the head's `head_dim // 2` pairs.

    >>> from blockpress.config import Rope
    >>> inverse_frequencies(Rope(theta=16.0, kind="proportional", partial=0.5), 8).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    pairs = int(rope.partial * head_dim // 2) if rope.kind == "proportional" else head_dim // 2
    exponents = torch.arange(0, 2 * pairs, 2, dtype=torch.int64).float() / head_dim
    turning = 1.0 / (rope.theta**exponents)
    still = torch.zeros(head_dim // 2 - pairs, dtype=torch.float32)
    return torch.cat((turning, still)) / rope.factor


def rotary_tables(
    positions: Positions, frequencies: Float32[Tensor, " half"], dtype: torch.dtype
) -> tuple[Float[Tensor, "batch 1 length dim"], Float[Tensor, "batch 1 length dim"]]:
    """Cosine and sine of every position and feature, ready to broadcast over heads."""
    angles = positions[..., None].float() * frequencies
    doubled = torch.cat((angles, angles), dim=-1)[:, None]
    return doubled.cos().to(dtype), doubled.sin().to(dtype)


def rotate(x: Heads, cos: Float[Tensor, "batch 1 length dim"], sin: Float[Tensor, "batch 1 length dim"]) -> Heads:
    """Rotate each pair (i, i + dim/2) of every head by its position's angle; in one C++ pass where possible."""
    return rows.rotate(x, cos, sin) if rows.supports(x, cos, sin) else plain(x, cos, sin)


def plain(x: Heads, cos: Float[Tensor, "batch 1 length dim"], sin: Float[Tensor, "batch 1 length dim"]) -> Heads:
    """The same in torch."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
