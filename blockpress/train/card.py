"""The figures measured on a sudoku model, and its model card: the history of its training, then tables.

Run it:  python -m blockpress.evals.sudoku sudoku-nano --count 1000 --write
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from blockpress.checkpoints import load_config
from blockpress.train.recipes import SUDOKU_GIVENS, SUDOKU_POOL, SUDOKU_SEED

HELD_OUT_SEED = 0
CALIBRATION_EDGES = (0.005, 0.01, 0.02, 0.05)
"""Edges of the calibration bins, in nats a token; the first is the sampler's own bound."""


@dataclass(frozen=True)
class PuzzleOutcome:
    """The result of one puzzle. settled: stopped before its limit of steps. entropy: the mean of its last step, in
    nats a token; None in autoregressive decoding."""

    solved: bool
    steps: int
    settled: bool
    entropy: float | None = None


@dataclass(frozen=True)
class SolvedShare:
    """Several puzzles: the share solved exactly, its standard error, steps, the shares that settled on a wrong grid or
    were still unsettled at the end, and seconds."""

    mode: str
    puzzles: int
    solved: float
    error: float
    mean_steps: float
    steps_solved: float
    settled_wrong: float
    unsettled: float
    seconds: float


@dataclass(frozen=True)
class CalibrationBin:
    """How many of the answers are right whose last step had a mean entropy of at least `low` and below `high` (None: no
    limit), in nats a token."""

    low: float
    high: float | None
    answers: int
    right: int


def score(mode: str, outcomes: Sequence[PuzzleOutcome], seconds: float) -> SolvedShare:
    """Summarise outcomes under a row's name; `seconds` is the time they took."""
    count = len(outcomes)
    right = [outcome.steps for outcome in outcomes if outcome.solved]
    share = len(right) / count
    return SolvedShare(
        mode=mode,
        puzzles=count,
        solved=share,
        error=math.sqrt(share * (1 - share) / count),
        mean_steps=sum(outcome.steps for outcome in outcomes) / count,
        steps_solved=sum(right) / len(right) if right else 0.0,
        settled_wrong=sum(outcome.settled and not outcome.solved for outcome in outcomes) / count,
        unsettled=sum(not outcome.settled for outcome in outcomes) / count,
        seconds=seconds,
    )


def calibration(outcomes: Sequence[PuzzleOutcome]) -> list[CalibrationBin]:
    """The outcomes, binned by the mean entropy of their last step."""
    known = [(outcome.entropy, outcome.solved) for outcome in outcomes if outcome.entropy is not None]
    bins = []
    for low, high in zip((0.0, *CALIBRATION_EDGES), (*CALIBRATION_EDGES, None), strict=True):
        inside = [right for entropy, right in known if low <= entropy < (math.inf if high is None else high)]
        bins.append(CalibrationBin(low, high, len(inside), sum(inside)))
    return bins


@dataclass(frozen=True)
class Measured:
    """All figures of the card: the table of decodings, the one by givens, and calibration at the highest cap."""

    scores: list[SolvedShare]
    by_givens: list[SolvedShare]
    calibration: list[CalibrationBin]


def steps_table(scores: Sequence[SolvedShare], first: str = "decoding") -> str:
    """The scores as a Markdown table."""
    lines = [
        f"| {first} | puzzles | solved | mean steps | steps where solved | settled wrong | unsettled |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.mode} | {s.puzzles} | {100 * s.solved:.1f} % ± {100 * s.error:.1f} | {s.mean_steps:.2f}"
        f" | {s.steps_solved:.2f} | {100 * s.settled_wrong:.1f} % | {100 * s.unsettled:.1f} % |"
        for s in scores
    ]
    return "\n".join(lines)


def calibration_table(bins: Sequence[CalibrationBin]) -> str:
    """Calibration as a Markdown table."""
    lines = ["| mean entropy of the last step, nats a token | answers | right |", "|---|---|---|"]
    for c in bins:
        bounds = f"{c.low} and more" if c.high is None else f"{c.low} to {c.high}" if c.low else f"below {c.high}"
        lines.append(f"| {bounds} | {c.answers} | {f'{100 * c.right / c.answers:.1f} %' if c.answers else ''} |")
    return "\n".join(lines)


def card(path: Path, measured: Measured, givens: tuple[int, int], machine: str) -> str:
    """The model card: what it is, how it was trained (from `training.json` next to it), what was measured."""
    config, count = load_config(path), measured.scores[0].puzzles
    more = f" --by-givens {measured.by_givens[0].puzzles}" if measured.by_givens else ""
    training = json.loads((path / "training.json").read_text())
    last, first = SUDOKU_GIVENS.last, SUDOKU_GIVENS.first
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
        "**Training.** " + " ".join([*history(training), "`training.json` has the settings of every part."]),
        """**Weights.** Stored in bfloat16, run in float32. The vision tower in the checkpoint is random and unused
        (one layer, 8 features): the published layout has one. Licence: Apache-2.0.""",
        "## Measured",
        f"""{count:,} held-out puzzles with {givens[0]} to {givens[1]} givens and one solution each (generator seed
        {HELD_OUT_SEED}; no grid, nor a symmetric image of one, is in the training pool), one canvas a puzzle,
        first sample, seed 0, the sampler of `generation_config.json`; ± is one standard error. The temperature
        schedule depends on the cap.""",
        steps_table(measured.scores),
        *givens_and_calibration(measured),
        f"""Measured on {machine} by `python -m blockpress.evals.sudoku sudoku-nano --count {count}{more} --write`,
        which wrote this page.""",
    ]
    return "\n\n".join(part if part.startswith("|") else fill(" ".join(part.split()), 120) for part in parts) + "\n"


def history(training: dict[str, Any]) -> list[str]:
    """Sentences on how the weights were made, the earliest part of the training first."""
    before = history(training["before"]) if "before" in training else []
    changes = len(training["segments"]) - 1
    parts = [
        f"""`blockpress train {training["recipe"]}`: {training["step"]:,} steps, {training["draws"]:,} canvases in all,
        seed {training["seed"]}, {training["seconds"] / 3600:.2f} hours on {training["hardware"]}""",
        *([f"resumed under other settings {changes} times"] if changes else []),
        *(["the weights are their moving average"] if "average" in training.get("weights", "") else []),
    ]
    return [*before, ", ".join(parts) + "."]


def givens_and_calibration(measured: Measured) -> list[str]:
    """The other two tables of the card, each with its sentence."""
    parts = []
    if measured.by_givens:
        parts += [
            "By the number of givens, on puzzles of the same seed:",
            steps_table(measured.by_givens, "puzzles with"),
        ]
    sentence = "How often an answer is right, by how sure the network was in the last of at most 48 steps:"
    return [*parts, sentence, calibration_table(measured.calibration)]
