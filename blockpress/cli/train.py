"""`blockpress train`: run a recipe, report, stop, resume, and write the checkpoint.

Invariant: a run ends between two steps, however it ends, so that the saved state is one that the run has been in.
A Ctrl-C or a SIGTERM waits for the current step; a second one does not.

Run it:  blockpress train sudoku --minutes 10
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.cli import options
from blockpress.cli.terminal import console, is_terminal, note, waiting
from blockpress.errors import RequestError, TrainingError
from blockpress.hardware import processor

if TYPE_CHECKING:
    import torch

    from blockpress.train import recipes
    from blockpress.train.trainer import Trainer, TrainReport

Recipe = Annotated[str | None, typer.Argument(metavar="RECIPE", help="What to train; --list names them.")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the run keeps its state and log. Default: runs/RECIPE.")
]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps in all. Default: the recipe's.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the state in --out.")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the losses. Default: where there is a C++ compiler."),
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="Threads of each process. Default: torch's choice.")]
Workers = Annotated[int, typer.Option(metavar="N", help="Processes that train together on this machine.")]
Processes = Annotated[
    int | None, typer.Option(metavar="N", help="Processes that prepare the data. Default: one a core.")
]
Every = Annotated[int, typer.Option("--report-every", metavar="N", help="Steps between two reports.")]
Minutes = Annotated[float | None, typer.Option(metavar="M", help="Stop after this long, and save.")]
Export = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Train nothing: write the saved state in --out as a checkpoint.")
]
Init = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Begin with the weights of this model or checkpoint. Default: the recipe's."),
]
Raw = Annotated[bool, typer.Option("--raw", help="With --export: the last weights, where the run keeps their average.")]
ComputeDtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="Of the products: bfloat16 (autocast) or float32. Default: what is faster here."),
]
List = Annotated[bool, typer.Option("--list", help="Name the recipes.")]


def train(
    recipe: Recipe = None,
    out: Out = None,
    steps: Steps = None,
    resume: Resume = False,
    compile: Compile = None,
    threads: Threads = None,
    workers: Workers = 1,
    processes: Processes = None,
    report_every: Every = 20,
    minutes: Minutes = None,
    export: Export = None,
    raw: Raw = False,
    init: Init = None,
    compute_dtype: ComputeDtype = None,
    device: options.Device = "cpu",
    list_recipes: List = False,
) -> None:
    """Train a model from a recipe.

    A terminal gets a progress bar; anything else gets one JSON line a report on standard output, which also goes to
    OUT/log.jsonl. The state is saved every two minutes, at a Ctrl-C and at the end; --resume goes on from it as if
    nothing had happened. At the end the checkpoint is written to OUT/model.

    \b
    Examples:
      blockpress train --list
      blockpress train sudoku --minutes 30
      blockpress train sudoku --resume
      blockpress train sudoku --export ./my-model
      blockpress train sudoku-on-policy --init ./my-model
    """
    if list_recipes:
        return _list()
    chosen = _find(recipe)
    counts = {"--steps": steps, "--threads": threads, "--workers": workers, "--processes": processes}
    for option, value in (counts | {"--report-every": report_every}).items():
        options.positive(value, option)
    if export is not None:
        unused = {"--resume": resume or None, "--steps": steps, "--minutes": minutes, "--init": init}
        options.refuse("--export", unused | {"--compute-dtype": compute_dtype})
    elif raw:
        raise RequestError("--raw is given without --export", hint="--raw says which weights --export writes")
    if resume:
        options.refuse("--resume", {"--init": init})
    saved = resume or export is not None
    if saved:
        chosen = replace(chosen, init=None)  # the state has the weights
    folder = Path("runs") / chosen.name if out is None else out
    _check_state(folder, saved)
    options.check_device(device)
    _set_threads(threads, workers)
    run = _Run(minutes)
    settings = {"device": device, "processes": processes or processor().cores, "steps": steps}
    if export is not None:
        _export(_trainer(chosen, folder, settings), export, raw)
        return
    settings |= {"init": init, "dtype": _product_type(compute_dtype)}
    with _workers(workers):
        trainer = _trainer(chosen, folder, settings | {"compiled": _compiled(compile)})
        if resume:
            trainer.resume()
        run.go(trainer, report_every, f"blockpress train {chosen.name} --out {shlex.quote(str(folder))} --resume")


def _trainer(recipe: recipes.TrainingRecipe, folder: Path, settings: dict[str, Any]) -> Trainer:
    from blockpress.train.trainer import Trainer

    with waiting(f"preparing the data of {recipe.name}"):
        return Trainer(recipe, folder, **settings)


def _list() -> None:
    from blockpress.train.recipes import RECIPES

    print("\n".join(f"{name:12}{make().about}" for name, make in sorted(RECIPES.items())))


def _find(name: str | None) -> recipes.TrainingRecipe:
    from blockpress.train import recipes

    if name is None:
        raise RequestError("no recipe is given", hint=f"recipes: {', '.join(sorted(recipes.RECIPES))}")
    return recipes.recipe(name)


class _Run:
    """One run: its reasons to stop, and its reports."""

    def __init__(self, minutes: float | None) -> None:
        if minutes is not None and not minutes > 0:
            raise RequestError(f"--minutes is {minutes}", hint="--minutes takes a number above 0")
        self.interrupted = False
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._stepped: Callable[[int], None] = lambda step: None

    def go(self, trainer: Trainer, report_every: int, again: str) -> None:
        """Train to the end or to a stop; save, export and print how to resume."""
        from blockpress.train.parallel import leave

        first = os.environ.get("RANK", "0") == "0"
        with self._signals(), _compiler_errors(), self._reporting(trainer) if first else nullcontext(_silent) as report:
            for line in trainer.run(report_every=report_every, stop=self._stop):
                report(line)
        leave()
        if not first:
            return
        if trainer.step < trainer.steps:
            reason = self._reason() or "another process stopped"
            note(f"stopped at step {trainer.step} of {trainer.steps} ({reason}); go on with: {again}")
        if self.interrupted:
            raise typer.Exit(130)
        trainer.export(trainer.out / "model")
        note(f"step {trainer.step}: checkpoint in {trainer.out / 'model'}; blockpress show {trainer.out / 'model'}")

    def _stop(self, step: int) -> bool:
        self._stepped(step)
        return bool(self._reason())

    def _reason(self) -> str:
        if self.interrupted:
            return "interrupted"
        return "its time is over" if self._end is not None and time.monotonic() > self._end else ""

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            note("\nblockpress: stopping after this step (once more: at once, without saving)")

        old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def _reporting(self, trainer: Trainer) -> Iterator[Callable[[TrainReport], None]]:
        if not is_terminal(sys.stdout):
            yield lambda report: print(report.to_json(), flush=True)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn())
        screen = console(sys.stdout)
        with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=screen, expand=True) as progress:
            task = progress.add_task("step", total=trainer.steps, completed=trainer.step, numbers="")
            self._stepped = lambda step: progress.update(task, completed=step)

            def report(report: TrainReport) -> None:
                numbers = f"loss {report.canvas_loss:.3f}  right {report.accuracy:.1%}"
                numbers += f"  {report.draws_per_second:.0f} draws/s"
                progress.update(task, completed=report.step, numbers=numbers)

            yield report


def _export(trainer: Trainer, folder: Path, raw: bool) -> None:
    trainer.resume()
    trainer.export(folder, raw=raw)
    note(f"step {trainer.step}: checkpoint in {folder}")


def _silent(report: TrainReport) -> None:
    """Reports of the other processes: only the first prints."""


def _check_state(folder: Path, wanted: bool) -> None:
    from blockpress.train.trainer import STATE

    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--out {folder} is a file", hint="give a folder; it is made if absent")
    if (folder / STATE).is_file() and not wanted:
        raise TrainingError(
            f"{folder} holds a run already", hint="--resume goes on from it, --export writes its checkpoint, "
            "another --out starts afresh",
        )  # fmt: skip
    if wanted and not (folder / STATE).is_file():
        raise TrainingError(f"there is no run to go on from in {folder}", hint="leave --resume out, or give its --out")


def _set_threads(threads: int | None, workers: int) -> None:
    import torch

    if threads is not None or workers > 1:
        torch.set_num_threads(threads or 1)


def _product_type(name: str | None) -> torch.dtype | None:
    import torch

    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in (None, "auto", *types):
        raise RequestError(f"--compute-dtype is {name!r}", hint=f"training takes auto, {' or '.join(types)}")
    return None if name is None else types.get(name)


def _compiled(wanted: bool | None) -> bool:
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if name)
    return compiler if wanted is None else wanted


@contextmanager
def _compiler_errors() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        first = str(error).splitlines()[0]
        raise TrainingError(f"the losses could not be compiled: {first}", hint="train with --no-compile") from error


@contextmanager
def _workers(count: int) -> Iterator[None]:
    """Start this command `count` - 1 more times, as the other processes of the run, and end them with it."""
    if count == 1 or "WORLD_SIZE" in os.environ:
        yield
        return
    import socket
    import subprocess

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "blockpress", *sys.argv[1:]]
    # A session of their own shields them from Ctrl-C: the first process tells them when to stop.
    others = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, start_new_session=True)
        for rank in range(1, count)
    ]
    os.environ.update(shared | {"RANK": "0"})
    try:
        yield
    finally:
        for other in others:  # the first process has finished, saved and exported: nothing is left to do
            other.kill()
            other.wait()
