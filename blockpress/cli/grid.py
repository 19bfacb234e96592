"""A sudoku grid as lines of text: which mark each cell wears, and the lines of the boxes.

    ·  noise    5  accepted   [5] changed    5  settled (bold)   !5! in conflict    5? not accepted when the steps ended

Invariant: a cell is three characters wide, or one in the compact drawing, whatever its mark; marks differ in their
sign, weight or underline, never in colour alone.
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
    """What a step made of a position: its mark, with the sign in place of `x`, and its style."""

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
    """One cell as it is drawn: three characters and their style."""

    text: str
    style: str


def puzzle_cells(puzzle: str) -> list[Cell]:
    """The givens as they stand; a blank is empty, so that nobody takes it for noise."""
    return [Cell("   " if digit == "0" else f" {digit} ", "underline" if digit != "0" else "") for digit in puzzle]


def answer_cells(puzzle: str, signs: Sequence[str], states: Sequence[State]) -> list[Cell]:
    """The canvas's cells; a given that the canvas repeats is underlined."""
    cells = []
    for given, sign, state in zip(puzzle, signs, states, strict=True):
        kept = state is not State.NOISE and sign == given
        cells.append(Cell(state.mark.replace("x", sign), f"{state.style} underline" if kept else state.style))
    return cells


def final_states(puzzle: str, signs: Sequence[str], states: Sequence[State]) -> list[State]:
    """States of a finished canvas: what breaks a rule or changes a given stands out, and what was never sure."""
    broken = {cell for cell, given in enumerate(puzzle) if given not in ("0", signs[cell])}
    for _, unit in UNITS:
        there = [signs[cell] for cell in unit]
        broken |= {cell for cell in unit if there.count(signs[cell]) > 1 or signs[cell] not in "123456789"}
    if not broken:
        return [State.SETTLED] * len(states)
    kept = [State.UNSURE if state is State.NOISE else State.ACCEPTED for state in states]
    return [State.CONFLICT if cell in broken else state for cell, state in enumerate(kept)]


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
        for place, cell in enumerate(row):
            line.append(cell.text, style=cell.style or "not dim")
            if place % 3 == 2:
                line.append("│")
        lines.append(line)
    return [*lines, _rule("└┴┘")]


def _rule(corners: str) -> Text:
    return Text(corners[0] + corners[1].join(["─" * 9] * 3) + corners[2], style="dim")
