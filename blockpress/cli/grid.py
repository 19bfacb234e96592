"""A sudoku grid as lines of text: the mark of each cell, and the lines of the boxes.

    ·  noise    5  accepted   [5] changed    5  settled (bold)   !5! in conflict    5? not accepted when the steps ended

Invariant: a cell is three characters wide, or one in the compact drawing, whatever its mark; marks differ in their
character, weight or underline, never in colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rich.text import Text

from blockpress.sudoku.puzzles import UNITS

WIDE, COMPACT = 31, 17  # columns of a drawn grid
SIDE = 9


class State(Enum):
    """The state of a position after a step: its mark, with the character in place of `x`, and its style."""

    NOISE = (" · ", "dim")
    ACCEPTED = (" x ", "")
    CHANGED = ("[x]", "bold reverse")
    SETTLED = (" x ", "bold green")
    CONFLICT = ("!x!", "bold red")
    UNSURE = (" x?", "dim")

    @property
    def mark(self) -> str:
        return str(self.value[0])

    @property
    def style(self) -> str:
        return str(self.value[1])


@dataclass(frozen=True)
class Cell:
    """One drawn cell: three characters and their style."""

    text: str
    style: str


def puzzle_cells(puzzle: str) -> list[Cell]:
    """The givens; a blank is drawn empty, so that it is not taken for noise."""
    return [Cell("   " if digit == "0" else f" {digit} ", "underline" if digit != "0" else "") for digit in puzzle]


def answer_cells(puzzle: str, chars: Sequence[str], states: Sequence[State]) -> list[Cell]:
    """The canvas's cells; a given that the canvas repeats is underlined."""
    cells = []
    for given, char, state in zip(puzzle, chars, states, strict=True):
        is_given = state is not State.NOISE and char == given
        cells.append(Cell(state.mark.replace("x", char), f"{state.style} underline" if is_given else state.style))
    return cells


def final_states(puzzle: str, chars: Sequence[str], states: Sequence[State]) -> list[State]:
    """States of a finished canvas: cells that break a rule or change a given, and those that were never accepted."""
    broken = {cell for cell, given in enumerate(puzzle) if given not in ("0", chars[cell])}
    for _, unit in UNITS:
        digits = [chars[cell] for cell in unit]
        broken |= {cell for cell in unit if digits.count(chars[cell]) > 1 or chars[cell] not in "123456789"}
    if not broken:
        return [State.SETTLED] * len(states)
    marked = [State.UNSURE if state is State.NOISE else State.ACCEPTED for state in states]
    return [State.CONFLICT if cell in broken else state for cell, state in enumerate(marked)]


def draw_grid(cells: Sequence[Cell], *, compact: bool = False) -> list[Text]:
    """Thirteen lines of 31 columns with the boxes drawn, or nine lines of 17 columns.

    >>> print(draw_grid(puzzle_cells("53007" + "0" * 76))[1].plain)
    │ 5  3    │    7    │         │
    """
    rows = [cells[start : start + SIDE] for start in range(0, SIDE * SIDE, SIDE)]
    if compact:
        return [Text(" ").join(Text(cell.text[1], style=cell.style) for cell in row) for row in rows]
    lines = [_rule("┌┬┐")]
    for number, row in enumerate(rows):
        if number in (3, 6):
            lines.append(_rule("├┼┤"))
        line = Text("│", style="dim")
        for column, cell in enumerate(row):
            line.append(cell.text, style=cell.style or "not dim")
            if column % 3 == 2:
                line.append("│")
        lines.append(line)
    return [*lines, _rule("└┴┘")]


def _rule(corners: str) -> Text:
    return Text(corners[0] + corners[1].join(["─" * 9] * 3) + corners[2], style="dim")
