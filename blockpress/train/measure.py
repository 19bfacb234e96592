"""Measure a sudoku model on held-out puzzles, and write its model card from what was measured.

The puzzles come from the project's own generator under a seed of its own; a grid that is a symmetric image of one in
the training pool is left out. Every answer is the first sample of one canvas.
Run it:  python -m blockpress.train.measure sudoku-nano --count 1000 --write
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from textwrap import fill

import torch

from blockpress import sudoku
from blockpress.autoregress import autoregress
from blockpress.config import Sampling
from blockpress.errors import BlockpressError
from blockpress.generate import generate
from blockpress.hardware import machine
from blockpress.model import Network
from blockpress.reply import Done, Row
from blockpress.text import Tokenizer
from blockpress.train.data import sudoku_pool
from blockpress.train.initialise import initialise
from blockpress.train.recipes import SUDOKU_GIVENS, SUDOKU_POOL, SUDOKU_SEED, recipe
from blockpress.weights import load_config, load_generation, load_network, resolve

CAPS = (1, 2, 4, 8, 12, 16, 48)
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Score:
    """One way of decoding on some puzzles: the share solved exactly, its standard error, steps and seconds."""

    mode: str
    puzzles: int
    solved: float
    error: float
    mean_steps: float
    steps_solved: float
    settled: float
    seconds: float


def score(mode: str, solved: Sequence[bool], steps: Sequence[int], cap: int, seconds: float) -> Score:
    """Summarise: `settled` is the share of canvases that stopped before the cap."""
    count = len(solved)
    share = sum(solved) / count
    right = [n for n, ok in zip(steps, solved, strict=True) if ok]
    return Score(
        mode=mode,
        puzzles=count,
        solved=share,
        error=math.sqrt(share * (1 - share) / count),
        mean_steps=sum(steps) / count,
        steps_solved=sum(right) / len(right) if right else 0.0,
        settled=sum(n < cap for n in steps) / count,
        seconds=seconds,
    )


def puzzles(count: int, givens: tuple[int, int], pool: Path, processes: int) -> list[sudoku.Puzzle]:
    """Held-out puzzles with one solution each, none of them a symmetric image of a grid in the training pool."""
    solutions, _ = sudoku_pool(SUDOKU_SEED, SUDOKU_POOL, processes, pool)
    return sudoku.held_out(HELD_OUT_SEED, count, givens, avoid=set(sudoku.fingerprints(solutions).tolist()))


def diffusion(
    network: Network, tokenizer: Tokenizer, chosen: list[sudoku.Puzzle], sampling: Sampling, batch: int, seed: int = 0
) -> Score:
    """One canvas a puzzle, first sample; every puzzle has the same seed."""
    config, begun = network.config, time.perf_counter()
    solved: list[bool] = []
    steps: list[int] = []
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        rows = [
            Row(
                index,
                tokenizer.encode(sudoku.layout(puzzle.puzzle)),
                seed,
                stop_ids=config.eos_ids,
                canvas_length=config.canvas_length,
                room=config.canvas_length,
            )
            for index, puzzle in enumerate(some)
        ]
        replies = {e.row: e.reply for e in generate(network, rows, sampling) if isinstance(e, Done)}
        for index, puzzle in enumerate(some):
            solved.append(tokenizer.decode(replies[index].tokens) == sudoku.layout(puzzle.solution))
            steps.append(replies[index].usage.steps)
    return score(
        f"diffusion, at most {sampling.steps} steps", solved, steps, sampling.steps, time.perf_counter() - begun
    )


def autoregressive(network: Network, tokenizer: Tokenizer, chosen: list[sudoku.Puzzle], batch: int) -> Score:
    """The same weights, token by token, greedily."""
    config, begun = network.config, time.perf_counter()
    solved: list[bool] = []
    steps: list[int] = []
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        rows = [
            Row(
                index,
                tokenizer.encode(sudoku.layout(puzzle.puzzle)),
                0,
                stop_ids=config.eos_ids,
                canvas_length=1,
                room=config.canvas_length,
            )
            for index, puzzle in enumerate(some)
        ]
        replies = {e.row: e.reply for e in autoregress(network, rows) if isinstance(e, Done)}
        for index, puzzle in enumerate(some):
            solved.append(tokenizer.decode(replies[index].tokens) == sudoku.layout(puzzle.solution))
            steps.append(len(replies[index].tokens))
    return score("autoregressive, greedy", solved, steps, config.canvas_length + 1, time.perf_counter() - begun)


UNTRAINED = -1


def measure(
    path: Path, chosen: list[sudoku.Puzzle], caps: Sequence[int], batch: int, processes: int = 1
) -> list[Score]:
    """The whole table: every cap, the autoregressive mode of the same weights, and the untrained network.

    Rows are shared out over `processes` of one thread each; a row's seconds are those of its own process.
    """
    jobs: list[int | None] = [*caps, None, UNTRAINED]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as workers:
        # The longest first, so that no process is left with one at the end.
        tasks = {job: workers.submit(measure_row, path, chosen, job, batch) for job in reversed(jobs)}
        for job in jobs:
            print(json.dumps(asdict(tasks[job].result())), flush=True)
        return [tasks[job].result() for job in jobs]


def measure_row(path: Path, chosen: list[sudoku.Puzzle], job: int | None, batch: int) -> Score:
    """One row: diffusion under a cap of steps, autoregressive (None), or the untrained network on a quarter."""
    torch.set_num_threads(1)
    config = load_config(path)
    network, tokenizer = load_network(path), Tokenizer.from_directory(path)
    sampling = load_generation(path, config).sampling
    if job is None:
        return autoregressive(network, tokenizer, chosen, batch)
    if job != UNTRAINED:
        return diffusion(network, tokenizer, chosen, sampling.with_(steps=job), batch)
    fresh = Network(config)
    initialise(fresh, recipe("sudoku").seed)
    scored = diffusion(fresh.eval(), tokenizer, chosen[: len(chosen) // 4 or 1], sampling, batch)
    return replace(scored, mode="untrained network, " + scored.mode)


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| decoding | puzzles | solved | mean steps | steps where solved | stopped early |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.mode} | {s.puzzles} | {100 * s.solved:.1f} % ± {100 * s.error:.1f} | {s.mean_steps:.2f}"
        f" | {s.steps_solved:.2f} | {100 * s.settled:.0f} % |"
        for s in scores
    ]
    return "\n".join(lines)


def card(path: Path, scores: Sequence[Score], givens: tuple[int, int], machine: str) -> str:
    """The model card: what it is, how it was trained (from `training.json` beside it), what was measured."""
    config, run, count = load_config(path), recipe("sudoku"), scores[0].puzzles
    training = json.loads((path / "training.json").read_text())
    last, first, changes = SUDOKU_GIVENS.last, SUDOKU_GIVENS.first, len(training["segments"]) - 1
    parts = [
        "# sudoku-nano",
        f"""A DiffusionGemma of {training["parameters"]:,} parameters with all parts of the large one: sliding and
        full layers, {config.num_experts} experts (top {config.top_k_experts}) beside a dense MLP,
        self-conditioning. It fills one canvas of {config.canvas_length} tokens. The prompt is a puzzle, nine
        lines of nine digits with 0 for blank and no line end after the last; the answer is the solved grid in
        the same form.""",
        f"""**Data.** Puzzles of the project's own generator (`blockpress.sudoku`): {SUDOKU_POOL:,} solved grids
        under seed {SUDOKU_SEED}, each shown under a random symmetry of Sudoku, with {last[0]} to {last[1]}
        givens ({first[0]} to {first[1]} in the beginning).""",
        f"""**Training.** `blockpress train {run.name}`: {training["step"]:,} steps, {training["draws"]:,} corrupted
        canvases in all, seed {run.seed}, {training["seconds"] / 3600:.2f} hours on {training["hardware"]}. The
        run was resumed under other settings {changes} times (canvases a causal pass, planned steps, processes);
        `training.json` has every segment. The committed recipe is the last of them: a run of it from the start
        will not give these very weights.""",
        """**Weights.** Stored in bfloat16, run in float32. The vision tower in the checkpoint is random and unused
        (one layer, 8 features): the published layout has one. Licence: Apache-2.0.""",
        "## Measured",
        f"""{count:,} held-out puzzles with {givens[0]} to {givens[1]} givens and one solution each (generator seed
        {HELD_OUT_SEED}; no grid, nor a symmetric image of one, is in the training pool), one canvas a puzzle,
        first sample, seed 0, the sampler of `generation_config.json`; ± is one standard error. The temperature
        schedule depends on the cap.""",
        table(scores),
        f"""Measured on {machine} by `python -m blockpress.train.measure sudoku-nano --count {count} --write`, which
        wrote this page.""",
    ]
    return "\n\n".join(part if part.startswith("|") else fill(" ".join(part.split()), 120) for part in parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a shipped name or a checkpoint's directory")
    parser.add_argument("--count", type=int, default=1000, help="held-out puzzles (default 1000)")
    parser.add_argument("--givens", type=int, nargs=2, default=(30, 40), metavar=("LOW", "HIGH"))
    parser.add_argument("--caps", type=int, nargs="+", default=CAPS, help="most steps a canvas, one run each")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--pool", type=Path, default=Path("runs/sudoku/sudoku-pool.npz"), help="made where absent")
    parser.add_argument("--write", action="store_true", help="write README.md and measured.json beside the model")
    options = parser.parse_args(arguments)
    try:
        path, givens = resolve(options.model), tuple(options.givens)
        chosen = puzzles(options.count, givens, options.pool, os.cpu_count() or 1)
        scores = measure(path, chosen, options.caps, options.batch, os.cpu_count() or 1)
    except BlockpressError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(table(scores))
    if options.write:
        (path / "measured.json").write_text(json.dumps([asdict(s) for s in scores], indent=1) + "\n")
        (path / "README.md").write_text(card(path, scores, givens, machine()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
