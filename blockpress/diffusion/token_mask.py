"""What may not be written where: token ids that some places of a row's canvas must not take.

    id 1 banned at places 0 and 2           place   0    1    2    3
    of a canvas of 4                        logit  -inf  x   -inf  x

A denoiser applies the edits to its logits before it reads anything from them, so the argmax, the sample, the entropy
and the signal all agree that those tokens cannot be.

Invariant: a row's edits are its own; a row without any reads its logits to the last bit as they were.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blockpress.ops.transfer import to_device
from blockpress.shapes import Logits


@dataclass(frozen=True)
class TokenMask:
    """Banned ids: row b must not take `ids[i]` at the places where `banned[b, :, i]` is true."""

    ids: Int[Tensor, " ids"]
    banned: Bool[Tensor, "batch canvas ids"]

    @classmethod
    def of(
        cls, banned: Sequence[Mapping[int, Container[int]]], length: int, device: torch.device | str = "cpu"
    ) -> TokenMask | None:
        """From one mapping a row, id to the places of a canvas of `length` that it must not take.

        None where no row denies anything.
        """
        ids = sorted({token for row in banned for token in row})
        if not ids:
            return None
        places = [[[place in row.get(token, ()) for token in ids] for place in range(length)] for row in banned]
        return cls(to_device(torch.tensor(ids), device), to_device(torch.tensor(places), device))

    def __call__(self, rows: Int[Tensor, " rows"], logits: Logits) -> Logits:
        """The logits of some rows of the batch, -inf where an id is banned.

        >>> edits = TokenMask.of([{}, {1: {0, 2}}], 3)
        >>> edits(torch.tensor([1]), torch.zeros(1, 3, 2))[0].tolist()
        [[0.0, -inf], [0.0, 0.0], [0.0, -inf]]
        """
        edited = logits.clone()
        edited[..., self.ids] = logits[..., self.ids].masked_fill(self.banned[rows], float("-inf"))
        return edited
