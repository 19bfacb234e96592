"""Sudoku: parse, check, solve and generate puzzles, and keep held-out ones apart from those for training.

Why: small models are trained and measured on puzzles with one solution, so whether a canvas is right is not debatable.
A grid is a `str` of 81 characters '0'..'9', row by row, '0' a blank; cell `i` is row `i // 9`, column `i % 9`.
Invariant: every puzzle generated here has exactly one solution, and is a pure function of its integer seed.
Run it:  python -c "from blockpress import sudoku; print(sudoku.layout(sudoku.generate_puzzle(7, 30).puzzle))"

The solver keeps all candidates in one 729-bit integer, bit `81 * (digit - 1) + cell`. A unit's nine candidates are at
fixed distances from its first one, its anchor, so that a few shifts count "at least one" and "at least two" of them in
all units at once, three by three (the nine digits of a cell, a "square", are a unit too):

    distances   row 0 1 2 | 3 6      column 0 9 18 | 27 54      box 0 1 2 | 9 18      square 0 81 162 | 243 486
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import combinations
from random import Random

import numpy as np
from numpy.typing import NDArray

from blockpress.errors import PuzzleError
from blockpress.sudoku.symmetry import CELLS, Bytes, digits, fingerprint

FEWEST_GIVENS, MOST_GIVENS = 17, 80  # no puzzle of 16 has one solution (McGuire, Tugemann, Civario, 2012)
DIGS = 1000  # grids that `generate_puzzle` tries before it gives up, about three seconds

ROW_CELLS = [[9 * r + c for c in range(9)] for r in range(9)]
COLUMN_CELLS = [[9 * r + c for r in range(9)] for c in range(9)]
BOX_CELLS = [[27 * (b // 3) + 3 * (b % 3) + 9 * (k // 3) + k % 3 for k in range(9)] for b in range(9)]
KINDS = (("row", ROW_CELLS), ("column", COLUMN_CELLS), ("box", BOX_CELLS))
UNITS = [(f"{kind} {number}", cells) for kind, group in KINDS for number, cells in enumerate(group, 1)]

FULL = (1 << 729) - 1
SQUARE = (1 << CELLS) - 1
SHIFTS = ((81, 162, 243, 486), (1, 2, 3, 6), (9, 18, 27, 54), (1, 2, 9, 18))
ANCHORS = [SQUARE] + [sum(1 << 81 * d + cells[0] for d in range(9) for cells in group) for _, group in KINDS]
SPREADS = [sum(1 << i + j for i in (0, a, b) for j in (0, c, d)) for a, b, c, d in SHIFTS]
CONSTRAINTS = [(anchors, spread, *shifts) for anchors, spread, shifts in zip(ANCHORS, SPREADS, SHIFTS, strict=True)]


def _keep(digit: int, cell: int) -> int:
    """The candidates that remain possible once `digit` (0..8) is in `cell`."""
    peers = {peer for _, cells in UNITS if cell in cells for peer in cells}
    gone = sum(1 << 81 * digit + peer for peer in peers) | SPREADS[0] << cell
    return FULL & ~gone | 1 << 81 * digit + cell


KEEP = [_keep(digit, cell) for digit in range(9) for cell in range(CELLS)]


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """A puzzle with exactly one solution; `givens` counts its filled cells."""

    puzzle: str
    solution: str
    givens: int


def parse_puzzle(text: str) -> str:
    """The grid in `text`: 81 cells on one line or nine lines of nine, '.' or '0' a blank, white space ignored.

    Raises PuzzleError: an invalid character, a wrong number of cells, or givens that contradict each other.
    """
    lines = [line for line in ("".join(line.split()) for line in text.splitlines()) if line]
    nine = len(lines) == 9
    if len(lines) == 1:
        lines = [lines[0][start : start + 9] for start in range(0, len(lines[0]), 9)]
    for row, line in enumerate(lines, 1):
        for column, character in enumerate(line, 1):
            if character not in "0123456789.":
                raise PuzzleError(
                    f"{character!r} at row {row}, column {column} is not a cell",
                    hint="write a digit 1 to 9, and '.' or 0 for a blank",
                )
    grid = "".join(lines).replace(".", "0")
    uneven = [f" ({len(line)} in row {row}, not 9)" for row, line in enumerate(lines, 1) if len(line) != 9]
    where = uneven[0] if uneven and nine else ""
    if len(grid) != CELLS or where:
        raise PuzzleError(
            f"a puzzle has 81 cells, this one has {len(grid)}{where}",
            hint="give 81 characters on one line, or nine lines of nine",
        )
    for name, cells in UNITS:
        for first, second in combinations(cells, 2):
            if grid[first] == grid[second] != "0":
                positions = " and ".join(f"row {cell // 9 + 1}, column {cell % 9 + 1}" for cell in (first, second))
                raise PuzzleError(
                    f"{name} has the digit {grid[first]} twice: at {positions}",
                    hint="a digit stands once in each row, column and box; change or clear one of the two",
                )
    return grid


def layout(grid: str) -> str:
    """Nine lines of nine digits, no newline at the end."""
    return "\n".join(grid[start : start + 9] for start in range(0, CELLS, 9))


def is_solved(grid: str) -> bool:
    """Whether `grid` has 81 cells and each row, column and box holds 1 to 9 once."""
    digits = set("123456789")
    return len(grid) == CELLS and all({grid[cell] for cell in cells} == digits for _, cells in UNITS)


def agrees(puzzle: str, grid: str) -> bool:
    """Whether `grid` keeps every given of `puzzle` (its other cells may hold anything)."""
    return len(puzzle) == len(grid) and all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


def solve(puzzle: str) -> str | None:
    """A solution of `puzzle`, or None where there is none. Raises PuzzleError if `puzzle` is not a grid."""
    placed = next(_search(*_candidates(puzzle)), None)
    return None if placed is None else _grid(placed)


def count_solutions(puzzle: str, limit: int = 2) -> int:
    """The number of solutions of `puzzle`, counted up to `limit`. Raises PuzzleError if it is not a grid."""
    return sum(1 for _ in zip(range(limit), _search(*_candidates(puzzle)), strict=False))


def _candidates(grid: str) -> tuple[int, int]:
    """(candidates, placed): the candidates that the givens of `grid` leave possible, and the givens themselves."""
    if len(grid) != CELLS or not (grid.isascii() and grid.isdigit()):
        raise PuzzleError(f"{grid[:99]!r} is not a grid of 81 digits", hint="read it with sudoku.parse_puzzle")
    candidates, placed = FULL, 0
    for cell, character in enumerate(grid):
        if character != "0":
            bit = 81 * int(character) - 81 + cell
            candidates &= KEEP[bit]
            placed |= 1 << bit
    return candidates, placed


def _grid(placed: int) -> str:
    return "".join(str(1 + bit // 81) for bit in sorted(_bits(placed), key=lambda bit: bit % 81))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _search(candidates: int, placed: int, rng: Random | None = None) -> Iterator[int]:
    """Every solution as a mask of 81 placed candidates, depth first; `rng` shuffles the order of the branches."""
    stack = [(candidates, placed)]
    while stack:
        candidates, placed = _propagate(*stack.pop())
        if not candidates:
            continue
        if candidates == placed:
            yield placed
            continue
        options = list(_bits(_tightest(candidates)))
        if rng is not None:
            rng.shuffle(options)
        stack.extend((candidates & KEEP[bit], placed | 1 << bit) for bit in options)


def _propagate(candidates: int, placed: int) -> tuple[int, int]:
    """Place naked and hidden singles until none is left; (0, 0) once a cell or a unit has no candidate."""
    while True:
        singles = 0
        for anchors, spread, a, b, c, d in CONSTRAINTS:
            near, far = candidates >> a, candidates >> b
            both = candidates | near
            one, two = both | far, candidates & near | both & far
            near, far = one >> c, one >> d
            both = one | near
            if (both | far) & anchors != anchors:
                return 0, 0
            two |= two >> c | two >> d | one & near | both & far
            singles |= (two & anchors ^ anchors) * spread
        new = singles & candidates
        new ^= new & placed
        if not new:
            return candidates, placed
        placed |= new
        while new:
            low = new & -new
            candidates &= KEEP[low.bit_length() - 1]
            new ^= low


def _tightest(candidates: int) -> int:
    """The candidates of a cell or unit with two of them, or else those of the cell with the fewest (at least three)."""
    for anchors, spread, *_ in CONSTRAINTS:
        one = two = three = 0
        for distance in _bits(spread):
            here = candidates >> distance
            three |= two & here
            two |= one & here
            one |= here
        pairs = (two ^ two & three) & anchors
        if pairs:
            return (pairs & -pairs) * spread & candidates
    open_cells = (candidates >> cell & SPREADS[0] for cell in range(CELLS))
    _, cell = min((mask.bit_count(), cell) for cell, mask in enumerate(open_cells) if mask & mask - 1)
    return candidates & SPREADS[0] << cell


def random_solution(rng: Random) -> str:
    """A random full grid: three boxes that share no unit filled at random, the rest by a search in random order."""
    cells = ["0"] * CELLS
    for box in (0, 4, 8):
        for cell, digit in zip(BOX_CELLS[box], rng.sample("123456789", 9), strict=True):
            cells[cell] = digit
    return _grid(next(_search(*_candidates("".join(cells)), rng)))


def dig(solution: str, rng: Random, *, stop: int = 0) -> tuple[int, ...]:
    """Visit all cells in random order and blank each one that keeps the solution unique; the blanked cells in order.

    Blanking the first `81 - g` of them gives a puzzle of `g` givens with one solution (`puzzle_at`). `stop` ends the
    dig once only that many givens are left. A cell may be blanked when no solution has another digit in it.
    """
    bits = [81 * int(digit) - 81 + cell for cell, digit in enumerate(solution)]
    visits = rng.sample(range(CELLS), CELLS)
    later = [(FULL, 0)]
    for cell in reversed(visits[1:]):
        candidates, placed = later[-1]
        later.append((candidates & KEEP[bits[cell]], placed | 1 << bits[cell]))
    kept, kept_placed = FULL, 0
    blanked: list[int] = []
    for cell in visits:
        if CELLS - len(blanked) <= stop:
            break
        candidates, placed = later.pop()
        bit = bits[cell]
        other = candidates & kept & ~(1 << bit)
        if next(_search(other, placed | kept_placed), None) is None:
            blanked.append(cell)
        else:
            kept, kept_placed = kept & KEEP[bit], kept_placed | 1 << bit
    return tuple(blanked)


def puzzle_at(solution: str, order: tuple[int, ...], givens: int) -> str:
    """`solution` with the first `81 - givens` cells of `order` (from `dig`) blank.

    Raises PuzzleError: `order` has too few cells, or `givens` is above 81.
    """
    if not CELLS - len(order) <= givens <= CELLS:
        raise PuzzleError(
            f"this dig reaches {CELLS - len(order)} givens, not {givens}",
            hint=f"ask for {CELLS - len(order)} to {CELLS} givens, or dig another order",
        )
    blank = set(order[: CELLS - givens])
    return "".join("0" if cell in blank else digit for cell, digit in enumerate(solution))


def generate_puzzle(seed: int, givens: int) -> Puzzle:
    """A puzzle with one solution and `givens` (17 to 80) filled cells, the same one for the same arguments.

    Digs up to `DIGS` = 1,000 random grids. Most end at 23 to 26 givens: 22 takes tens of digs, 21 hundreds, and 17 to
    20 are hardly ever reached. Raises PuzzleError for a number out of range or not reached.
    """
    _check_range(givens, givens)
    return _make(Random(f"blockpress.sudoku generate {seed} {givens}"), givens)


def _check_range(low: int, high: int) -> None:
    if not FEWEST_GIVENS <= low <= high <= MOST_GIVENS:
        raise PuzzleError(
            f"givens is {low if low == high else f'{low} to {high}'}, it must be {FEWEST_GIVENS} to {MOST_GIVENS}",
            hint="30 to 40 is usual; fewer than 17 never have a single solution",
        )


def _make(rng: Random, givens: int) -> Puzzle:
    for _ in range(DIGS):
        solution = random_solution(rng)
        order = dig(solution, rng, stop=givens)
        if CELLS - len(order) <= givens:
            return Puzzle(puzzle=puzzle_at(solution, order, givens), solution=solution, givens=givens)
    raise PuzzleError(
        f"no puzzle with {givens} givens found in {DIGS} random grids",
        hint="ask for 23 or more; 21 and 22 need another seed at times, and digging hardly ever finds 17 to 20",
    )


def held_out(seed: int, count: int, givens: tuple[int, int] = (30, 40), avoid: Set[int] = frozenset()) -> list[Puzzle]:
    """`count` puzzles for evaluation, givens uniform in the inclusive range, not drawn from `puzzle_pool`'s stream.

    Grids with a fingerprint in `avoid`, or in the list already, are skipped, so no two are images of each other.
    Raises PuzzleError as `generate_puzzle` does.
    """
    _check_range(*givens)
    rng = Random(f"blockpress.sudoku held out {seed}")
    known, puzzles = set(avoid), list[Puzzle]()
    while len(puzzles) < count:
        puzzle = _make(rng, rng.randint(*givens))
        mark = fingerprint(puzzle.solution)
        if mark not in known:
            known.add(mark)
            puzzles.append(puzzle)
    return puzzles


def puzzle_pool(seed: int, size: int, *, start: int = 0) -> tuple[Bytes, NDArray[np.int8]]:
    """Entries `start` to `start + size - 1` of the training pool of `seed`: solutions and dig orders.

    Solutions are uint8 [size, 81] of 1 to 9; orders are what `dig` gives, int8 [size, 81] padded with -1. Entry i
    depends on (seed, i) alone, so several processes can each make a part.
    """
    solutions, orders = np.zeros((size, CELLS), np.uint8), np.full((size, CELLS), -1, np.int8)
    for index in range(size):
        rng = Random(f"blockpress.sudoku pool {seed} {start + index}")
        solution = random_solution(rng)
        order = dig(solution, rng)
        solutions[index] = digits(solution)
        orders[index, : len(order)] = order
    return solutions, orders
