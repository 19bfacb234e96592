"""What one forward runs: the rows of all requests in one flat batch.

    rows    0 1 2 3 4 | 5 | 6 7 8 9 ...  | ...
            kv_only  with_logits  canvases         kv_only: needed only for their keys and values
            causal pass           denoising

A request may take part twice: the tokens it commits are read in the same forward as the first step of its next canvas.

Invariant: every row is in exactly one part, and parts of one kind are adjacent.
Run it:  python -m pytest tests/engine/test_batch.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blockpress.engine.request import Request
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.ops.transfer import to_device


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows [start, stop) of the flat batch: tokens of one request from position `first` on, or its canvas there."""

    request: Request
    first: int
    start: int
    stop: int
    canvas: bool = False

    @property
    def tokens(self) -> list[int]:
        """The tokens that a causal part reads."""
        return self.request.context[self.first : self.end]

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.first + self.stop - self.start

    @property
    def images(self) -> dict[int, Tensor]:
        """The image features in a causal part, by the row of the part at which they begin."""
        images = self.request.images
        return {start - self.first: images[start] for start in images if self.first <= start < self.end}


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The parts in the order of their rows: `kv_only`, then `with_logits`, then `canvases`."""

    kv_only: tuple[Part, ...]
    with_logits: tuple[Part, ...]
    canvases: tuple[Part, ...]

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledRequest], canvas_length: int) -> Batch:
        """From a schedule; a canvas has `canvas_length` tokens.

        An autoregressive request whose context ends here needs logits for its last token, a verified one for every
        token of its draft.
        """
        sizes: list[tuple[str, Request, int, int]] = []
        for item in scheduled:
            sizes.append(("kv_only", item.request, item.start, item.stop - item.num_logit_tokens))
            sizes.append(("with_logits", item.request, item.stop - item.num_logit_tokens, item.stop))
            if item.canvas:
                sizes.append(("canvases", item.request, item.stop, item.stop + canvas_length))
        parts: dict[str, list[Part]] = {"kv_only": [], "with_logits": [], "canvases": []}
        row = 0
        for kind, same_kind in parts.items():
            for name, request, first, stop in sizes:
                if name == kind and stop > first:
                    end = row + stop - first
                    same_kind.append(Part(request=request, first=first, start=row, stop=end, canvas=kind == "canvases"))
                    row = end
        return cls(**{kind: tuple(same_kind) for kind, same_kind in parts.items()})

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.kv_only, *self.with_logits, *self.canvases)

    @property
    def num_kv_only(self) -> int:
        """How many rows are needed only for their keys and values."""
        return self.kv_only[-1].stop if self.kv_only else 0

    @property
    def num_causal(self) -> int:
        """How many rows belong to the causal pass."""
        return self.with_logits[-1].stop if self.with_logits else self.num_kv_only

    @property
    def num_rows(self) -> int:
        return self.canvases[-1].stop if self.canvases else self.num_causal

    def positions(self, device: torch.device) -> Int[Tensor, "1 rows"]:
        """The position of every row in its request."""
        positions = [torch.arange(part.first, part.first + part.stop - part.start) for part in self.parts]
        return to_device(torch.cat(positions)[None], device)

    def causal(self, device: torch.device) -> Bool[Tensor, " rows"]:
        """Which rows belong to the causal pass: the first `num_causal`."""
        return torch.arange(self.num_rows, device=device) < self.num_causal
