"""A training run small enough for tests: rows to be copied, made here from (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from blockpress.config import PRESETS, ModelConfig
from blockpress.text.builder import write_digits_tokenizer
from blockpress.train.objective import Objective, TrainingBatch
from blockpress.train.optimizer import OptimizerConfig
from blockpress.train.recipes import TrainingRecipe

EOS = 1


@dataclass(frozen=True)
class Copies:
    """Rows of a bos, four digits, and a canvas that repeats them and ends."""

    config: ModelConfig
    seed: int

    def rows(self, step: int, count: int, progress: float) -> TrainingBatch:
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        digits = torch.randint(5, 15, (count, 4), generator=generator)
        bos, eos = torch.full((count, 1), 2), torch.full((count, 2), EOS)
        return TrainingBatch(
            torch.cat((bos, digits, digits, eos), dim=1), torch.full((count,), 5), torch.ones(count, dtype=int)
        )


def small_config() -> ModelConfig:
    """Both kinds of layer, a canvas (6) longer than the window (5), as many tokens as the digits tokenizer."""
    return replace(PRESETS["tiny"](), vocab_size=16, canvas_length=6, sliding_window=5, context_length=64)


def make_copy_recipe(**changes: object) -> TrainingRecipe:
    """Six steps of four rows, two at a time, by both optimizers."""
    base = TrainingRecipe(
        name="copy",
        about="repeat the prompt",
        config=small_config(),
        objective=Objective(draws=2),
        optimizer=OptimizerConfig(rate=3e-3, muon_rate=1e-2, warmup=2, decay=0.5),
        rows=4,
        micro=2,
        steps=6,
        seed=3,
        source=lambda config, seed, processes, keep: Copies(config, seed),
        write_tokenizer=lambda directory: write_digits_tokenizer(Path(directory)),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    return small_config()


@pytest.fixture(scope="session")
def copy_recipe() -> Callable[..., TrainingRecipe]:
    """`copy_recipe(**changes)`."""
    return make_copy_recipe
