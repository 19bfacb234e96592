"""Sudoku: parse, check, solve and make puzzles, and keep the held-out ones apart from those trained on. No torch."""

from blockpress.sudoku.puzzles import (
    Puzzle,
    agrees,
    count_solutions,
    dig,
    generate,
    held_out,
    is_solved,
    layout,
    parse,
    pool,
    puzzle_at,
    random_solution,
    solve,
)
from blockpress.sudoku.symmetry import augment, fingerprint, fingerprints

__all__ = [
    "Puzzle",
    "agrees",
    "augment",
    "count_solutions",
    "dig",
    "fingerprint",
    "fingerprints",
    "generate",
    "held_out",
    "is_solved",
    "layout",
    "parse",
    "pool",
    "puzzle_at",
    "random_solution",
    "solve",
]
