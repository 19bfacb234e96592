"""Policies are values: pass another acceptance rule, and compare.

A rule maps the entropy of every position to whether it keeps its token. It is part of the sampling, so every path
honours it: `generate`, a chat, an engine that serves others at the same time. Here a fixed share of the canvas is
accepted at every step in place of the entropy bound.
Run it:  python examples/03_own_acceptance.py
"""

from dataclasses import dataclass

from torch import Tensor

import blockpress
from blockpress import sudoku


@dataclass(frozen=True)
class SurestShare:
    """Accept the `share` of positions with the lowest entropy, however high it is."""

    share: float

    def __call__(self, entropy: Tensor) -> Tensor:
        keep = max(1, round(self.share * entropy.shape[-1]))
        return entropy <= entropy.kthvalue(keep, dim=-1, keepdim=True).values


lm = blockpress.load("sudoku-nano")
puzzle = sudoku.generate_puzzle(seed=5, givens=30)
for accept in (None, SurestShare(0.5), SurestShare(0.9)):
    sampling = lm.generation.sampling.with_(accept=accept)
    reply = lm.generate(sudoku.layout(puzzle.puzzle), sampling=sampling)
    right = reply.text == sudoku.layout(puzzle.solution)
    print(f"{accept or 'the entropy bound'}: {reply.usage.steps} steps, {'solved' if right else 'not solved'}")
