"""A hole: what is asked for, where it stands, and how its canvas is laid out.

    before   | starts | length ... | seam | after | stop ids         what a canvas starts with; the hole itself is noise

Invariant: nothing here runs a forward.
Run it:  python -m pytest tests/lm/test_infill.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Literal, final

from blockpress.config import Sampling
from blockpress.constrain.automaton import Automaton, Expression
from blockpress.constrain.filling import ANY_TEXT
from blockpress.constrain.tokens import TokenAutomaton
from blockpress.decoding import Denoised

End = Literal["stop", "free", "cut", "open"]


@dataclass(frozen=True, kw_only=True)
class Fill:
    """What is to be filled, checked. pieces: the texts around the holes. base: the ids in front of the text. old: the
    hole's old text, kept but for a share `noise`; None: there is none. most: tokens that each hole may add."""

    pieces: tuple[str, ...]
    base: list[int]
    stop_ids: tuple[int, ...]
    seed: int
    sampling: Sampling
    most: int
    hole: Expression | Automaton = ANY_TEXT
    about: str = "the text around the hole"
    old: str | None = None
    noise: float = 1.0


@final
@dataclass(frozen=True)
class HoleLayout:
    """The tokens of a canvas whose hole has `length` tokens. context: how many of the tokens before the hole are read
    before it. region: how many the hole has with its seams. limit: how many positions belong to the text. draft, noise:
    what the canvas starts with."""

    length: int
    context: int
    before: list[int]
    region: int
    after: list[int]
    end: End
    limit: int
    draft: dict[int, int]
    noise: dict[int, float]


@dataclass
class Hole:
    """A hole in progress. before: tokens between `base` and it. heal, seam: its seams' tokens. state, kept: what is
    settled of it on earlier canvases: the region's state and bytes, and how many tokens these are."""

    before: list[int]
    heal: list[int]
    seam: list[int]
    after: list[int]
    last: bool
    middle: TokenAutomaton
    old: list[int] | None
    state: int = 0
    kept: list[int] = field(default_factory=list)

    @property
    def least(self) -> int:
        """The fewest tokens that the rest of the hole needs, without those of its seams."""
        return max(0, int(self.middle.distance[self.state]) - len(self.starts) - len(self.seam))

    @property
    def starts(self) -> list[int]:
        """The tokens that the region starts with, if it is at its start."""
        return [] if self.kept else self.heal

    def after_canvas(self, settled: list[int], state: int) -> Hole:
        """The hole after a canvas of which these tokens of the region are kept."""
        return replace(self, kept=[*self.kept, *settled], state=state)


def joined(pieces: Sequence[str], holes: Sequence[str]) -> str:
    """The pieces with the holes between them."""
    return "".join(text for pair in zip_longest(pieces, holes[: len(pieces) - 1], fillvalue="") for text in pair)


def how_well(layout: HoleLayout, step: Denoised) -> float:
    """How well a length fits: where the network agrees with what stands around the hole, and how sure it is inside."""
    start, stop = len(layout.before), len(layout.before) + layout.region
    around = [place for place in layout.draft if place >= stop or place < start]
    agrees = [float(int(step.argmax[place]) == layout.draft[place]) for place in around]
    inside = step.entropy[start:stop]
    doubt = float(inside.mean()) if len(inside) else 0.0
    return (sum(agrees) / len(agrees) if agrees else 0.0) - 0.1 * doubt
