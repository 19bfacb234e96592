"""Banned tokens: ids that some positions of a row's canvas must not take.

    id 1 banned at positions 0 and 2        position   0    1    2    3
    of a canvas of 4                        logit    -inf   x  -inf   x

A denoiser applies the mask to its logits before it computes anything from them, so that the argmax, the sample, the
entropy and the self-conditioning embedding all give those tokens probability 0.

Invariant: a mask affects its own row only; the logits of a row without banned ids are unchanged to the last bit.
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
    """Row b must not take `ids[i]` at the positions where `banned[b, :, i]` is true."""

    ids: Int[Tensor, " ids"]
    banned: Bool[Tensor, "batch canvas ids"]

    @classmethod
    def of(
        cls, banned: Sequence[Mapping[int, Container[int]]], length: int, device: torch.device | str = "cpu"
    ) -> TokenMask | None:
        """From one mapping per row: id to the positions of a canvas of `length` where it is banned.

        None if no row bans anything.
        """
        ids = sorted({token for row in banned for token in row})
        if not ids:
            return None
        mask = [[[i in row.get(token, ()) for token in ids] for i in range(length)] for row in banned]
        return cls(to_device(torch.tensor(ids), device), to_device(torch.tensor(mask), device))

    def __call__(self, rows: Int[Tensor, " rows"], logits: Logits) -> Logits:
        """The logits of some rows of the batch, -inf where an id is banned.

        >>> token_mask = TokenMask.of([{}, {1: {0, 2}}], 3)
        >>> token_mask(torch.tensor([1]), torch.zeros(1, 3, 2))[0].tolist()
        [[0.0, -inf], [0.0, 0.0], [0.0, -inf]]
        """
        masked = logits.clone()
        masked[..., self.ids] = logits[..., self.ids].masked_fill(self.banned[rows], float("-inf"))
        return masked
