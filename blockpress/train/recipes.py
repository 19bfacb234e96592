"""Complete training configurations as values: what is trained, on what data, how, from which seed.

`blockpress train RECIPE` runs one. A recipe and its seed determine every number of a run on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from blockpress.config import GenerationConfig, ModelConfig, sudoku_nano
from blockpress.errors import TrainingError
from blockpress.train.data import Givens, Source, SudokuRows, sudoku_pool
from blockpress.train.objective import Objective
from blockpress.train.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """One training run.

    rows: clean rows a step (each with `objective.draws` canvases). micro: rows of one micro-batch. steps: optimizer
    steps. source: builds the data from (config, seed, worker processes, a directory to cache it in). init: the model
    whose weights the run starts from; None: random ones from the seed.
    """

    name: str
    about: str
    config: ModelConfig
    objective: Objective
    optimizer: OptimizerConfig
    rows: int
    micro: int
    steps: int
    seed: int
    source: Callable[[ModelConfig, int, int, Path], Source]
    write_tokenizer: Callable[[Path], None]
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    init: str | None = None

    def __post_init__(self) -> None:
        if self.rows % self.micro:
            raise TrainingError(
                f"recipe field micro is {self.micro}", hint=f"micro must divide the rows of a step ({self.rows})"
            )


SUDOKU_POOL = 40_000
SUDOKU_SEED = 2026
SUDOKU_GIVENS = Givens(first=(45, 60), last=(28, 42), over=0.1)


def _sudoku_source(
    config: ModelConfig, seed: int, processes: int, directory: Path, givens: Givens = SUDOKU_GIVENS
) -> Source:
    solutions, orders = sudoku_pool(SUDOKU_SEED, SUDOKU_POOL, processes, directory / "sudoku-pool.npz")
    return SudokuRows(config, solutions, orders, givens, seed)


def _digits_tokenizer(directory: Path) -> None:
    from blockpress.text.builder import write_digits_tokenizer

    write_digits_tokenizer(directory)


def sudoku_recipe() -> TrainingRecipe:
    """The beginning of `sudoku-nano`: corrupted answers, until its sampler comes to something; short, since on-policy
    draws teach more."""
    return TrainingRecipe(
        name="sudoku",
        about="sudoku-nano from random weights, on corrupted answers; sudoku-on-policy goes on from it",
        config=sudoku_nano(),
        objective=Objective(draws=4, stratified=True, causal_weight=0.0),
        optimizer=OptimizerConfig(rate=2e-3, muon_rate=5e-3, warmup=50, decay=0.0),
        rows=16,
        micro=4,
        steps=600,
        seed=SUDOKU_SEED,
        source=_sudoku_source,
        write_tokenizer=_digits_tokenizer,
    )


def sudoku_on_policy_recipe() -> TrainingRecipe:
    """The main part: states of its own sampler alone, each visit of a puzzle under another symmetry."""
    return replace(
        sudoku_recipe(),
        name="sudoku-on-policy",
        about="sudoku-nano on what its own sampler visits; --init names the weights that it goes on from",
        init="sudoku-nano",
        objective=Objective(
            draws=4,
            stratified=True,
            causal_weight=0.0,
            on_policy=4,
            max_trajectory_steps=24,
            steps_past_settling=3,
            row_groups=8,
            symmetries=True,
        ),
        optimizer=OptimizerConfig(rate=1.5e-3, muon_rate=4e-3, warmup=20, decay=0.9),
        steps=5_600,
        seed=SUDOKU_SEED + 1,
        source=partial(_sudoku_source, givens=replace(SUDOKU_GIVENS, over=0.0)),
    )


RECIPES: dict[str, Callable[[], TrainingRecipe]] = {
    "sudoku": sudoku_recipe,
    "sudoku-on-policy": sudoku_on_policy_recipe,
}


def recipe(name: str) -> TrainingRecipe:
    """The recipe of that name.

    Raises:
        TrainingError: there is none; the hint lists the known ones.
    """
    if name not in RECIPES:
        raise TrainingError(f"no recipe is named {name!r}", hint=f"recipes: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
