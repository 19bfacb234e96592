"""When a canvas is finished: its argmax has stopped changing and the network is certain of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.shapes import Entropy


@runtime_checkable
class Settle(Protocol):
    """Which rows are finished. `unchanged`: for how many consecutive steps each row's argmax has stayed the same.

    A row's result must not depend on the other rows.
    """

    def __call__(self, unchanged: Int[Tensor, " batch"], entropy: Entropy, /) -> Bool[Tensor, " batch"]: ...


@dataclass(frozen=True)
class StableAndConfident:
    """Settle when the argmax has not changed for `stability` steps and the mean entropy is below `confidence`.

    `confidence` is in nats per token. Each is one for all rows, or one per row.
    """

    stability: int | Int[Tensor, " batch"]
    confidence: float | Float32[Tensor, " batch"]

    def __call__(self, unchanged: Int[Tensor, " batch"], entropy: Entropy) -> Bool[Tensor, " batch"]:
        """Which rows are finished.

        Args:
            unchanged: for each row, how many consecutive steps have left its argmax canvas unchanged.
        """
        return (unchanged >= self.stability) & (entropy.mean(-1) < self.confidence)
