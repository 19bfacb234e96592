"""The puzzles of `blockpress sudoku`: from an argument, standard input, a file, or the generator.

Invariant: all input is checked, and errors name its line, before any model is loaded.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blockpress import sudoku
from blockpress.errors import PuzzleError, RequestError
from blockpress.sudoku.puzzles import FEWEST_GIVENS, MOST_GIVENS

GIVENS = 40


@dataclass(frozen=True, kw_only=True)
class Puzzles:
    """`count` grids, generated as they are read. `seed` is the generator's, None where the puzzles were given."""

    grids: Iterable[str]
    count: int
    seed: int | None = None


def read_puzzles(
    puzzle: str | None, file: str | None, random: int | None, givens: int | None, seed: int | None
) -> Puzzles:
    """The puzzles of exactly one of `puzzle`, `file` and `random`.

    Raises:
        RequestError: none or several of them, or an option of `random` without it.
        PuzzleError: a puzzle that is malformed or contradicts itself.
    """
    given = {"PUZZLE": puzzle, "--file": file, "--random": random}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        what = "no puzzle is given" if not chosen else f"{' and '.join(chosen)} are given together"
        raise RequestError(
            what, hint="give one of PUZZLE, --file FILE or --random N; try: blockpress sudoku --random 1"
        )
    if random is not None:
        return _generated(random, GIVENS if givens is None else givens, seed)
    for option, value in (("--givens", givens), ("--seed", seed)):
        if value is not None:
            raise RequestError(
                f"{option} is given with {chosen[0]}",
                hint=f"{option} goes with --random; the seed of the canvas's noise is --noise-seed",
            )
    grids = _from_argument(puzzle) if puzzle is not None else _from_file(str(file))
    return Puzzles(grids=grids, count=len(grids))


def _generated(count: int, givens: int, seed: int | None) -> Puzzles:
    if count < 1:
        raise RequestError(f"--random is {count}", hint="--random takes the number of puzzles, at least 1")
    if not FEWEST_GIVENS <= givens <= MOST_GIVENS:
        raise RequestError(
            f"--givens is {givens}", hint=f"--givens takes {FEWEST_GIVENS} to {MOST_GIVENS}; 30 to 45 is usual"
        )
    first = secrets.randbelow(1_000_000) if seed is None else seed
    grids = (sudoku.generate_puzzle(first + i, givens).puzzle for i in range(count))
    return Puzzles(grids=grids, count=count, seed=first)


def _from_argument(puzzle: str) -> list[str]:
    if puzzle == "-":
        return [sudoku.parse_puzzle(_read_stdin())]
    try:
        return [sudoku.parse_puzzle(puzzle)]
    except PuzzleError as error:
        if len(puzzle) < 256 and "\n" not in puzzle and Path(puzzle).is_file():
            raise PuzzleError(f"{puzzle!r} is a file, not a puzzle", hint=f"read it with --file {puzzle}") from error
        raise


def _from_file(file: str) -> list[str]:
    grids = []
    for number, line in enumerate(_read_file(file).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            grids.append(sudoku.parse_puzzle(line))
        except PuzzleError as error:
            nine = len(line.strip()) == 9
            hint = f"--file takes one puzzle a line; for one of nine lines: blockpress sudoku - < {file}"
            raise PuzzleError(f"{file}, line {number}: {error.message}", hint=hint if nine else error.hint) from error
    if not grids:
        raise PuzzleError(f"there is no puzzle in {file}", hint="write one of 81 characters a line")
    return grids


def _read_file(file: str) -> str:
    if file == "-":
        return _read_stdin()
    path = Path(file)
    if path.is_dir():
        raise RequestError(f"--file {file} is a folder", hint="give a file with one 81-character puzzle a line")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RequestError(f"--file {file} does not exist", hint="check the path, or use --random N") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--file {file} is not a text file", hint="write one 81-character puzzle a line") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"--file {file} cannot be read: {error}", hint="check the path and its rights") from error


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except (UnicodeDecodeError, AttributeError) as error:
        raise RequestError("standard input holds no text", hint="pipe a puzzle in, or give it as PUZZLE") from error
