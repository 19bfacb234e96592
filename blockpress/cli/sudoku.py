"""`blockpress sudoku`: a puzzle is the prompt, one settled canvas is the answer.

Invariant: the answer is the decoded argmax canvas of one run, the first and only sample: nothing here solves, repairs,
retries, votes or pins. Only answers (and JSON) go to stdout; everything else goes to stderr.

Run it:  blockpress sudoku --random 1
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.cli import options
from blockpress.cli.animate import check_file
from blockpress.cli.terminal import console, is_terminal, note, waiting
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from blockpress.cli.puzzles import Puzzles
    from blockpress.config import Sampling
    from blockpress.decoding import Event
    from blockpress.lm import LM

BATCH = 32
SHOWN = 9  # most puzzles whose canvases are shown one after another; more would take too long to watch
NINE_LINES = re.compile(r"([0-9]{9}\n){8}[0-9]{9}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of one puzzle. `text` is the decoded canvas up to its stop; `seconds` its share of its batch's time.

    entropy: of the last step, the mean over the canvas in nats a token. settled: whether the canvas settled before the
    last step. events: those of its canvas, in order.
    """

    puzzle: str
    text: str
    steps: int
    forwards: int
    tokens_per_forward: float
    seconds: float
    entropy: float
    settled: bool
    events: Sequence[Event] = field(default=(), repr=False)

    @property
    def grid(self) -> str | None:
        """The answer's 81 digits; None if it is not nine lines of nine digits."""
        return self.text.replace("\n", "") if NINE_LINES.fullmatch(self.text) else None

    @property
    def valid(self) -> bool:
        """Nine lines of nine digits 1 to 9, none of them twice in a row, column or box."""
        from blockpress.sudoku import is_solved

        return self.grid is not None and is_solved(self.grid)

    @property
    def solved(self) -> bool:
        """Valid, and every given is kept."""
        from blockpress.sudoku import agrees

        return self.grid is not None and self.valid and agrees(self.puzzle, self.grid)

    @property
    def verdict(self) -> str:
        """The result in words, and how sure the model is of it."""
        steps = f"{self.steps} step{'' if self.steps == 1 else 's'}"
        sure = f"the model is {'sure' if self.settled else 'NOT sure'}: {self.entropy:.4f} nats a token"
        if self.solved:
            return f"solved in {steps}; {sure}"
        if self.grid is None:
            return f"NOT solved: {steps} left no grid of nine lines of nine digits; {sure}"
        wrong = "a given was changed" if self.valid else "the grid contradicts itself"
        return f"NOT solved: after {steps} {wrong}; {sure}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "puzzle": self.puzzle,
            "answer": self.text if self.grid is None else self.grid,
            "valid": self.valid,
            "solved": self.solved,
            "settled": self.settled,
            "entropy": round(self.entropy, 6),
            "steps": self.steps,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 6),
            "givens": sum(cell != "0" for cell in self.puzzle),
            "tokens_per_forward": round(self.tokens_per_forward, 3),
        }


Puzzle = Annotated[
    str | None,
    typer.Argument(
        metavar="PUZZLE", help="81 characters or nine lines of nine, with 0 or . for a blank; - reads standard input."
    ),
]
File = Annotated[
    str | None,
    typer.Option("--file", "-f", metavar="FILE", help="Read one 81-character puzzle a line; # starts a comment."),
]
Random = Annotated[
    int | None, typer.Option("--random", "-n", metavar="N", help="Make N fresh puzzles, each with one solution.")
]
Givens = Annotated[int | None, typer.Option(metavar="G", help="Filled cells of a fresh puzzle, 17 to 80. Default: 40.")]
Seed = Annotated[
    int | None,
    typer.Option(metavar="S", help="Puzzle number i is made from the seed S + i. Default: a random S, printed."),
]
NoiseSeed = Annotated[int, typer.Option(metavar="S", help="Seed of the canvas's noise.")]
PuzzleOnly = Annotated[bool, typer.Option("--puzzle-only", help="Print the puzzles without solving them.")]
Model = Annotated[
    str, typer.Option("--model", "-m", metavar="MODEL", help="A shipped model, or a checkpoint's directory.")
]
Batch = Annotated[
    int | None,
    typer.Option(metavar="N", help="Puzzles that run at once. Default: 32, or 1 where the canvas is shown."),
]


def sudoku(
    puzzle: Puzzle = None,
    file: File = None,
    random: Random = None,
    givens: Givens = None,
    seed: Seed = None,
    puzzle_only: PuzzleOnly = False,
    json: options.Json = False,
    model: Model = options.SHIPPED,
    steps: options.Steps = None,
    noise_seed: NoiseSeed = 0,
    batch: Batch = None,
    dtype: options.Dtype = None,
    compute_dtype: options.ComputeDtype = None,
    device: options.Device = "cpu",
    fast: options.Fast = False,
    record: options.Record = None,
) -> None:
    """Solve sudokus on a canvas of noise.

    A puzzle is the prompt. The answer is what one canvas became, in one run: no solver and no second try. On a
    terminal the canvas is shown while it settles (for up to nine puzzles). Otherwise each answer is nine lines of nine
    digits on standard output, with an empty line between answers, and whether it is solved stands on standard error.

    With --json there is one object a puzzle, then a summary. "seconds" of a puzzle is its share of its batch's time.

    With --record, what the canvas went through is written to an SVG that plays in a browser, several puzzles (up to
    nine) one after another.

    \b
    Examples:
      blockpress sudoku --random 1
      blockpress sudoku --random 100 --givens 36 --seed 7 --json | tail -1
      blockpress sudoku --file puzzles.txt > answers.txt
      blockpress sudoku --random 1 --record sudoku.svg
      blockpress sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
    """
    from blockpress.cli.puzzles import read_puzzles

    options.positive(batch, "--batch")
    asked = read_puzzles(puzzle, file, random, givens, seed)
    recording = _recording(record, asked.count)
    if asked.seed is not None and not json:
        again = "" if givens is None else f" --givens {givens}"
        note(f"seed {asked.seed} (the same again: --random {asked.count}{again} --seed {asked.seed})")
    if puzzle_only:
        unused = {"--steps": steps, "--batch": batch, "--dtype": dtype, "--compute-dtype": compute_dtype}
        options.refuse("--puzzle-only", {**unused, "--record": record})
        _print_puzzles(asked, json)
        return
    with waiting(f"loading {model}"):
        lm, sampling = options.open_model(
            model, {"steps": steps}, dtype=dtype, compute_dtype=compute_dtype, device=device
        )
    if not json and batch is None and asked.count <= SHOWN and is_terminal(sys.stdout):
        answers = _show(lm, asked, sampling, noise_seed, fast)
    else:
        answers = _print_answers(lm, asked, sampling, noise_seed, batch or BATCH, json, model)
    kept = [done for done in answers if recording is not None]
    if recording is not None:
        from blockpress.cli.record import CanvasRecording

        CanvasRecording(recording, lm, sampling, model).write_sudokus(kept, asked.seed)


def _recording(record: str | None, count: int) -> Path | None:
    """Where to record. Raises RequestError: no place for an SVG, or more puzzles than anybody would watch."""
    if record is not None and count > SHOWN:
        raise RequestError(f"--record is given with {count} puzzles", hint=f"it takes up to {SHOWN} of them")
    return check_file(record)


def answer(
    lm: LM,
    grids: list[str],
    sampling: Sampling,
    noise_seed: int = 0,
    watch: Callable[[Event], None] | None = None,
) -> list[Answer]:
    """Answer one batch of puzzles, one canvas each. `watch` is called with every event; its time does not count."""
    from blockpress.decoding import Denoised, Done
    from blockpress.sudoku import layout

    begun, watched, replies, last = time.perf_counter(), 0.0, {}, {}
    prompts = [layout(grid) for grid in grids]
    events: list[list[Event]] = [[] for _ in grids]
    for event in lm.stream(prompts, lm.config.canvas_length, noise_seed, sampling):
        events[event.row].append(event)
        if isinstance(event, Denoised):
            last[event.row] = event
        elif isinstance(event, Done):
            replies[event.row] = event.reply
        if watch is not None:
            since = time.perf_counter()
            watch(event)
            watched += time.perf_counter() - since
    seconds = (time.perf_counter() - begun - watched) / len(grids)
    return [
        Answer(
            puzzle=grid,
            text=replies[row].text or "",
            steps=replies[row].usage.steps,
            forwards=replies[row].usage.forwards,
            tokens_per_forward=replies[row].usage.tokens_per_forward,
            seconds=seconds,
            entropy=float(last[row].entropy.mean()),
            settled=last[row].settled,
            events=events[row],
        )
        for row, grid in enumerate(grids)
    ]


def _show(lm: LM, asked: Puzzles, sampling: Sampling, noise_seed: int, fast: bool) -> Iterator[Answer]:
    from blockpress.cli.canvas import SudokuView, TextView, one_token_a_cell, shown

    screen, solved, cells = console(sys.stdout), 0, one_token_a_cell(lm)
    for number, grid in enumerate(asked.grids):
        title = f"{lm.path.name}   {sum(cell != '0' for cell in grid)} givens"
        if asked.seed is not None:
            title += f"   --seed {asked.seed + number}"
        view = SudokuView(lm, grid, sampling, title) if cells else TextView(lm, sampling)
        with shown(screen, view, fast) as watch:
            done = answer(lm, [grid], sampling, noise_seed, watch)[0]
            view.finish(done.verdict)
        solved += done.solved
        yield done
    if asked.count > 1:
        note(f"{solved} of {asked.count} solved")


def _print_answers(
    lm: LM, asked: Puzzles, sampling: Sampling, noise_seed: int, batch: int, json: bool, model: str
) -> Iterator[Answer]:
    solved, steps, seconds = 0, 0, 0.0
    for number, done in enumerate(_progress(_in_batches(lm, asked, sampling, noise_seed, batch), asked.count), 1):
        solved, steps, seconds = solved + done.solved, steps + done.steps, seconds + done.seconds
        if json:
            options.print_json(done.to_dict())
        else:
            print(("\n" if number > 1 else "") + done.text, flush=True)
            note(done.verdict if asked.count == 1 else f"puzzle {number}: {done.verdict}")
        yield done
    if json:
        options.print_json(
            {
                "summary": True,
                "puzzles": asked.count,
                "solved": solved,
                "solved_share": round(solved / asked.count, 6),
                "mean_steps": round(steps / asked.count, 3),
                "seconds": round(seconds, 6),
                "puzzles_per_second": round(asked.count / seconds, 3),
                "model": model,
                "seed": asked.seed,
                "noise_seed": noise_seed,
                "most_steps": sampling.steps,
                "batch": batch,
            }
        )
    elif asked.count > 1:
        share, mean = f"{solved} of {asked.count} solved ({solved / asked.count:.1%})", steps / asked.count
        note(f"{share}, {mean:.1f} steps on average, {asked.count / seconds:.1f} puzzles a second")


def _in_batches(lm: LM, asked: Puzzles, sampling: Sampling, noise_seed: int, batch: int) -> Iterator[Answer]:
    grids = iter(asked.grids)
    while some := list(islice(grids, batch)):
        yield from answer(lm, some, sampling, noise_seed)


def _progress(answers: Iterable[Answer], count: int) -> Iterator[Answer]:
    """A progress bar on stderr where that is a terminal and stdout is not."""
    if count == 1 or is_terminal(sys.stdout) or not is_terminal(sys.stderr):
        yield from answers
        return
    from rich.progress import Progress

    # By default the bar would redirect to stderr what is printed on stdout.
    with Progress(console=console(sys.stderr), transient=True, redirect_stdout=False) as progress:
        yield from progress.track(answers, total=count, description="puzzles")


def _print_puzzles(asked: Puzzles, json: bool) -> None:
    from blockpress.sudoku import layout

    for number, grid in enumerate(asked.grids):
        if json:
            options.print_json({"puzzle": grid, "givens": sum(cell != "0" for cell in grid)})
        else:
            print(("\n" if number else "") + layout(grid))
