"""The sudoku room: what is refused, what is solved, and that every puzzle made has one solution.

Uniqueness is checked against `slow_count`, a brute-force counter that shares no code with the package.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress import sudoku
from blockpress.errors import PuzzleError
from tests.conftest import num_examples

SEEDS = st.integers(0, 2**63)
KNOWN = {
    "wikipedia": (
        "530070000600195000098000060800060003400803001700020006060000280000419005000080079",
        "534678912672195348198342567859761423426853791713924856961537284287419635345286179",
    ),
    "inkala 2012": (
        "800000000003600000070090200050007000000045700000100030001000068008500010090000400",
        "812753649943682175675491283154237896369845721287169534521974368438526917796318452",
    ),
    "seventeen givens": (
        "000000010400000000020000000000050407008000300001090000300400200050100000000806000",
        "693784512487512936125963874932651487568247391741398625319475268856129743274836159",
    ),
    "slow for row by row search": (
        "000000000000003085001020000000507000004000100090000000500000073002010000000040009",
        "987654321246173985351928746128537694634892157795461832519286473472319568863745219",
    ),
}
WIKIPEDIA, WIKIPEDIA_SOLUTION = KNOWN["wikipedia"]
NINE = "000000000\n"
NORVIG_IMPOSSIBLE = "000005080000601043000000000010500000000106000300000005530000061000000004000000000"


def slow_count(puzzle: str, limit: int = 2) -> int:
    cells = [int(character) for character in puzzle]

    def options(cell: int) -> set[int]:
        row, column = divmod(cell, 9)
        seen = {
            cells[other]
            for other in range(81)
            if other // 9 == row or other % 9 == column or (other // 27 == row // 3 and other % 9 // 3 == column // 3)
        }
        return set(range(1, 10)) - seen

    def count(left: int) -> int:
        blanks = [cell for cell in range(81) if cells[cell] == 0]
        if not blanks:
            return 1
        found = 0
        choices, cell = min(((options(cell), cell) for cell in blanks), key=lambda pair: len(pair[0]))
        for digit in choices:
            cells[cell] = digit
            found += count(left - found)
            cells[cell] = 0
            if found >= left:
                break
        return found

    return count(limit)


def to_array(*grids: str) -> np.ndarray:
    return np.array([[int(character) for character in grid] for grid in grids], np.uint8)


def to_text(row: np.ndarray) -> str:
    return "".join(map(str, row.tolist()))


# Reading and checking ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=num_examples(50))
@given(SEEDS, st.integers(0, 81))
def test_parse_undoes_layout(seed: int, blanks: int) -> None:
    rng = Random(seed)
    grid = sudoku.puzzle_at(sudoku.random_solution(rng), tuple(rng.sample(range(81), 81)), 81 - blanks)
    assert sudoku.parse_puzzle(sudoku.layout(grid)) == grid
    assert sudoku.parse_puzzle(grid) == grid
    assert sudoku.parse_puzzle(grid.replace("0", ".")) == grid


def test_layout_is_nine_lines_without_a_final_newline() -> None:
    lines = sudoku.layout(WIKIPEDIA).split("\n")
    assert lines[0] == "530070000" and lines[8] == "000080079" and [len(line) for line in lines] == [9] * 9


def test_parse_ignores_white_space_around_rows() -> None:
    spaced = "\n\n".join(f"  {line}\t\r" for line in sudoku.layout(WIKIPEDIA).split("\n"))
    assert sudoku.parse_puzzle(f"\n{spaced}\n\n") == WIKIPEDIA


def blank_but(**givens: str) -> str:
    """A grid with only the cells r<row>c<column> filled."""
    cells = ["0"] * 81
    for name, digit in givens.items():
        cells[9 * int(name[1]) - 9 + int(name[3]) - 1] = digit
    return "".join(cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a puzzle has 81 cells, this one has 0"),
        ("0" * 80, "a puzzle has 81 cells, this one has 80"),
        ("0" * 82, "a puzzle has 81 cells, this one has 82"),
        (NINE * 8, "a puzzle has 81 cells, this one has 72"),
        (f"{NINE * 4}{'0' * 8}\n{NINE * 4}", "a puzzle has 81 cells, this one has 80 (8 in row 5, not 9)"),
        (f"{'0' * 10}\n{'0' * 8}\n{NINE * 7}", "a puzzle has 81 cells, this one has 81 (10 in row 1, not 9)"),
        ("0" * 12 + "x" + "0" * 68, "'x' at row 2, column 4 is not a cell"),
        (NINE * 8 + "00000000-", "'-' at row 9, column 9 is not a cell"),
        ("٣" + "0" * 80, "'٣' at row 1, column 1 is not a cell"),
        ("\x00" + "0" * 80, r"'\x00' at row 1, column 1 is not a cell"),
        (blank_but(r1c1="5", r1c9="5"), "row 1 has the digit 5 twice: at row 1, column 1 and row 1, column 9"),
        (blank_but(r2c3="7", r9c3="7"), "column 3 has the digit 7 twice: at row 2, column 3 and row 9, column 3"),
        (blank_but(r4c4="1", r6c6="1"), "box 5 has the digit 1 twice: at row 4, column 4 and row 6, column 6"),
    ],
)  # fmt: skip
def test_parse_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PuzzleError) as caught:
        sudoku.parse_puzzle(text)
    assert caught.value.message == message
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_is_solved_checks_every_unit() -> None:
    assert sudoku.is_solved(WIKIPEDIA_SOLUTION)
    assert not sudoku.is_solved(WIKIPEDIA)
    assert not sudoku.is_solved(WIKIPEDIA_SOLUTION[:-1])
    rows_only = "123456789" * 9
    rows_and_columns_only = "".join("123456789123456789"[shift : shift + 9] for shift in range(9))
    columns_only = "".join(str(row + 1) * 9 for row in range(9))
    assert not any(map(sudoku.is_solved, (rows_only, columns_only, rows_and_columns_only)))


def test_agrees_compares_givens_only() -> None:
    assert sudoku.agrees(WIKIPEDIA, WIKIPEDIA_SOLUTION)
    assert sudoku.agrees(WIKIPEDIA, WIKIPEDIA)
    assert not sudoku.agrees(WIKIPEDIA, "6" + WIKIPEDIA_SOLUTION[1:])
    assert sudoku.agrees(WIKIPEDIA, WIKIPEDIA_SOLUTION[:2] + "9" + WIKIPEDIA_SOLUTION[3:])
    assert not sudoku.agrees(WIKIPEDIA, WIKIPEDIA_SOLUTION[:-1])


# Solving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_solve_known_puzzles(name: str) -> None:
    puzzle, solution = KNOWN[name]
    assert sudoku.solve(puzzle) == solution
    assert sudoku.count_solutions(puzzle) == 1


@pytest.mark.parametrize(
    "puzzle", [NORVIG_IMPOSSIBLE, blank_but(r1c1="5", r1c9="5"), "12345678" + "0" * 9 + "9" + "0" * 63]
)
def test_unsolvable_puzzles_have_no_solution(puzzle: str) -> None:
    assert sudoku.solve(puzzle) is None
    assert sudoku.count_solutions(puzzle) == 0


def test_count_stops_at_its_limit() -> None:
    assert [sudoku.count_solutions("0" * 81, limit) for limit in (0, 1, 2, 50)] == [0, 1, 2, 50]


def test_counts_all_solutions_of_a_deadly_rectangle() -> None:
    # Rows 4 and 5 of columns 6 and 9 hold 1 3 / 3 1: blanked, they can be swapped and nothing else can.
    cells = [9 * row + column for row in (3, 4) for column in (5, 8)]
    assert [WIKIPEDIA_SOLUTION[cell] for cell in cells] == ["1", "3", "3", "1"]
    puzzle = "".join("0" if cell in cells else digit for cell, digit in enumerate(WIKIPEDIA_SOLUTION))
    assert sudoku.count_solutions(puzzle, limit=10) == 2


@settings(deadline=None, max_examples=num_examples(25))
@given(SEEDS, st.integers(24, 50))
def test_count_is_that_of_brute_force(seed: int, givens: int) -> None:
    rng = Random(seed)
    solution = sudoku.random_solution(rng)
    puzzle = sudoku.puzzle_at(solution, tuple(rng.sample(range(81), 81)), givens)
    assert sudoku.count_solutions(puzzle, limit=4) == slow_count(puzzle, limit=4)
    answer = sudoku.solve(puzzle)
    assert answer is not None and sudoku.is_solved(answer) and sudoku.agrees(puzzle, answer)


@pytest.mark.parametrize("grid", ["0" * 80, "." * 81, "²" * 81, sudoku.layout(WIKIPEDIA)])
def test_solver_refuses_what_is_not_a_grid(grid: str) -> None:
    with pytest.raises(PuzzleError, match="is not a grid of 81 digits"):
        sudoku.solve(grid)
    with pytest.raises(PuzzleError, match="is not a grid of 81 digits"):
        sudoku.count_solutions(grid)


# Making -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=num_examples(50))
@given(SEEDS)
def test_random_solutions_are_solved_and_follow_the_seed(seed: int) -> None:
    solution = sudoku.random_solution(Random(seed))
    assert sudoku.is_solved(solution)
    assert sudoku.random_solution(Random(seed)) == solution
    assert sudoku.random_solution(Random(seed + 1)) != solution


@pytest.mark.parametrize("seed", [0, 1])
def test_every_stage_of_digging_has_one_solution(seed: int) -> None:
    rng = Random(seed)
    solution = sudoku.random_solution(rng)
    order = sudoku.dig(solution, rng)
    assert len(set(order)) == len(order) > 50
    for givens in range(81 - len(order), 81):
        puzzle = sudoku.puzzle_at(solution, order, givens)
        assert 81 - puzzle.count("0") == givens and sudoku.agrees(puzzle, solution)
        assert slow_count(puzzle) == 1


def test_a_dig_blanks_every_cell_that_it_can() -> None:
    rng = Random(5)
    solution = sudoku.random_solution(rng)
    order = sudoku.dig(solution, rng)
    for cell in set(range(81)) - set(order):
        assert slow_count(sudoku.puzzle_at(solution, (*order, cell), 80 - len(order))) == 2


def test_dig_stops_at_the_given_count() -> None:
    solution = sudoku.random_solution(Random(3))
    whole, part = sudoku.dig(solution, Random(4)), sudoku.dig(solution, Random(4), stop=50)
    assert part == whole[:31]


@pytest.mark.parametrize("givens", [29, 82])
def test_puzzle_at_refuses_what_the_dig_does_not_reach(givens: int) -> None:
    with pytest.raises(PuzzleError, match=f"reaches 30 givens, not {givens}"):
        sudoku.puzzle_at(WIKIPEDIA_SOLUTION, tuple(range(51)), givens)


@pytest.mark.parametrize("givens", [23, 30, 40, 80])
def test_generate_reaches_its_givens(givens: int) -> None:
    made = sudoku.generate_puzzle(11, givens)
    assert made == sudoku.generate_puzzle(11, givens) != sudoku.generate_puzzle(12, givens)
    assert made.givens == givens == 81 - made.puzzle.count("0")
    assert slow_count(made.puzzle) == 1 and sudoku.solve(made.puzzle) == made.solution


@pytest.mark.parametrize("givens", [-1, 0, 16, 81])
def test_generate_refuses_counts_out_of_range(givens: int) -> None:
    with pytest.raises(PuzzleError, match=f"givens is {givens}, it must be 17 to 80"):
        sudoku.generate_puzzle(0, givens)


def test_generate_gives_up_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockpress.sudoku.puzzles.DIGS", 3)
    with pytest.raises(PuzzleError, match="no puzzle with 17 givens found in 3 random grids") as caught:
        sudoku.generate_puzzle(0, 17)
    assert "17 to 20" in caught.value.hint


def test_pool_entries_depend_only_on_seed_and_index() -> None:
    solutions, orders = sudoku.puzzle_pool(3, 6)
    later_solutions, later_orders = sudoku.puzzle_pool(3, 2, start=4)
    assert (solutions.dtype, orders.dtype) == (np.uint8, np.int8) and solutions.shape == orders.shape == (6, 81)
    assert np.array_equal(solutions[4:], later_solutions) and np.array_equal(orders[4:], later_orders)
    assert not np.array_equal(sudoku.puzzle_pool(4, 6)[0], solutions)
    for solution, order in zip(solutions, orders, strict=True):
        cells = tuple(order[order >= 0].tolist())
        assert (order[len(cells) :] == -1).all() and sudoku.is_solved(to_text(solution))
        assert sudoku.count_solutions(sudoku.puzzle_at(to_text(solution), cells, 81 - len(cells))) == 1


def test_held_out_spreads_its_givens_and_keeps_apart() -> None:
    puzzles = sudoku.held_out(1, 60, givens=(30, 33))
    assert {made.givens for made in puzzles} == {30, 31, 32, 33}
    assert all(81 - made.puzzle.count("0") == made.givens for made in puzzles)
    assert all(sudoku.solve(made.puzzle) == made.solution for made in puzzles)
    assert all(sudoku.count_solutions(made.puzzle) == 1 for made in puzzles)
    marks = [sudoku.fingerprint(made.solution) for made in puzzles]
    assert len(set(marks)) == 60
    assert not {to_text(row) for row in sudoku.puzzle_pool(1, 60)[0]} & {made.solution for made in puzzles}
    again = sudoku.held_out(1, 10, givens=(30, 33), avoid={marks[0], marks[3]})
    assert again[:8] == [puzzles[place] for place in (1, 2, 4, 5, 6, 7, 8, 9)]


@pytest.mark.parametrize("givens", [(16, 30), (40, 30), (30, 81)])
def test_held_out_refuses_a_wrong_range(givens: tuple[int, int]) -> None:
    with pytest.raises(PuzzleError, match=f"givens is {givens[0]} to {givens[1]}, it must be 17 to 80"):
        sudoku.held_out(0, 1, givens=givens)


def test_seeds_still_mean_the_same_puzzles() -> None:
    """The published held-out set and pool are these: a change here makes old scores incomparable."""
    text = (
        " ".join(made.puzzle + made.solution for made in sudoku.held_out(0, 8)) + sudoku.generate_puzzle(7, 30).puzzle
    )
    solutions, orders = sudoku.puzzle_pool(0, 8)
    parts = (text.encode(), solutions.tobytes(), orders.tobytes())
    assert [hashlib.sha256(part).hexdigest()[:12] for part in parts] == ["beb955fec1d1", "4957498a60a8", "857a61f4b606"]


# Symmetries -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 6))
def test_augment_keeps_validity_givens_and_solvability(seed: int, count: int) -> None:
    made = sudoku.held_out(seed, count)
    solutions = to_array(*(one.solution for one in made))
    puzzles = to_array(*(one.puzzle for one in made))
    new_solutions, new_puzzles = sudoku.augment(solutions, puzzles, np.random.default_rng(seed))
    assert new_solutions.dtype == new_puzzles.dtype == np.uint8 and new_solutions.shape == new_puzzles.shape
    for one, solution, puzzle in zip(made, map(to_text, new_solutions), map(to_text, new_puzzles), strict=True):
        assert 81 - puzzle.count("0") == one.givens
        assert sudoku.agrees(puzzle, solution) and sudoku.is_solved(solution)
        assert sudoku.count_solutions(puzzle) == 1 and sudoku.solve(puzzle) == solution
        assert sudoku.fingerprint(solution) == sudoku.fingerprint(one.solution)
    assert np.array_equal(solutions, to_array(*(one.solution for one in made)))


def test_augment_reaches_every_cell_digit_and_the_transpose() -> None:
    count = 8000
    pair = np.zeros((count, 81), np.uint8)
    pair[:, 0], pair[:, 1] = 1, 2
    board = np.repeat(to_array(WIKIPEDIA_SOLUTION), count, axis=0)
    _, moved = sudoku.augment(board, pair, np.random.default_rng(0))
    filled = np.nonzero(moved)[1].reshape(count, 2)
    same_row = filled[:, 0] // 9 == filled[:, 1] // 9
    same_column = filled[:, 0] % 9 == filled[:, 1] % 9
    assert (same_row ^ same_column).all() and 0.47 < same_row.mean() < 0.53
    assert (np.bincount(filled.ravel(), minlength=81) > 0.7 * 2 * count / 81).all()
    assert (np.bincount(moved[moved > 0], minlength=10)[1:] > 0.8 * 2 * count / 9).all()


def images(grid: np.ndarray) -> dict[str, np.ndarray]:
    """One image of the 9 x 9 `grid` by each kind of symmetry, made without the package."""
    lines = np.arange(9)
    swapped = lines[[0, 2, 1, 3, 4, 5, 6, 7, 8]]
    turned = lines[[6, 7, 8, 0, 1, 2, 3, 4, 5]]
    return {
        "rows in a band": grid[swapped],
        "bands": grid[turned],
        "columns in a stack": grid[:, swapped],
        "stacks": grid[:, turned],
        "transpose": grid.T,
        "labels": grid % 9 + 1,
        "a quarter turn": np.rot90(grid),
    }


@settings(deadline=None, max_examples=num_examples(25))
@given(SEEDS)
def test_fingerprint_ignores_each_symmetry(seed: int) -> None:
    solution = sudoku.random_solution(Random(seed))
    mark = sudoku.fingerprint(solution)
    for kind, image in images(to_array(solution).reshape(9, 9)).items():
        assert sudoku.fingerprint(to_text(image.ravel())) == mark, kind


def test_fingerprints_tell_grids_apart() -> None:
    rng = Random(2)
    grids = [sudoku.random_solution(rng) for _ in range(1100)]
    marks = sudoku.fingerprints(to_array(*grids))
    assert marks.dtype == np.uint64 and len(set(marks.tolist())) == 1100
    assert [sudoku.fingerprint(grid) for grid in grids[1020:1030]] == marks[1020:1030].tolist()
    assert len(sudoku.fingerprints(np.zeros((0, 81), np.uint8))) == 0


def test_sudoku_needs_no_torch() -> None:
    code = "import sys, blockpress.sudoku; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
