"""Recipes: what is named, what fits together, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockpress.checkpoints import load_config, resolve
from blockpress.config import PRESETS, Sampling
from blockpress.errors import TrainingError
from blockpress.text import Tokenizer
from blockpress.train import recipes
from blockpress.train.recipes import RECIPES, TrainingRecipe, recipe


@pytest.mark.parametrize("name", ["sudoko", "", "Sudoku"])
def test_an_unknown_recipe_is_named_and_the_known_ones_listed(name: str):
    with pytest.raises(TrainingError) as caught:
        recipe(name)
    assert repr(name) in caught.value.message
    assert all(known in caught.value.hint for known in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_consistent(name: str, tmp_path: Path):
    built = recipe(name)
    assert built.name == name
    assert built.about
    assert recipe(name) == built or recipe(name).config == built.config
    built.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.vocab_size <= built.config.vocab_size
    if built.init is not None:
        assert replace(load_config(resolve(built.init)), vision=None) == built.config
    assert (tokenizer.bos, tokenizer.eos) == (built.config.bos_id, built.config.eos_ids[0])


def test_the_sudoku_recipe_trains_the_shipped_configuration():
    built = recipe("sudoku")
    assert built.config == PRESETS["sudoku-nano"]()
    assert built.generation.sampling == Sampling()
    assert built.generation.stop_ids == (1,)


def test_one_pair_of_the_base_for_lines_of_ten_tells_columns_apart():
    """Every distance within a grid: the least cosine of whole lines against the largest of all others."""
    distances = torch.arange(-80, 81)
    whole = distances % 10 == 0

    def margin(theta: float) -> float:
        angles = distances[:, None] * theta ** (-torch.arange(16) / 16)
        return float((angles[whole].cos().amin(0) - angles[~whole].cos().amax(0)).max())

    config = recipe("sudoku").config
    assert {layer.head_dim for layer in config.layers} == {32}
    assert margin(config.sliding_rope.theta) > 0.18 > 0 > margin(10_000.0)
    assert config.full_rope.theta == config.sliding_rope.theta


def test_the_sudoku_recipe_s_pool_follows_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from blockpress import sudoku

    asked = []
    monkeypatch.setattr(recipes, "sudoku_pool", lambda *a: asked.append(a) or sudoku.puzzle_pool(4, 2))
    built = recipe("sudoku")
    rows = built.source(built.config, built.seed, 3, tmp_path).rows(0, 2, 0.0)
    assert rows.tokens.shape == (2, 180)
    assert asked == [(built.seed, recipes.SUDOKU_POOL, 3, tmp_path / "sudoku-pool.npz")]


def test_micro_batches_must_divide_the_rows(copy_recipe: Callable[..., TrainingRecipe]):
    with pytest.raises(TrainingError, match="micro is 3"):
        copy_recipe(rows=4, micro=3)
