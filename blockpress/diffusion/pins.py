"""Pinned tokens: positions of a canvas that hold a given token from the first noise to the last step.

    position       0    1    2    3         7 pinned at position 1
    noise          4    7    9    2         the canvas holds it before the first step
    argmax         5    7    5    1         whatever the network would prefer there
    entropy      0.3  0.0  1.1  0.2         a pin is certain, so it uses up none of the entropy bound

A pin acts like a probability of 1 for one token: its argmax and its sample are the token, its entropy is 0, and its
self-conditioning embedding is the token's own. It counts in the mean entropy by which a canvas settles.

Invariant: pins affect their own row only; the output of a row without pins is unchanged to the last bit.
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

UNPINNED = -1
"""The value in `Pins.tokens` at positions without a pin."""


@dataclass(frozen=True)
class Pins:
    """Row b must hold `tokens[b, i]` at position i where that is not `UNPINNED`.

    tokens: [batch, canvas]. signal: the pins' self-conditioning embeddings, [batch, canvas, hidden]; meaningless where
    nothing is pinned.
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
        *,
        always: bool = False,
    ) -> Pins | None:
        """From one mapping per row: position in a canvas of `length` to the token that it must hold.

        Args:
            embed: the self-conditioning embedding of tokens that are certain: `Network.embed`.
            always: pins will be added.

        Returns:
            None if no row has pins, and not `always`.
        """
        tokens = given_tokens(pinned, length, device)
        if tokens is None and always:
            tokens = torch.full((len(pinned), length), UNPINNED, device=device)
        return None if tokens is None else cls(tokens, embed(tokens.clamp(min=0)))

    def add(self, row: int, pinned: Mapping[int, int], embed: Callable[[Canvas], Signal]) -> None:
        """Let a row hold these tokens too, from the next step on."""
        places = to_device(torch.tensor([*pinned]), self.tokens.device)
        tokens = to_device(torch.tensor([*pinned.values()]), self.tokens.device)
        self.tokens[row, places] = tokens
        self.signal[row, places] = embed(tokens[None])[0]

    def hold(self, rows: Int[Tensor, " rows"], canvas: Canvas) -> Canvas:
        """The canvas of some rows of the batch, with their pins put in.

        >>> pins = Pins.of([{}, {1: 7}], 3, lambda tokens: torch.zeros(*tokens.shape, 2))
        >>> pins.hold(torch.tensor([1]), torch.tensor([[4, 5, 6]])).tolist()
        [[4, 7, 6]]
        """
        return put_in(self.tokens[rows], canvas)

    def __call__(self, rows: Int[Tensor, " rows"], output: DenoiserOutput) -> DenoiserOutput:
        """The denoiser's output for some rows of the batch, made certain at their pins."""
        pinned, signal = self.positions(rows), output.signal
        return DenoiserOutput(
            argmax=self.hold(rows, output.argmax),
            sample=self.hold(rows, output.sample),
            entropy=output.entropy.masked_fill(pinned, 0.0),
            signal=None if signal is None else torch.where(pinned[..., None], self.signal[rows], signal),
        )

    def positions(self, rows: Int[Tensor, " rows"]) -> Bool[Tensor, "rows canvas"]:
        """Which positions of some rows of the batch are pinned."""
        return self.tokens[rows] != UNPINNED


def given_tokens(
    given: Sequence[Mapping[int, int]], length: int, device: torch.device | str = "cpu"
) -> Int[Tensor, "batch canvas"] | None:
    """One mapping per row, position to token, as a tensor with `UNPINNED` elsewhere; None if all are empty."""
    if not any(given):
        return None
    return to_device(torch.tensor([[row.get(i, UNPINNED) for i in range(length)] for row in given]), device)


def put_in(tokens: Canvas, canvas: Canvas) -> Canvas:
    """The canvas with `tokens` where these are not `UNPINNED`."""
    return torch.where(tokens != UNPINNED, tokens, canvas)
