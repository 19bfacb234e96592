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
SUDOKU_GIVENS = Givens(first=(45, 60), last=(28, 42), over=0.2)


def _sudoku_source(
    config: ModelConfig, seed: int, processes: int, directory: Path, givens: Givens = SUDOKU_GIVENS
) -> Source:
    solutions, orders = sudoku_pool(SUDOKU_SEED, SUDOKU_POOL, processes, directory / "sudoku-pool.npz")
    return SudokuRows(config, solutions, orders, givens, seed)


def _digits_tokenizer(directory: Path) -> None:
    from blockpress.text.builder import write_digits_tokenizer

    write_digits_tokenizer(directory)


def sudoku_recipe() -> TrainingRecipe:
    """`sudoku-nano`: one puzzle in, one canvas out."""
    return TrainingRecipe(
        name="sudoku",
        about="sudoku-nano: solves 9 x 9 puzzles in one canvas of 90 tokens",
        config=sudoku_nano(),
        objective=Objective(draws=4, stratified=True),
        optimizer=OptimizerConfig(rate=2e-3, muon_rate=5e-3, warmup=100, decay=0.7),
        rows=16,
        micro=4,
        steps=6_200,
        seed=SUDOKU_SEED,
        source=_sudoku_source,
        write_tokenizer=_digits_tokenizer,
    )


def sudoku_on_policy_recipe() -> TrainingRecipe:
    """The second part of the training of `sudoku-nano`: on-policy, on harder puzzles."""
    return replace(
        sudoku_recipe(),
        name="sudoku-on-policy",
        about="sudoku-nano once more, on what its own sampler visits",
        init="sudoku-nano",
        objective=Objective(
            draws=4,
            stratified=True,
            causal_weight=0.0,
            on_policy=4,
            max_trajectory_steps=48,
            steps_past_settling=3,
            row_groups=16,
        ),
        optimizer=OptimizerConfig(rate=3e-4, muon_rate=8e-4, warmup=30, decay=0.8),
        steps=3600,
        seed=SUDOKU_SEED + 1,
        source=partial(_sudoku_source, givens=Givens(first=(26, 42), last=(26, 42), over=0.0)),
    )


def sudoku_on_policy_finish_recipe() -> TrainingRecipe:
    """The last part: trajectories continue after they settle, so that the network is surer where it is right."""
    long = sudoku_on_policy_recipe()
    return replace(
        long,
        name="sudoku-on-policy-finish",
        about="the end of sudoku-on-policy: fewer steps until a canvas settles",
        objective=replace(long.objective, max_trajectory_steps=32, steps_past_settling=8),
        optimizer=OptimizerConfig(rate=2e-4, muon_rate=5e-4, warmup=5, decay=1.0),
        steps=450,
        seed=SUDOKU_SEED + 2,
    )


LINES_OF_TEN = 142.15
"""The base of RoPE by which, in a head of 64, one pair turns once in ten tokens and one nearly once in thirty, so that
position alone tells which cells share a column. By 10,000 no pair does (docs/log.md, 30 November 2026)."""


def sudoku_tens_recipe() -> TrainingRecipe:
    """`sudoku` for a network whose positions fit lines of ten tokens; short, since the next part learns more a draw."""
    base = sudoku_recipe()
    sliding, full = (replace(rope, theta=LINES_OF_TEN) for rope in (base.config.sliding_rope, base.config.full_rope))
    return replace(
        base,
        name="sudoku-tens",
        about="sudoku-nano with a RoPE whose periods fit lines of ten tokens; not shipped yet",
        config=replace(base.config, sliding_rope=sliding, full_rope=full),
        optimizer=OptimizerConfig(rate=2e-3, muon_rate=5e-3, warmup=50, decay=0.0),
        steps=560,
        source=partial(_sudoku_source, givens=replace(SUDOKU_GIVENS, over=0.4)),
    )


def sudoku_tens_on_policy_recipe() -> TrainingRecipe:
    """The main part of its training, under symmetries; `--init` names the weights that it goes on from."""
    base = sudoku_tens_recipe()
    on_policy = sudoku_on_policy_recipe().objective
    return replace(
        base,
        name="sudoku-tens-on-policy",
        about="what follows sudoku-tens: on-policy, each visit of a puzzle under another symmetry",
        objective=replace(on_policy, row_groups=8, symmetries=True),
        optimizer=OptimizerConfig(rate=1.5e-3, muon_rate=4e-3, warmup=20, decay=0.9),
        steps=2_600,
        seed=SUDOKU_SEED + 1,
        source=partial(_sudoku_source, givens=Givens(first=(28, 42), last=(28, 42), over=0.0)),
    )


RECIPES: dict[str, Callable[[], TrainingRecipe]] = {
    "sudoku": sudoku_recipe,
    "sudoku-on-policy": sudoku_on_policy_recipe,
    "sudoku-on-policy-finish": sudoku_on_policy_finish_recipe,
    "sudoku-tens": sudoku_tens_recipe,
    "sudoku-tens-on-policy": sudoku_tens_on_policy_recipe,
}


def recipe(name: str) -> TrainingRecipe:
    """The recipe of that name.

    Raises:
        TrainingError: there is none; the hint lists the known ones.
    """
    if name not in RECIPES:
        raise TrainingError(f"no recipe is named {name!r}", hint=f"recipes: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
