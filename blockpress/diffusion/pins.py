"""What must be written where: places of a canvas that hold a given token from the first noise to the last step.

    pins     place   0    1    2    3         7 pinned at place 1
    noise            4    7    9    2         the canvas holds it before the first step
    argmax           5    7    5    1         whatever the network would rather have there
    entropy        0.3  0.0  1.1  0.2         a pin is sure: it leaves nothing open, and fills no bound

A pin is what a belief in one token alone would be: its argmax and its sample are the token, its entropy is 0, and its
signal is the token's embedding. It counts as a sure place does in the mean entropy by which a canvas settles.

Invariant: a row's pins are its own; a row without any is read to the last bit as it was.
Run it:  python -m pytest tests/diffusion/test_pins.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blockpress.diffusion.output import DenoiserOutput
from blockpress.ops.transfer import to_device
from blockpress.shapes import Canvas, Signal

OPEN = -1
"""Stands in `Pins.tokens` where nothing is pinned."""


@dataclass(frozen=True)
class Pins:
    """Row b must hold `tokens[b, i]` at place i where that is not `OPEN`; `signal` is what a pin's signal is.

    tokens: [batch, canvas]. signal: [batch, canvas, hidden], of no meaning where nothing is pinned.
    """

    tokens: Canvas
    signal: Signal

    @classmethod
    def of(
        cls,
        pinned: Sequence[Mapping[int, int]],
        length: int,
        embed: Callable[[Canvas], Signal],
        device: torch.device | str = "cpu",
    ) -> Pins | None:
        """From one mapping a row, place of a canvas of `length` to the token that it must hold.

        Args:
            embed: the signal of tokens, as an expected embedding would be if they were certain: `Network.embed`.

        Returns:
            None where no row pins anything.
        """
        if not any(pinned):
            return None
        tokens = to_device(torch.tensor([[row.get(place, OPEN) for place in range(length)] for row in pinned]), device)
        return cls(tokens, embed(tokens.clamp(min=0)))

    def hold(self, rows: Int[Tensor, " rows"], canvas: Canvas) -> Canvas:
        """The canvas of some rows of the batch, with their pins in it.

        >>> pins = Pins.of([{}, {1: 7}], 3, lambda tokens: torch.zeros(*tokens.shape, 2))
        >>> pins.hold(torch.tensor([1]), torch.tensor([[4, 5, 6]])).tolist()
        [[4, 7, 6]]
        """
        return torch.where(self.positions(rows), self.tokens[rows], canvas)

    def __call__(self, rows: Int[Tensor, " rows"], reading: DenoiserOutput) -> DenoiserOutput:
        """The reading of some rows of the batch, sure of their pins."""
        pinned = self.positions(rows)
        return DenoiserOutput(
            argmax=self.hold(rows, reading.argmax),
            sample=self.hold(rows, reading.sample),
            entropy=reading.entropy.masked_fill(pinned, 0.0),
            signal=torch.where(pinned[..., None], self.signal[rows], reading.signal),
        )

    def positions(self, rows: Int[Tensor, " rows"]) -> Bool[Tensor, "rows canvas"]:
        """Which places of some rows of the batch are pinned."""
        return self.tokens[rows] != OPEN
