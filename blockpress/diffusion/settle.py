"""When a canvas is finished: its argmax has stopped changing and the network is sure of it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.shapes import Canvas, Entropy


@dataclass(frozen=True)
class StableAndConfident:
    """Settle where the argmax agreed with the last `stability` steps and the mean entropy is below `confidence`.

    `confidence` is in nats a token. Each is one for all rows, or one a row.
    """

    stability: int | Int[Tensor, " batch"]
    confidence: float | Float32[Tensor, " batch"]

    def __call__(self, unchanged: Int[Tensor, " batch"], entropy: Entropy) -> Bool[Tensor, " batch"]:
        """Which rows are finished.

        Args:
            unchanged: for each row, how many steps in a row have left its argmax canvas as it was.
        """
        return (unchanged >= self.stability) & (entropy.mean(-1) < self.confidence)

    def after(
        self, argmax: Canvas, previous: Canvas, unchanged: Int[Tensor, " batch"], entropy: Entropy
    ) -> tuple[Bool[Tensor, "batch canvas"], Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """What a step comes to: the positions whose argmax is not that of the step before (-1: of none), for how many
        steps in a row none was, and which rows are finished."""
        changed = argmax != previous
        unchanged = (unchanged + 1).masked_fill(changed.any(-1), 0)
        return changed, unchanged, self(unchanged, entropy)
