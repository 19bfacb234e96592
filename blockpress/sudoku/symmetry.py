"""The symmetries of Sudoku: transform a grid by one, and tell whether a symmetry could relate two grids.

Relabelling digits, permuting bands, rows in a band, stacks, columns in a stack, and transposing turn a puzzle with one
solution into another: 1.2 trillion of them for most grids. Training uses them to augment data; held-out puzzles must
not be images of training ones. Invariant: `fingerprint` is equal for a grid and everything `augment` can make of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
CELLS = 81


def digits(grid: str) -> Bytes:
    """The grid's 81 characters as numbers, uint8 [81]."""
    return np.frombuffer(grid.encode(), np.uint8) - np.uint8(48)


def augment(solutions: Bytes, puzzles: Bytes, rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    """A random symmetry for each row of uint8 [n, 81] `solutions`, and the same one for its puzzle; blank 0 stays 0.

    Digits are relabelled; bands, rows in a band, stacks and columns in a stack are permuted; half are transposed.
    """
    count = len(solutions)
    boards = np.arange(count)[:, None]
    cells = symmetric_cells(count, rng) + CELLS * boards
    labels = np.zeros((count, 10), np.uint8)
    labels[:, 1:] = rng.random((count, 9)).argsort(axis=1) + 1
    solutions, puzzles = (labels.ravel()[boards * 10 + grids.ravel()[cells]] for grids in (solutions, puzzles))
    return solutions, puzzles


def symmetric_cells(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """int64 [count, 81]: random symmetries that move cells, as the cell whose digit each cell takes."""
    rows, columns = _line_orders(count, rng)[:, :, None], _line_orders(count, rng)[:, None, :]
    flip = rng.integers(0, 2, (count, 1, 1), np.int64)
    return (rows * (9 - 8 * flip) + columns * (1 + 8 * flip)).reshape(count, CELLS)


def _line_orders(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """int64 [count, 9]: permutations of nine lines that keep the bands of three together."""
    bands = rng.random((count, 3)).argsort(axis=1)[:, :, None]
    return (3 * bands + rng.random((count, 3, 3)).argsort(axis=2)).reshape(count, 9)


def fingerprint(solution: str) -> int:
    """A 64-bit number that is equal for any two full grids related by a symmetry (see `augment`)."""
    return int(fingerprints(digits(solution)[None])[0])


def fingerprints(solutions: Bytes) -> NDArray[np.uint64]:
    """`fingerprint` of each row of uint8 [n, 81] full grids, as uint64 [n].

    The permutation of digits that takes one row to another keeps its cycle type under every symmetry. Types are
    combined as unordered collections, first for each row with all others, then over the rows; the same for columns;
    then both. Grids with different numbers are never images of each other; those with equal numbers nearly always are.
    """
    prints = np.zeros(len(solutions), np.uint64)
    for start in range(0, len(solutions), 1024):  # a grid takes 17 KB of scratch
        grids = solutions[start : start + 1024].reshape(-1, 9, 9).astype(np.int64) - 1
        sides = [_mix(_cycle_types(lines)).sum(axis=2) for lines in (grids, grids.transpose(0, 2, 1))]
        prints[start : start + 1024] = sum(_mix(_mix(side).sum(axis=1)) for side in sides)
    return prints


def _cycle_types(lines: NDArray[np.int64]) -> NDArray[np.uint64]:
    """uint64 [n, 9, 9] from int64 [n, 9, 9]: of each pair of lines, the fixed points of nine powers, in decimal."""
    steps = np.take_along_axis(lines[:, None], lines.argsort(axis=2)[:, :, None], axis=3)
    now, codes = steps, np.zeros(steps.shape[:3], np.uint64)
    for power in range(9):
        codes += (now == np.arange(9)).sum(axis=3).astype(np.uint64) * np.uint64(10**power)
        now = np.take_along_axis(steps, now, axis=3)
    return codes


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, so that sums of mixed values tell unordered collections apart."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
