"""Training data: a source gives the rows of a step as a function of (seed, step) alone, so a run can resume.

`SudokuRows` holds a pool of dug grids and shows each puzzle under a random symmetry of Sudoku, so that no row repeats:
relabelled digits, rows and columns within bands, bands, stacks, transposition.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from blockpress import sudoku
from blockpress.config import ModelConfig
from blockpress.train.objective import TrainingBatch


@runtime_checkable
class Source(Protocol):
    """Rows for a step. `progress` runs from 0 to 1 over the run, for curricula."""

    def rows(self, step: int, count: int, progress: float) -> TrainingBatch: ...


@dataclass(frozen=True, kw_only=True)
class Givens:
    """A curriculum: givens are uniform in a range that moves from `first` to `last` in the first `over` of the run."""

    first: tuple[int, int]
    last: tuple[int, int]
    over: float

    def range(self, progress: float) -> tuple[int, int]:
        """The inclusive range of givens at `progress`, from 0 to 1.

        >>> Givens(first=(50, 60), last=(30, 40), over=0.5).range(0.25)
        (40, 50)
        """
        way = min(1.0, progress / self.over) if self.over else 1.0
        return (
            round(self.first[0] + way * (self.last[0] - self.first[0])),
            round(self.first[1] + way * (self.last[1] - self.first[1])),
        )


class SudokuRows:
    """Puzzles and solutions as token rows: `<bos>` nine lines of nine digits, then the same form solved, then `<eos>`.

    Ids are those of the digits tokenizer: line end 4, digit d is 5 + d.
    """

    NEWLINE, ZERO = 4, 5

    def __init__(
        self, config: ModelConfig, solutions: NDArray[np.uint8], orders: NDArray[np.int8], givens: Givens, seed: int
    ) -> None:
        self.config, self.givens, self.seed = config, givens, seed
        self.solutions, self.orders = solutions, orders

    def rows(self, step: int, count: int, progress: float) -> TrainingBatch:
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.integers(len(self.solutions), size=count)
        low, high = self.givens.range(progress)
        givens = rng.integers(low, high + 1, size=count)
        solutions = self.solutions[chosen]
        puzzles = solutions.copy()
        orders = self.orders[chosen]
        for row in range(count):
            dug = orders[row][: 81 - givens[row]]
            puzzles[row, dug[dug >= 0]] = 0
        return self._tokens(*sudoku.augment(solutions, puzzles, rng))

    def _tokens(self, solutions: NDArray[np.uint8], puzzles: NDArray[np.uint8]) -> TrainingBatch:
        count = len(puzzles)
        config = self.config
        parts = [np.full((count, 1), config.bos_id), self._grid(puzzles), self._grid(solutions)]
        fill = -(parts[2].shape[1] + 1) % config.canvas_length + 1
        tokens = torch.from_numpy(np.concatenate([*parts, np.full((count, fill), config.eos_ids[0])], axis=1)).long()
        prompt = 1 + parts[1].shape[1]
        canvases = (tokens.shape[1] - prompt) // config.canvas_length
        return TrainingBatch(tokens, torch.full((count,), prompt), torch.full((count,), canvases))

    def _grid(self, boards: NDArray[np.uint8]) -> NDArray[np.int64]:
        """[rows, 81] digits as [rows, 89] ids: nine lines, line ends between them."""
        lines = boards.reshape(-1, 9, 9).astype(np.int64) + self.ZERO
        ends = np.full((len(boards), 9, 1), self.NEWLINE)
        return np.concatenate([lines, ends], axis=2).reshape(len(boards), 90)[:, :89]


def sudoku_pool(seed: int, size: int, processes: int, cache_file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """The pool's solved grids and digging orders, generated once by `processes` and kept in `cache_file`."""
    if cache_file.is_file():
        with np.load(cache_file) as cached:
            if cached["seed"] == seed and len(cached["solutions"]) >= size:
                return cached["solutions"][:size], cached["orders"][:size]
    share = -(-size // (8 * processes))
    starts = range(0, size, share)
    with ProcessPoolExecutor(processes) as workers:
        parts = list(workers.map(_pool_part, [(seed, min(share, size - s), s) for s in starts]))
    solutions, orders = (np.concatenate(x) for x in zip(*parts, strict=True))
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(cache_file, seed=seed, solutions=solutions, orders=orders)
    return solutions, orders


def _pool_part(job: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    seed, size, start = job
    return sudoku.puzzle_pool(seed, size, start=start)
