"""Which tokens of a step to keep: the k surest, as long as together they leave little open.

    entropies sorted      0.00  0.01  0.03  0.08  0.40  1.20     bound 0.1
    sum before each       0.00  0.00  0.01  0.04  0.12  0.52
    accepted               yes   yes   yes   yes    no    no

The sum of the accepted entropies but the largest bounds the mutual information between them, so that they may be drawn
as if they were independent. Source: Ben-Hamu et al., arXiv 2505.24857; reference model, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor

from blockpress.shapes import Accepted, Entropy


@runtime_checkable
class Accept(Protocol):
    """Which positions keep their sampled token, from the entropy of each in nats; the others become noise again.

    A row's answer must not depend on the other rows: they come and go with other requests.
    """

    def __call__(self, entropy: Entropy, /) -> Accepted: ...


@dataclass(frozen=True)
class EntropyBound:
    """Accept the lowest-entropy positions while their sum but the largest stays within `bound` nats, one a row or one
    for all."""

    bound: float | Float32[Tensor, "batch 1"]

    def __call__(self, entropy: Entropy) -> Accepted:
        """The accepted positions of every row; the surest one is always among them.

        >>> EntropyBound(0.1)(torch.tensor([[0.4, 0.08, 0.0, 1.2, 0.03, 0.01]])).int().tolist()
        [[0, 1, 1, 0, 1, 1]]
        """
        ordered, order = torch.sort(entropy, dim=-1, stable=True)
        kept = ordered.cumsum(-1) - ordered <= self.bound
        return torch.zeros_like(kept).scatter(-1, order, kept)
