"""`--record FILE.svg`: a run as a picture that moves, each step of the canvas a frame.

    of a sudoku    the puzzle, and beside it the canvas, cell by cell
    of a text      the tokens of the canvas, each where the finished text has it (`page.py`)

Invariant: a recording is a function of the run's events and of nothing that is measured, so the same seed gives the
same bytes. Its last frame is the answer that the command prints.

Run it:  blockpress sudoku --random 1 --record sudoku.svg
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from blockpress.cli.animate import Frame, animation, escaped, save
from blockpress.cli.canvas import one_token_a_cell, states, sudoku_cells
from blockpress.cli.grid import SIDE, State, final_states
from blockpress.cli.page import COLUMNS, DrawnCell, Page, final_pieces
from blockpress.cli.serialize import ended
from blockpress.cli.terminal import without_controls
from blockpress.decoding import Denoised, Done, Event, Reply
from blockpress.sudoku import layout

if TYPE_CHECKING:
    from blockpress.cli.sudoku import Answer
    from blockpress.config import Sampling
    from blockpress.lm import LM

STEP, HOLD, LONGEST = 0.6, 3.0, 30.0  # seconds of a step, of an answer, and of all steps together
ADVANCE, SMALL, LINE, SIZE = 9, 8, 24, 34  # pixels: a character, a small one, a line, a sudoku's cell
MARGIN, TOP, FOOT = 24, 46, 70  # pixels: the foot has the bar, the caption and the legend
WIDTH = COLUMNS * ADVANCE + 2 * MARGIN

LOOKS = {
    State.NOISE: "n",
    State.ACCEPTED: "a",
    State.CHANGED: "c",
    State.SETTLED: "s",
    State.CONFLICT: "x",
    State.UNSURE: "u",
}
WORDS = {State.CONFLICT: "in conflict", State.UNSURE: "never accepted"}
STYLE = """
text{font:15px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#1f2328;white-space:pre}
.m{text-anchor:middle;font-size:18px} .d{font-size:13px} .e{opacity:.4} .h,.g,.s,.c,.x{font-weight:bold}
.d,.u{fill:#6e7781} .a,.f{fill:#0b5fff} .c{fill:#9a6700;text-decoration:underline} .s{fill:#1a7f37} .x{fill:#cf222e}
.n{fill:#dde3e9} rect.c{fill:#fff3c4} rect.x{fill:#ffebe9}
.p{fill:#fff;stroke:#d0d7de} .l{fill:none;stroke:#d0d7de} .b{fill:none;stroke:#6e7781;stroke-width:1.5}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3} .d,.u{fill:#8b949e} .a,.f{fill:#79b0ff} .c{fill:#f0b72f} .s{fill:#3fb950} .x{fill:#ff7b72}
.n{fill:#343b44} rect.c{fill:#3b2e05} rect.x{fill:#4c1a1a}
.p{fill:#0d1117;stroke:#3d444d} .l{stroke:#30363d} .b{stroke:#8b949e}
}
"""


@dataclass(frozen=True)
class Shot:
    """One state of the canvas: what is said of it, the share of it that is kept, and what it looks like."""

    heading: str
    told: str
    kept: float
    marks: list[str]


@dataclass(frozen=True)
class Scene:
    """One answer: what all of its frames show, its shots, its legend (look, sign, word), and its height in pixels."""

    fixed: list[str]
    shots: list[Shot]
    legend: list[tuple[str, str, str]]
    height: int


class CanvasRecording:
    """A file, and the run that is recorded in it. `model`: the name that it was asked by."""

    def __init__(self, file: Path, lm: LM, sampling: Sampling, model: str) -> None:
        self._file, self._lm, self._steps = file, lm, sampling.steps
        self._name = Path(model).name or lm.path.resolve().name

    def write_sudokus(self, answers: Sequence[Answer], seed: int | None) -> None:
        """Write the answers, one after another. `seed`: of the first puzzle, where it was made from one.

        Raises:
            RequestError: the file cannot be written.
        """
        cells, scenes, described = one_token_a_cell(self._lm), [], []
        for number, answer in enumerate(answers):
            label = f"{sum(cell != '0' for cell in answer.puzzle)} givens"
            label += "" if seed is None else f", --seed {seed + number}"
            scenes.append(self._sudoku(answer, label) if cells else self._text(label, answer.events))
            described.append(f"Puzzle ({label}):\n{layout(answer.puzzle)}\n\n{_outcome(answer)}:\n{answer.text}")
        save(self._file, self._document("solves a sudoku", scenes, "\n\n".join(described)))

    def watch(self, prompt: str, events: Iterable[Event]) -> Iterator[Event]:
        """The events of an answer as they come; it is written after the last.

        Raises:
            RequestError: the file cannot be written.
        """
        seen: list[Event] = []
        for event in events:
            seen.append(event)
            yield event
        described = f"Prompt:\n{prompt}\n\nAnswer:\n{''.join(final_pieces(self._lm, _reply(seen)))}"
        save(self._file, self._document("answers a prompt", [self._text(prompt, seen)], described))

    def _document(self, what: str, scenes: Sequence[Scene], described: str) -> str:
        height = max(scene.height for scene in scenes) + FOOT
        paper = f'<rect class="p" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
        step = min(STEP, LONGEST / sum(len(scene.shots) for scene in scenes))
        frames = []
        for scene in scenes:
            *steps, final = scene.shots
            levels = sorted({0.0, *(shot.kept for shot in scene.shots)})
            for shots, seconds in ((steps, step), ([final], HOLD)):
                wide = max(len(shot.heading) for shot in shots), max(len(shot.told) for shot in shots)
                for shot in shots:
                    bar = _bar(height - FOOT, shot.kept, levels)
                    foot = (*bar, self._caption(height - 38, shot, *wide), *_legend(height - 16, scene.legend))
                    frames.append(Frame((paper, *scene.fixed, *shot.marks, *foot), seconds))
        return animation(frames, (WIDTH, height), STYLE, f"{self._name} {what}, step by step", described)

    def _caption(self, y: int, shot: Shot, heading: int, told: int) -> str:
        """What is said of a shot, in columns that are wide enough for those before and after it."""
        second = MARGIN + ADVANCE * heading + 24
        third = second + ADVANCE * told + 24
        room = max(1, (WIDTH - MARGIN - third) // SMALL)
        name = self._name if cell_len(self._name) <= room else set_cell_size(self._name, room - 1) + "…"
        return (
            f'<text x="{MARGIN}" y="{y}"><tspan class="h">{shot.heading}</tspan><tspan x="{second}">{shot.told}</tspan>'
            f'<tspan class="d" x="{third}">{escaped(name)}</tspan></text>'
        )

    def _shot(self, step: int, kept: int, word: str, marks: list[str], before: str = "") -> Shot:
        length = self._lm.config.canvas_length
        heading = f"{before}step {step}" if before else f"step {step} of at most {self._steps}"
        return Shot(heading, f"{kept} of {length} tokens {word}", kept / length, marks)

    def _noise(self, marks: list[str], before: str = "") -> Shot:
        """A canvas before its first step."""
        return self._shot(0, 0, "accepted", marks, before)

    def _step(self, event: Denoised, marks: list[str], before: str = "") -> Shot:
        """What a step has made of the canvas. Where it has settled, all of it is kept, whatever was accepted."""
        if event.settled:
            return self._shot(event.step, len(event.argmax), "settled", marks, before)
        return self._shot(event.step, int(event.accepted.sum()), "accepted", marks, before)

    def _sudoku(self, answer: Answer, label: str) -> Scene:
        right = WIDTH - MARGIN - SIDE * SIZE
        seen: set[State] = set()

        def canvas(signs: Sequence[str], found: Sequence[State]) -> list[str]:
            seen.update(found)
            marks = []
            for cell, (given, sign, state) in enumerate(zip(answer.puzzle, signs, found, strict=True)):
                kept = given == sign and state in (State.ACCEPTED, State.SETTLED)
                marks.append(_digit(right, cell, _sign(state, sign), "g" if kept else LOOKS[state]))
            return marks

        shots = [self._noise(canvas("?" * SIDE * SIDE, [State.NOISE] * SIDE * SIDE))]
        for event in answer.events:
            if isinstance(event, Denoised):
                signs, found = sudoku_cells(self._lm, event)
                shots.append(self._step(event, canvas(signs, found)))
        final = final_states(answer.puzzle, signs, found)
        shots.append(replace(shots[-1], heading=_outcome(answer), marks=canvas(signs, final)))
        fixed = [
            f'<text class="d" x="{MARGIN}" y="{TOP - 14}">puzzle: {label}</text>',
            f'<text class="d" x="{right}" y="{TOP - 14}">canvas</text>',
            *(_digit(MARGIN, cell, digit, "g") for cell, digit in enumerate(answer.puzzle) if digit != "0"),
            *_grid(MARGIN),
            *_grid(right),
        ]
        legend = [(LOOKS[each], _sign(each, "5"), WORDS.get(each, each.name.lower())) for each in LOOKS if each in seen]
        return Scene(fixed, shots, [*legend, ("g", "5", "given")], TOP + SIDE * SIZE + 14)

    def _text(self, prompt: str, events: Sequence[Event]) -> Scene:
        reply = _reply(events)
        page = Page(self._lm, reply, events)
        shots: list[Shot] = []
        pages: list[list[DrawnCell]] = []
        for event in events:
            if isinstance(event, Denoised):
                before = f"canvas {event.canvas + 1}, " if page.canvases > 1 else ""
                if event.step == 1 and not (event.verifications or event.repairs):
                    pages.append(page.canvas(event, [State.NOISE] * len(event.argmax)))
                    shots.append(self._noise(_drawn(pages[-1]), before))
                pages.append(page.canvas(event, states(event)))
                shots.append(self._step(event, _drawn(pages[-1]), before))
        pages.append(page.finished())
        heading, took = ended(reply).split(": ")
        took = ", ".join(took.split(", ")[:2])  # canvases and steps
        shots.append(replace(shots[-1], heading=heading, told=took, marks=_drawn(pages[-1])))
        rows = max((cell.row for cells in pages for cell in cells), default=0)
        seen = {cell.state for cells in pages for cell in cells}
        legend = [(LOOKS[each], _sign(each, "abc"), each.name.lower()) for each in LOOKS if each in seen]
        first, *more = without_controls(prompt).split("\n")
        label = set_cell_size(first, COLUMNS) + "…" if cell_len(first) > COLUMNS else first + " …" * bool(more)
        fixed = [f'<text class="d" x="{MARGIN}" y="{TOP - 14}">prompt: {escaped(label)}</text>']
        return Scene(fixed, shots, [*legend, ("t", "abc", "answer")], TOP + 18 + rows * LINE + 22)


def _bar(y: int, kept: float, levels: Sequence[float]) -> Iterator[str]:
    """How much of the canvas is kept, in pieces that stay as it grows: one that is drawn anew would flicker."""
    yield f'<rect class="n" x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="3"/>'
    for left, right in pairwise(MARGIN + round((WIDTH - 2 * MARGIN) * level) for level in levels if level <= kept):
        yield f'<rect class="f" x="{left}" y="{y}" width="{right - left}" height="3"/>'


def _legend(y: int, parts: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    x = MARGIN
    for look, sign, word in parts:
        yield f'<text class="{look}" x="{x}" y="{y}">{sign}</text>' if sign else _noise(x, y, 3)
        x += ADVANCE * (len(sign) or 3) + 6
        yield f'<text class="d" x="{x}" y="{y}">{word}</text>'
        x += SMALL * len(word) + 22


def _outcome(answer: Answer) -> str:
    return f"{'solved' if answer.solved else 'NOT solved'} in {answer.steps} step{'' if answer.steps == 1 else 's'}"


def _sign(state: State, sign: str) -> str:
    return "" if state is State.NOISE else state.mark.strip(" []!").replace("x", sign)


def _digit(left: int, cell: int, sign: str, look: str) -> str:
    """A cell: its sign, for noise a block, and a coloured ground for what stands out."""
    x, y = left + cell % SIDE * SIZE, TOP + cell // SIDE * SIZE
    edge = {"n": 8, "c": 2, "x": 2}.get(look)
    size = SIZE - 2 * (edge or 0)
    block = (
        f'<rect class="{look}" x="{x + edge}" y="{y + edge}" width="{size}" height="{size}" rx="3"/>' if edge else ""
    )
    return block + (f'<text class="{look} m" x="{x + SIZE // 2}" y="{y + 23}">{sign}</text>' if sign else "")


def _grid(left: int) -> Iterator[str]:
    """The lines between cells, and those around boxes."""
    for look, numbers in (("l", (1, 2, 4, 5, 7, 8)), ("b", (0, 3, 6, 9))):
        down = "".join(f"M{left + number * SIZE} {TOP}v{SIDE * SIZE}" for number in numbers)
        across = "".join(f"M{left} {TOP + number * SIZE}h{SIDE * SIZE}" for number in numbers)
        yield f'<path class="{look}" d="{down}{across}"/>'


def _drawn(cells: Sequence[DrawnCell]) -> list[str]:
    marks = []
    for column, row, width, text, state in cells:
        x, y = MARGIN + column * ADVANCE, TOP + 18 + row * LINE
        if state is State.NOISE and width:
            marks.append(_noise(x, y, width))
        elif word := text.lstrip(" "):  # so that no space is underlined
            x += ADVANCE * (len(text) - len(word))
            look = ("t" if state is None else LOOKS[state]) + ("" if word.strip("↵") else " e")
            length = cell_len(word) * ADVANCE  # whichever monospaced font there is
            marks.append(f'<text class="{look}" x="{x}" y="{y}" textLength="{length}">{escaped(word)}</text>')
    return marks


def _noise(x: int, y: int, width: int) -> str:
    return f'<rect class="n" x="{x}" y="{y - 11}" width="{width * ADVANCE - 2}" height="14" rx="3"/>'


def _reply(events: Sequence[Event]) -> Reply:
    (reply,) = [event.reply for event in events if isinstance(event, Done)]
    return reply
