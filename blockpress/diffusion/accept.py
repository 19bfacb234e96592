"""Which tokens of a step to keep: the k most certain ones, as long as their total entropy stays small.

    entropies sorted      0.00  0.01  0.03  0.08  0.40  1.20     bound 0.1
    sum before each       0.00  0.00  0.01  0.04  0.12  0.52
    accepted               yes   yes   yes   yes    no    no

The sum of the accepted entropies without the largest bounds their mutual information, so that they may be drawn as if
they were independent. Source: Ben-Hamu et al., arXiv 2505.24857; reference model, section 2.
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
    """Which positions keep their sampled token, given the entropy of each in nats; the others become noise again.

    A row's result must not depend on the other rows: they come and go with other requests.
    """

    def __call__(self, entropy: Entropy, /) -> Accepted: ...


@dataclass(frozen=True)
class EntropyBound:
    """Accept the lowest-entropy positions while their sum without the largest stays within `bound` nats (one for all
    rows, or one per row)."""

    bound: float | Float32[Tensor, "batch 1"]

    def __call__(self, entropy: Entropy) -> Accepted:
        """The accepted positions of every row; the most certain one is always among them.

        >>> EntropyBound(0.1)(torch.tensor([[0.4, 0.08, 0.0, 1.2, 0.03, 0.01]])).int().tolist()
        [[0, 1, 1, 0, 1, 1]]
        """
        ordered, order = torch.sort(entropy, dim=-1, stable=True)
        accepted = ordered.cumsum(-1) - ordered <= self.bound
        return torch.zeros_like(accepted).scatter(-1, order, accepted)
