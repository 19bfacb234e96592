"""How far restored weights are from the original ones, summed over pieces of a tensor as they pass by.

Invariant: the sums are in float64, so that the order and the size of the pieces do not show in the figures.

Run it:  python -m pytest tests/quantize/test_error.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """The error of one tensor, or of several taken together.

    relative: root of the mean squared error by the root of the mean square. cosine: of the angle between both.
    largest: of the absolute errors. values: how many.
    """

    values: int
    relative: float
    cosine: float
    largest: float


@dataclass
class ErrorSum:
    """Adds up pieces of original and restored weights; `result` is the error of them all."""

    values: int = 0
    missed: float = 0.0
    original: float = 0.0
    restored: float = 0.0
    both: float = 0.0
    largest: float = 0.0

    def add(self, original: Float[Tensor, "*shape"], restored: Float[Tensor, "*shape"]) -> None:
        """Count a piece. Shapes are equal; both are read in float32."""
        for x, y in zip(_pieces(original), _pieces(restored), strict=True):
            off = x - y
            self.values += x.numel()
            self.missed += float(torch.dot(off, off))
            self.original += float(torch.dot(x, x))
            self.restored += float(torch.dot(y, y))
            self.both += float(torch.dot(x, y))
            self.largest = max(self.largest, float(off.abs_().max()))

    def join(self, other: ErrorSum) -> None:
        """Count everything that another sum has counted."""
        self.largest = max(self.largest, other.largest)
        for name in ("values", "missed", "original", "restored", "both"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def result(self) -> WeightError:
        """The figures of everything so far; weights that are all zero and stay so have no error."""
        relative = math.sqrt(self.missed / self.original) if self.original else (math.inf if self.missed else 0.0)
        norm = math.sqrt(self.original * self.restored)
        cosine = self.both / norm if norm else (0.0 if self.missed else 1.0)
        return WeightError(values=self.values, relative=relative, cosine=min(1.0, cosine), largest=self.largest)


def _pieces(tensor: Tensor) -> list[Tensor]:
    # Small enough for a float32 sum of squares to lose nothing that shows, and for the cache of a core.
    return [piece.float() for piece in tensor.detach().flatten().split(1 << 18)]
