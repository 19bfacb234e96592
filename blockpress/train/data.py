"""Training data: a source gives the rows of a step as a function of (seed, step) alone, so a run can resume.

`SudokuRows` holds a pool of dug grids and shows each puzzle under a random symmetry of Sudoku, so that no row repeats:
relabelled digits, rows and columns within bands, bands, stacks, transposition.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from blockpress import sudoku
from blockpress.config import ModelConfig
from blockpress.errors import TrainingError
from blockpress.hardware import replacing
from blockpress.train.objective import TrainingBatch

_LOG = logging.getLogger("blockpress")

POOL_VERSION = 1
"""Of the puzzles that a seed gives; a pool of another version is made anew."""


@runtime_checkable
class Source(Protocol):
    """Rows for a step. `progress` runs from 0 to 1 over the run, for curricula."""

    def rows(self, step: int, count: int, progress: float) -> TrainingBatch: ...


@runtime_checkable
class SymmetricSource(Source, Protocol):
    """A source of a task with symmetries that move tokens and change none."""

    def symmetries(self, rows: TrainingBatch, step: int) -> Int[Tensor, "rows length"]:
        """A random symmetry for each row: what stands at [row, i] of the result is where token i comes from.

        A prompt's tokens come from the prompt, a canvas's from that canvas.
        """
        ...


def symmetries_of(source: Source) -> Callable[[TrainingBatch, int], Tensor]:
    """The `symmetries` of a source, asked once, so that one that has none for its rows says so before the run.

    Raises:
        TrainingError: it knows none.
    """
    if not isinstance(source, SymmetricSource):
        raise TrainingError(
            f"objective field symmetries is True, and {type(source).__name__} knows none of its task",
            hint="leave it out, or give the source a method `symmetries`",
        )
    source.symmetries(source.rows(0, 1, 0.0), 0)
    return source.symmetries


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
    LENGTH = 89
    CELLS = (torch.arange(9)[:, None] * 10 + torch.arange(9)).flatten()
    """Where the 81 cells of a grid stand among its tokens."""

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

    def symmetries(self, rows: TrainingBatch, step: int) -> Int[Tensor, "rows length"]:
        """Bands, stacks and the lines within them in another order, half of the rows transposed.

        Raises:
            TrainingError: a grid takes several canvases, and tokens would move from one to another.
        """
        count, length = rows.tokens.shape
        if self.config.canvas_length < self.LENGTH:
            raise TrainingError(
                f"objective field symmetries is True, and canvas_length is {self.config.canvas_length}",
                hint=f"leave symmetries out, or let a canvas hold a grid's {self.LENGTH} tokens",
            )
        cells = torch.from_numpy(sudoku.symmetric_cells(count, np.random.default_rng((self.seed, step, 1))))
        sources = torch.arange(length).repeat(count, 1)
        for first in (1, 1 + self.LENGTH):
            sources[:, first + self.CELLS] = first + self.CELLS[cells]
        return sources

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
        return np.concatenate([lines, ends], axis=2).reshape(len(boards), -1)[:, : self.LENGTH]


def sudoku_pool(seed: int, size: int, processes: int, cache_file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """The pool's solved grids and digging orders, generated once by `processes` and kept in `cache_file`."""
    kept = _kept_pool(cache_file, seed, size)
    if kept is not None:
        return kept
    share = -(-size // (8 * processes))
    starts = range(0, size, share)
    jobs = [(seed, min(share, size - start), start) for start in starts]
    if processes == 1:
        parts = list(map(_pool_part, jobs))
    else:
        with ProcessPoolExecutor(processes) as workers:
            parts = list(workers.map(_pool_part, jobs))
    solutions, orders = (np.concatenate(x) for x in zip(*parts, strict=True))
    try:
        with replacing(cache_file) as made:
            np.savez_compressed(made, version=POOL_VERSION, seed=seed, solutions=solutions, orders=orders)
    except OSError as error:
        _LOG.warning("the puzzles are made anew in the next run, which %s would spare: %s", cache_file, error)
    return solutions, orders


def _kept_pool(file: Path, seed: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]] | None:
    """The first `size` entries of a kept pool; None where there is none, or it is damaged or of another seed."""
    try:
        with file.open("rb") as stream, np.load(stream) as kept:
            solutions, orders = kept["solutions"][:size], kept["orders"][:size]
            same = kept["seed"] == seed and kept.get("version", 1) == POOL_VERSION
    except Exception:  # whatever the readers of archives make of a damaged one
        return None
    good = same and solutions.shape == orders.shape == (size, 81)
    good = good and (solutions.dtype, orders.dtype) == (np.uint8, np.int8)
    return (solutions, orders) if good and _are_pools(solutions, orders) else None


def _are_pools(solutions: NDArray[np.uint8], orders: NDArray[np.int8]) -> bool:
    """Whether all grids are solved, and all orders are different cells with -1 after them."""
    boards = solutions.reshape(-1, 9, 9)
    boxes = boards.reshape(-1, 3, 3, 3, 3).swapaxes(2, 3).reshape(-1, 9, 9)
    units = np.concatenate([boards, boards.swapaxes(1, 2), boxes])
    cells = np.sort(orders, axis=1)
    different = (np.diff(cells, axis=1) > 0) | (cells[:, 1:] == -1)
    ended = (orders[:, :-1] >= 0) | (orders[:, 1:] == -1)
    within = (orders >= -1) & (orders < 81)
    return bool((np.sort(units, axis=2) == np.arange(1, 10)).all() and different.all() and ended.all() and within.all())


def _pool_part(job: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    seed, size, start = job
    return sudoku.puzzle_pool(seed, size, start=start)
