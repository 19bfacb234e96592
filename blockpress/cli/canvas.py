"""The canvas on a terminal while it turns from noise into an answer: a sudoku next to its puzzle, or running text.

Invariant: a frame is never wider or higher than the terminal, so that the next one replaces it without flicker.
`grid.State` defines how the states of a position look; in text, a changed token is underlined as well.

Run it:  blockpress sudoku --random 1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from blockpress import sudoku
from blockpress.cli.grid import COMPACT, SIDE, WIDE, State, answer_cells, draw_grid, final_states, puzzle_cells
from blockpress.cli.meter import Meter
from blockpress.cli.terminal import without_controls
from blockpress.decoding import Denoised, Done, Event
from blockpress.decoding import Text as FinalText

if TYPE_CHECKING:
    from blockpress.config import Sampling
    from blockpress.lm import LM

PAUSE = 0.12  # seconds a frame, so that a run of five steps can be followed
GAP = 3


class View(Protocol):
    """Follows a run through its events and can draw it at any size."""

    meter: Meter

    def see(self, event: Event) -> None: ...

    def draw(self, width: int, height: int) -> Sequence[Text]: ...

    def release(self) -> Sequence[Text]:
        """Final lines that scroll out above the frame, each returned once."""
        ...


@contextmanager
def shown(screen: Console, view: View, fast: bool) -> Iterator[Callable[[Event], None]]:
    """Show `view` until the block ends; yields a function to call with every event."""
    with Live(console=screen, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False) as live:

        def draw() -> None:
            for line in view.release():
                live.console.print(line)
            width, height = screen.size
            live.update(Group(*view.draw(width, height - 1)), refresh=True)

        def watch(event: Event) -> None:
            view.meter.see(event)
            view.see(event)
            if isinstance(event, Denoised):
                draw()
                if not fast:
                    time.sleep(PAUSE)
            view.meter.go_on()

        draw()
        yield watch
        draw()


def states(event: Denoised) -> list[State]:
    """The state of each position after a step. At the first step no position counts as changed."""
    if event.settled:
        return [State.SETTLED] * len(event.argmax)
    return [
        (State.CHANGED if changed and event.step > 1 else State.ACCEPTED) if accepted else State.NOISE
        for accepted, changed in zip(event.accepted.tolist(), event.changed.tolist(), strict=True)
    ]


def one_token_a_cell(lm: LM) -> bool:
    """Whether each digit and each line end of a grid is one token, so that every cell has a position."""
    grid = sudoku.layout("123456789" * 9)
    return lm.tokenizer is not None and len(lm.tokenizer.encode(grid, add_special=False)) == len(grid)


def sudoku_cells(lm: LM, event: Denoised) -> tuple[list[str], list[State]]:
    """The sign and the state of each of the 81 cells after a step; a sign that is no digit is a question mark."""
    assert lm.tokenizer is not None
    places = [cell + cell // SIDE for cell in range(SIDE * SIDE)]
    tokens, marks = event.argmax.tolist(), states(event)
    pieces = [lm.tokenizer.token(tokens[place]) if place < len(tokens) else "?" for place in places]
    signs = [piece if len(piece) == 1 and piece.isdecimal() else "?" for piece in pieces]
    return signs, [marks[place] if place < len(marks) else State.NOISE for place in places]


def text_cells(lm: LM, tokens: Sequence[int], marks: Sequence[State]) -> list[tuple[int, State]]:
    """The tokens of a canvas that are text: those before the first stop id that is not noise."""
    stops = lm.generation.stop_ids
    cells = list(zip(tokens, marks, strict=False))
    return list(takewhile(lambda cell: cell[1] is State.NOISE or cell[0] not in stops, cells))


def piece_of(lm: LM, token: int) -> str:
    """A token as a screen may show it: line ends are line ends, whatever else is not printable is spelled out."""
    if lm.tokenizer is None:
        return f"<{token}>"
    text = lm.tokenizer.decode([token])
    return text if text and not text.strip("\n") else lm.tokenizer.token(token)


class SudokuView:
    """A puzzle and its canvas, cell by cell. For models with `one_token_a_cell`."""

    def __init__(self, lm: LM, puzzle: str, sampling: Sampling, title: str = "") -> None:
        self.meter = Meter(sampling, lm.generation.stop_ids, lm.config.canvas_length)
        self._lm, self._puzzle, self._title = lm, puzzle, title
        self._chars = ["·"] * len(puzzle)
        self._states = [State.NOISE] * len(puzzle)
        self._verdict: str | None = None
        self._compact = False

    def see(self, event: Event) -> None:
        if isinstance(event, Denoised):
            self._chars, self._states = sudoku_cells(self._lm, event)

    def finish(self, verdict: str) -> None:
        """End the run; `verdict` describes its result."""
        self._verdict = verdict
        self._states = final_states(self._puzzle, self._chars, self._states)

    def release(self) -> Sequence[Text]:
        return ()

    def draw(self, width: int, height: int) -> Sequence[Text]:
        below = [*fit(self._legend(), width), *fit(self._numbers(), width)]
        # Once compact it stays so: a grid that changes its shape is hard to follow.
        self._compact = self._compact or width < WIDE or height < SIDE + 4 + len(below)
        grid = self._grid(width, compact=self._compact)
        lines = [*grid, *below]
        if height >= len(lines) + 4:
            lines = [Text(self._title, style="bold"), Text(), *grid, Text(), *below]
        return cropped(lines, width, height)

    def _grid(self, width: int, *, compact: bool) -> list[Text]:
        canvas = draw_grid(answer_cells(self._puzzle, self._chars, self._states), compact=compact)
        wide = COMPACT if compact else WIDE
        if width < 2 * wide + GAP:
            return canvas
        puzzle = draw_grid(puzzle_cells(self._puzzle), compact=compact)
        return [Text.assemble(left, " " * GAP, right) for left, right in zip(puzzle, canvas, strict=True)]

    def _legend(self) -> list[Text]:
        if self._verdict is None:
            return legend((State.NOISE, State.ACCEPTED, State.CHANGED, State.SETTLED), given=True)
        if State.CONFLICT in self._states:
            bad = [state for state in (State.CONFLICT, State.UNSURE) if state in self._states]
            return legend(bad, given=True)
        return []

    def _numbers(self) -> list[Text]:
        if self._verdict is None:
            return [Text(part) for part in self.meter.now()]
        style = "bold red" if State.CONFLICT in self._states else "bold green"
        return [Text(self._verdict, style=style), *(Text(part) for part in self.meter.result())]


class TextView:
    """Running text: final lines scroll out above, and the last unfinished line continues into the canvas."""

    def __init__(self, lm: LM, sampling: Sampling) -> None:
        self.meter = Meter(sampling, lm.generation.stop_ids, lm.config.canvas_length)
        self._lm = lm
        self._tail = ""
        self._released: list[Text] = []
        self._tokens: list[int] = []
        self._states: list[State] = []
        self._verdict: str | None = None

    def see(self, event: Event) -> None:
        if isinstance(event, Denoised):
            self._tokens, self._states = event.argmax.tolist(), states(event)
        elif isinstance(event, FinalText):
            *lines, self._tail = (self._tail + without_controls(event.text)).split("\n")
            self._released += [Text(line) for line in lines]
            self._tokens = []
        elif isinstance(event, Done):
            self._released += [Text(self._tail)] if self._tail else []
            self._tail, self._tokens = "", []

    def finish(self, verdict: str) -> None:
        """End the run; `verdict` describes how it ended."""
        self._verdict = verdict

    def release(self) -> Sequence[Text]:
        lines, self._released = self._released, []
        return lines

    def draw(self, width: int, height: int) -> Sequence[Text]:
        if self._verdict is not None:
            return fit([Text(self._verdict, style="bold"), *(Text(part) for part in self.meter.result())], width)
        below = [
            *fit(legend((State.NOISE, State.ACCEPTED, State.CHANGED, State.SETTLED), text=True), width),
            *fit([Text(part) for part in self.meter.now()], width),
        ]
        room = max(1, height - len(below) - 1)
        return cropped([*wrapped(self._canvas(), width)[-room:], Text(), *below], width, height)

    def _canvas(self) -> Text:
        text = Text(self._tail)
        for token, state in text_cells(self._lm, self._tokens, self._states):
            if state is State.NOISE:
                text.append("·", style=state.style)
            else:
                text.append(piece_of(self._lm, token), style=text_style(state))
        return text


def text_style(state: State) -> str:
    return "reverse underline" if state is State.CHANGED else state.style


def legend(shown_states: Sequence[State], *, given: bool = False, text: bool = False) -> list[Text]:
    """The meaning of the marks, each shown in its own style."""
    words = {State.CONFLICT: "in conflict", State.UNSURE: "never accepted"}
    parts = []
    for state in shown_states:
        mark = state.mark.strip().replace("x", "5")
        sample = "·" if state is State.NOISE else "abc" if text else mark
        style = text_style(state) if text else state.style
        parts.append(Text.assemble((sample, style), " ", words.get(state, state.name.lower())))
    if given:
        parts.append(Text.assemble(("5", "underline"), " given"))
    return parts


def fit(parts: Sequence[Text], width: int) -> list[Text]:
    """Parts next to each other, as many on a line as fit the width."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + GAP + part.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], " " * GAP, part)
        else:
            lines += wrapped(part, width)
    return lines


def wrapped(text: Text, width: int) -> list[Text]:
    """`text` in lines of at most `width` columns, broken between words where possible."""
    return list(text.wrap(Console(width=width), width))


def cropped(lines: Sequence[Text], width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` columns."""
    cropped_lines = []
    for line in lines[:height]:
        line = line.copy()
        line.truncate(width)
        line.no_wrap = True
        cropped_lines.append(line)
    return cropped_lines
