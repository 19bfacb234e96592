"""Policies are values: hand the loop another rule for what to keep, and compare.

The loop in `blockpress.diffusion` knows no model and no policy; here a fixed share of the canvas is accepted at every
step in place of the entropy bound.
Run it:  python examples/03_own_acceptance.py
"""

from dataclasses import dataclass

import torch

import blockpress
from blockpress import sudoku
from blockpress.diffusion import EntropyBound, KeyedDraws, Schedule, StableAndConfident, denoise
from blockpress.generate import plain_denoiser, read


@dataclass(frozen=True)
class SurestShare:
    """Accept the surest `share` of the positions, however unsure they are."""

    share: float

    def __call__(self, entropy: torch.Tensor) -> torch.Tensor:
        keep = max(1, round(self.share * entropy.shape[-1]))
        return entropy <= entropy.kthvalue(keep, dim=-1, keepdim=True).values


lm = blockpress.load("sudoku-nano")
puzzle = sudoku.generate(seed=5, givens=45)
sampling, config = lm.generation.sampling, lm.config
schedule = Schedule(steps=sampling.steps, t_min=sampling.t_min, t_max=sampling.t_max)
settle = StableAndConfident(sampling.stability, sampling.confidence)

with torch.inference_mode():
    cache = read(lm.network, [lm.encode(sudoku.layout(puzzle.puzzle))], lm.network.empty_cache(1))
    for accept in (EntropyBound(sampling.entropy_bound), SurestShare(0.5), SurestShare(0.9)):
        draws = KeyedDraws([0], [0], length=config.canvas_length, vocab=config.vocab_size)
        *_, last = denoise(plain_denoiser(lm.network, cache), draws, 1, schedule, accept, settle)
        right = lm.decode(last.argmax[0]) == sudoku.layout(puzzle.solution)
        print(f"{accept}: {last.number} steps, {'solved' if right else 'not solved'}")
