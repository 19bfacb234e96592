"""Sudoku: parse, check, solve and generate puzzles, and keep held-out ones apart from those for training. No torch."""

from typing import TYPE_CHECKING

from blockpress.errors import renamed
from blockpress.sudoku.puzzles import (
    Puzzle,
    agrees,
    count_solutions,
    dig,
    generate_puzzle,
    held_out,
    is_solved,
    layout,
    parse_puzzle,
    puzzle_at,
    puzzle_pool,
    random_solution,
    solve,
)
from blockpress.sudoku.symmetry import augment, fingerprint, fingerprints, symmetric_cells

__all__ = [
    "Puzzle",
    "agrees",
    "augment",
    "count_solutions",
    "dig",
    "fingerprint",
    "fingerprints",
    "generate_puzzle",
    "held_out",
    "is_solved",
    "layout",
    "parse_puzzle",
    "puzzle_at",
    "puzzle_pool",
    "random_solution",
    "solve",
    "symmetric_cells",
]

_OLDER = {"generate": generate_puzzle, "parse": parse_puzzle, "pool": puzzle_pool}
if TYPE_CHECKING:
    generate, parse, pool = generate_puzzle, parse_puzzle, puzzle_pool
else:
    __getattr__ = renamed(__name__, _OLDER, __all__)  # until version 0.3
