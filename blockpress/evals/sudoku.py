"""Evaluate a sudoku model on held-out puzzles, and write its model card (`card.py`) from the figures.

The puzzles come from the project's own generator under a seed of their own; a grid that is a symmetric image of one in
the training pool is left out. Every answer is the first sample of one canvas.
Run it:  python -m blockpress.evals.sudoku sudoku-nano --count 1000 --write
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from blockpress import sudoku
from blockpress.checkpoints import load_network, open_checkpoint, resolve
from blockpress.config import Sampling
from blockpress.decoding import Denoised, Done, Reply, SequenceState
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import generate
from blockpress.errors import BlockpressError
from blockpress.hardware import machine, processor
from blockpress.model import Network
from blockpress.text import Tokenizer
from blockpress.train.card import (
    HELD_OUT_SEED,
    Measured,
    PuzzleOutcome,
    SolvedShare,
    calibration,
    card,
    givens_and_calibration,
    score,
    steps_table,
)
from blockpress.train.data import sudoku_pool
from blockpress.train.initialise import initialise
from blockpress.train.recipes import SUDOKU_POOL, SUDOKU_SEED, recipe

CAPS = (1, 2, 4, 8, 12, 16, 48)
BY_GIVENS = ((24, 26), (27, 29), (30, 32), (33, 35), (36, 38), (39, 41), (42, 44), (45, 47), (48, 50))


def puzzles(count: int, givens: tuple[int, int], pool: Path, processes: int) -> list[sudoku.Puzzle]:
    """Held-out puzzles with one solution each, none of them a symmetric image of a grid in the training pool."""
    return sudoku.held_out(HELD_OUT_SEED, count, givens, avoid=_trained_on(pool, processes))


@cache
def _trained_on(pool: Path, processes: int) -> set[int]:
    """The fingerprints of the pool's grids; cached, since computing them takes seconds."""
    solutions, _ = sudoku_pool(SUDOKU_SEED, SUDOKU_POOL, processes, pool)
    return set(sudoku.fingerprints(solutions).tolist())


def diffusion(
    network: Network, tokenizer: Tokenizer, chosen: list[sudoku.Puzzle], sampling: Sampling, batch: int
) -> list[PuzzleOutcome]:
    """One canvas a puzzle, first sample; all puzzles have the same seed."""
    outcomes: list[PuzzleOutcome] = []
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        rows = _rows(network, tokenizer, some, network.config.canvas_length)
        last: dict[int, Denoised] = {}
        replies: dict[int, Reply] = {}
        for event in generate(network, rows, sampling):
            if isinstance(event, Denoised):
                last[event.row] = event
            elif isinstance(event, Done):
                replies[event.row] = event.reply
        outcomes += [
            PuzzleOutcome(
                solved=tokenizer.decode(replies[index].tokens) == sudoku.layout(puzzle.solution),
                steps=replies[index].usage.steps,
                settled=last[index].settled,
                entropy=float(last[index].entropy.detach().mean()),
            )
            for index, puzzle in enumerate(some)
        ]
    return outcomes


def autoregressive(
    network: Network, tokenizer: Tokenizer, chosen: list[sudoku.Puzzle], batch: int
) -> list[PuzzleOutcome]:
    """The same weights in greedy autoregressive decoding."""
    outcomes: list[PuzzleOutcome] = []
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        events = generate_autoregressive(network, _rows(network, tokenizer, some, canvas_length=1))
        replies = {event.row: event.reply for event in events if isinstance(event, Done)}
        outcomes += [
            PuzzleOutcome(
                solved=tokenizer.decode(replies[index].tokens) == sudoku.layout(puzzle.solution),
                steps=len(replies[index].tokens),
                settled=True,
            )
            for index, puzzle in enumerate(some)
        ]
    return outcomes


def _rows(network: Network, tokenizer: Tokenizer, some: list[sudoku.Puzzle], canvas_length: int) -> list[SequenceState]:
    """The puzzles as prompts, each with room for one answer."""
    prompts, config = [tokenizer.encode(sudoku.layout(puzzle.puzzle)) for puzzle in some], network.config
    return [
        SequenceState(index, prompt, 0, stop_ids=config.eos_ids, canvas_length=canvas_length, room=config.canvas_length)
        for index, prompt in enumerate(prompts)
    ]


UNTRAINED = -1
Job = int | tuple[int, int] | None
"""A row of the tables: diffusion with a cap on steps, or on puzzles with a range of givens; None: autoregressive."""


def evaluate(
    path: Path,
    chosen: list[sudoku.Puzzle],
    caps: Sequence[int],
    batch: int,
    processes: int = 1,
    by_givens: dict[tuple[int, int], list[sudoku.Puzzle]] | None = None,
) -> Measured:
    """All rows: every cap, the autoregressive mode, the untrained network, and puzzles by their givens.

    Rows are distributed over `processes` of one thread each; a row's seconds are those of its own process.
    """
    jobs: dict[Job, list[sudoku.Puzzle]] = dict.fromkeys(caps, chosen)
    jobs |= {None: chosen, UNTRAINED: chosen[: len(chosen) // 4 or 1]} | (by_givens or {})
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as workers:
        # The longest rows first, so that none is left for the end.
        tasks = {job: workers.submit(evaluate_row, path, jobs[job], job, batch) for job in reversed(jobs)}
        for job in jobs:
            print(json.dumps(asdict(tasks[job].result()[0])), flush=True)
        rows = {job: task.result() for job, task in tasks.items()}
    return Measured(
        scores=[rows[job][0] for job in (*caps, None, UNTRAINED)],
        by_givens=[rows[job][0] for job in by_givens or {}],
        calibration=calibration(rows[max(caps)][1]),
    )


def evaluate_row(
    path: Path, chosen: list[sudoku.Puzzle], job: Job, batch: int
) -> tuple[SolvedShare, list[PuzzleOutcome]]:
    """One row of a table, and the outcomes that it summarises."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(path)
    network, tokenizer = load_network(checkpoint), Tokenizer.from_directory(path)
    sampling, started = checkpoint.generation.sampling, time.perf_counter()
    mode = f"diffusion, at most {sampling.steps} steps"
    if job is None:
        mode, outcomes = "autoregressive, greedy", autoregressive(network, tokenizer, chosen, batch)
    elif job == UNTRAINED:
        mode, network = "untrained network, " + mode, Network(checkpoint.config)
        initialise(network, recipe("sudoku").seed)
        outcomes = diffusion(network.eval(), tokenizer, chosen, sampling, batch)
    elif isinstance(job, int):
        mode = f"diffusion, at most {job} steps"
        outcomes = diffusion(network, tokenizer, chosen, sampling.with_(steps=job), batch)
    else:
        mode = f"{job[0]} to {job[1]} givens"
        outcomes = diffusion(network, tokenizer, chosen, sampling, batch)
    return score(mode, outcomes, time.perf_counter() - started), outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a shipped name or a checkpoint's directory")
    parser.add_argument("--count", type=int, default=1000, help="held-out puzzles (default 1000)")
    parser.add_argument("--givens", type=int, nargs=2, default=(30, 40), metavar=("LOW", "HIGH"))
    parser.add_argument("--caps", type=int, nargs="+", default=CAPS, help="most steps a canvas, one run each")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument(
        "--by-givens", type=int, default=0, metavar="N", help="N puzzles more for each three givens, 24 to 50"
    )
    parser.add_argument("--pool", type=Path, default=Path("runs/sudoku/sudoku-pool.npz"), help="made where absent")
    parser.add_argument("--write", action="store_true", help="write README.md and measured.json next to the model")
    options = parser.parse_args(arguments)
    try:
        path, givens, processes = resolve(options.model), tuple(options.givens), processor().cores
        chosen = puzzles(options.count, givens, options.pool, processes)
        classes = BY_GIVENS if options.by_givens else ()
        more = {some: puzzles(options.by_givens, some, options.pool, processes) for some in classes}
        measured = evaluate(path, chosen, options.caps, options.batch, processes, more)
    except BlockpressError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("\n\n".join((steps_table(measured.scores), *givens_and_calibration(measured))))
    if options.write:
        (path / "measured.json").write_text(json.dumps(asdict(measured), indent=1) + "\n")
        (path / "README.md").write_text(card(path, measured, givens, machine()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
