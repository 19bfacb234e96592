"""How far restored weights are from the original ones, accumulated over the pieces of a tensor.

Invariant: the sums are in float64, so that the figures do not depend on the order and the size of the pieces.

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

    relative: root mean square of the error over that of the original. cosine: of the angle between original and
    restored weights. largest: the largest absolute error. values: the number of weights.
    """

    values: int
    relative: float
    cosine: float
    largest: float


@dataclass
class ErrorSum:
    """Accumulates pieces of original and restored weights; `result` is the error of all of them."""

    values: int = 0
    squared_error: float = 0.0
    original: float = 0.0
    restored: float = 0.0
    dot_product: float = 0.0
    largest: float = 0.0

    def add(self, original: Float[Tensor, "*shape"], restored: Float[Tensor, "*shape"]) -> None:
        """Add a piece. Shapes must be equal; both are read in float32."""
        for x, y in zip(_pieces(original), _pieces(restored), strict=True):
            off = x - y
            self.values += x.numel()
            self.squared_error += float(torch.dot(off, off))
            self.original += float(torch.dot(x, x))
            self.restored += float(torch.dot(y, y))
            self.dot_product += float(torch.dot(x, y))
            self.largest = max(self.largest, float(off.abs_().max()))

    def join(self, other: ErrorSum) -> None:
        """Add everything that another sum holds."""
        self.largest = max(self.largest, other.largest)
        for name in ("values", "squared_error", "original", "restored", "dot_product"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def result(self) -> WeightError:
        """The error of everything added so far; weights that are all zero and stay zero have none."""
        relative = (
            math.sqrt(self.squared_error / self.original)
            if self.original
            else (math.inf if self.squared_error else 0.0)
        )
        norm = math.sqrt(self.original * self.restored)
        cosine = self.dot_product / norm if norm else (0.0 if self.squared_error else 1.0)
        return WeightError(values=self.values, relative=relative, cosine=min(1.0, cosine), largest=self.largest)


def _pieces(tensor: Tensor) -> list[Tensor]:
    # Small enough for an accurate sum of squares in float32, and for the cache of a core.
    return [piece.float() for piece in tensor.detach().flatten().split(1 << 18)]
