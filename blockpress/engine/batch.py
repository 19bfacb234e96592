"""What one forward runs: the rows of all requests in one flat batch.

    rows    0 1 2 3 4 | 5 | 6 7 8 9 ...  | ...
            silent     heard  canvases             silent: wanted for their keys and values alone
            causal pass       denoising

A request may take part twice: what it commits is read in the same forward as the first step of its next canvas.

Invariant: every row is in one part, and parts of one kind stand side by side.
Run it:  python -m pytest tests/engine/test_batch.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blockpress.engine.request import Request
from blockpress.engine.scheduler import Work
from blockpress.ops.transfer import send


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows start to stop of the flat batch: tokens of one request from position `first` on, or its canvas there."""

    request: Request
    first: int
    start: int
    stop: int
    canvas: bool = False

    @property
    def tokens(self) -> list[int]:
        """What a causal part reads."""
        return self.request.context[self.first : self.end]

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.first + self.stop - self.start

    @property
    def pictures(self) -> dict[int, Tensor]:
        """The pictures that a causal part shows, by the row of the part at which their features begin."""
        shown = self.request.row.images
        return {start - self.first: shown[start] for start in shown if self.first <= start < self.end}


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The parts in the order of their rows: `silent`, then `heard`, then `canvases`."""

    silent: tuple[Part, ...]
    heard: tuple[Part, ...]
    canvases: tuple[Part, ...]

    @classmethod
    def of(cls, works: Sequence[Work], canvas: int) -> Batch:
        """From what the scheduler plans; a canvas has `canvas` tokens.

        Of an autoregressive request whose context ends here the last token is heard, of a checked one every token of
        the canvas that is read.
        """
        sizes: list[tuple[str, Request, int, int]] = []
        for work in works:
            sizes.append(("silent", work.request, work.start, work.stop - work.heard))
            sizes.append(("heard", work.request, work.stop - work.heard, work.stop))
            if work.canvas:
                sizes.append(("canvases", work.request, work.stop, work.stop + canvas))
        parts: dict[str, list[Part]] = {"silent": [], "heard": [], "canvases": []}
        row = 0
        for kind, found in parts.items():
            for name, request, first, stop in sizes:
                if name == kind and stop > first:
                    end = row + stop - first
                    found.append(Part(request=request, first=first, start=row, stop=end, canvas=kind == "canvases"))
                    row = end
        return cls(**{kind: tuple(found) for kind, found in parts.items()})

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.silent, *self.heard, *self.canvases)

    @property
    def skip(self) -> int:
        """How many rows are silent."""
        return self.silent[-1].stop if self.silent else 0

    @property
    def read(self) -> int:
        """How many rows are of the causal pass."""
        return self.heard[-1].stop if self.heard else self.skip

    @property
    def rows(self) -> int:
        return self.canvases[-1].stop if self.canvases else self.read

    def positions(self, device: torch.device) -> Int[Tensor, "1 rows"]:
        """The place of every row in its request."""
        places = [torch.arange(part.first, part.first + part.stop - part.start) for part in self.parts]
        return send(torch.cat(places)[None], device)

    def causal(self, device: torch.device) -> Bool[Tensor, " rows"]:
        """Which rows are of the causal pass: the first `read`."""
        return torch.arange(self.rows, device=device) < self.read
