"""The temperature of each step: a straight line from t_max at the first step towards t_min after the last.

step            1      2    ...   N
remaining n     N     N-1   ...   1
temperature   t_max              t_min + (t_max - t_min) / N
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from blockpress.config import Sampling


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`steps` denoising steps at most, cooling from t_max to t_min; the first `skipped` of them are left out."""

    steps: int
    t_min: float
    t_max: float
    skipped: int = 0

    @classmethod
    def of(cls, sampling: Sampling, skipped: int = 0) -> Schedule:
        return cls(steps=sampling.steps, t_min=sampling.t_min, t_max=sampling.t_max, skipped=skipped)

    @property
    def last(self) -> int:
        """The number of the last step, counted from 1 after those that are skipped."""
        return self.steps - self.skipped

    def temperature(self, step: int) -> Float32[Tensor, ""]:
        """Of step 1 to `last`, in float32 and in the reference's order of operations, so that logits match to the bit.

        >>> schedule = Schedule(steps=4, t_min=0.4, t_max=0.8)
        >>> [round(schedule.temperature(step).item(), 2) for step in (1, 2, 3, 4)]
        [0.8, 0.7, 0.6, 0.5]
        >>> round(Schedule(steps=4, t_min=0.4, t_max=0.8, skipped=2).temperature(1).item(), 2)
        0.6
        """
        remaining = torch.tensor(self.last + 1 - step, dtype=torch.int32).float()
        return self.t_min + (self.t_max - self.t_min) * (remaining / self.steps)
