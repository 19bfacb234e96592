"""`blockpress train`: a recipe small enough for a test, trained, stopped, resumed and exported."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blockpress
from blockpress.config import PRESETS, ModelConfig
from blockpress.text.builder import write_digits_tokenizer
from blockpress.train import recipes
from blockpress.train.objective import Objective, TrainingBatch
from blockpress.train.optimizer import OptimizerConfig

from .conftest import Call, Screen


class Counted:
    """Rows of counting, and a hook at a step."""

    def __init__(self, config: ModelConfig, at: dict[int, Callable[[], None]]) -> None:
        self.config, self.at = config, at

    def rows(self, step: int, count: int, progress: float) -> TrainingBatch:
        self.at.get(step, lambda: None)()
        length = 6 + 2 * self.config.canvas_length
        tokens = (torch.arange(length)[None] + step + torch.arange(count)[:, None]) % self.config.vocab_size
        return TrainingBatch(tokens, torch.full((count,), 6), torch.full((count,), 2))


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], None]]:
    """What is done when step N asks for its rows; the recipe `counting` is there as long as this is."""
    hooks: dict[int, Callable[[], None]] = {}
    recipe = recipes.TrainingRecipe(
        name="counting",
        about="counts",
        config=PRESETS["tiny"](),
        objective=Objective(draws=1),
        optimizer=OptimizerConfig(),
        rows=2,
        micro=1,
        steps=6,
        seed=1,
        source=lambda config, seed, processes, keep: Counted(config, hooks),
        write_tokenizer=write_digits_tokenizer,
    )
    monkeypatch.setitem(recipes.RECIPES, "counting", lambda: recipe)
    return hooks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return blockpress.load(folder / "model").network.state_dict()


def test_recipes_are_listed(call: Call, at: object) -> None:
    out = call("train", "--list").out
    assert "sudoku " in out and "counting    counts\n" in out


def test_a_run_reports_saves_and_exports(call: Call, at: object, tmp_path: Path) -> None:
    done = call("train", "counting", "--out", tmp_path / "a", "--no-compile", "--report-every", 2)
    reports = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0, done.err
    assert [report["step"] for report in reports] == [2, 4, 6] and reports[0]["steps"] == 6
    assert (tmp_path / "a" / "log.jsonl").read_text() == done.out
    assert f"checkpoint in {tmp_path / 'a' / 'model'}" in done.err
    assert blockpress.load(tmp_path / "a" / "model").config.hidden_size == 32
    again = call("train", "counting", "--out", tmp_path / "a", "--no-compile")
    assert again.code == 2 and "holds a run already" in again.err and "--resume" in again.err


def test_ctrl_c_saves_between_steps_and_resume_goes_on_as_if_nothing_had_been(
    call: Call, at: dict[int, Callable[[], None]], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("train", "counting", "--out", whole, "--no-compile").code == 0
    at[2] = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    done = call("train", "counting", "--out", cut, "--no-compile")
    assert done.code == 130 and "stopping after this step" in done.err and signal.getsignal(signal.SIGINT) == before
    assert (
        f"stopped at step 3 of 6 (interrupted); go on with: blockpress train counting --out {cut} --resume" in done.err
    )
    at.clear()
    assert call("train", "counting", "--out", cut, "--no-compile", "--resume").code == 0
    first, second = weights(whole), weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_ctrl_c_does_not_wait(call: Call, at: dict[int, Callable[[], None]], tmp_path: Path) -> None:
    at[1] = lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and None
    done = call("train", "counting", "--out", tmp_path, "--no-compile")
    assert done.code == 130 and done.err.endswith("blockpress: interrupted\n")
    assert not (tmp_path / "trainer.pt").exists()


def test_a_time_limit_ends_a_run_and_any_state_can_be_exported(call: Call, at: object, tmp_path: Path) -> None:
    done = call("train", "counting", "--out", tmp_path / "a", "--no-compile", "--minutes", 1e-9)
    assert done.code == 0 and "stopped at step 0 of 6 (its time is over)" in done.err
    done = call("train", "counting", "--out", tmp_path / "a", "--export", tmp_path / "b")
    assert done.code == 0 and done.err == f"step 0: checkpoint in {tmp_path / 'b'}\n"
    assert blockpress.load(tmp_path / "b").tokenizer is not None


def test_a_terminal_gets_a_bar(call: Call, at: object, tmp_path: Path, screen: Screen) -> None:
    done = call("train", "counting", "--out", tmp_path, "--no-compile", "--report-every", 3, screen=screen)
    assert done.code == 0 and "6/6" in done.out and "draws/s" in done.out and "\x1b[" in done.out


def test_the_losses_are_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockpress.cli.train import _compiled

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert (_compiled(None), _compiled(True), _compiled(False)) == (False, True, False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert _compiled(None)


def test_a_run_begins_with_given_weights(
    call: Call, at: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = recipes.RECIPES["counting"]()
    assert call("train", "counting", "--out", tmp_path / "a", "--no-compile", "--steps", 2).code == 0
    begun = ("train", "counting", "--no-compile", "--init", tmp_path / "a" / "model", "--minutes", 1e-9)
    assert call(*begun, "--out", tmp_path / "b").code == 0
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    facts = json.loads((tmp_path / "b" / "model" / "training.json").read_text())
    assert facts["segments"][0]["init"] == str(tmp_path / "a" / "model")
    assert facts["before"] == json.loads((tmp_path / "a" / "model" / "training.json").read_text())
    resumed = call("train", "counting", "--no-compile", "--out", tmp_path / "b", "--resume", "--minutes", 1e-9)
    assert resumed.code == 0 and json.loads((tmp_path / "b" / "model" / "training.json").read_text()) == facts
    shutil.rmtree(tmp_path / "a" / "model")
    monkeypatch.setitem(recipes.RECIPES, "counting", lambda: replace(counting, init=str(tmp_path / "a" / "model")))
    later = tmp_path / "b" / "later"
    assert call("train", "counting", "--out", tmp_path / "b", "--export", later).code == 0
    assert call("train", "counting", "--no-compile", "--out", tmp_path / "b", "--resume", "--minutes", 1e-9).code == 0
    assert json.loads((later / "training.json").read_text()) == facts
    monkeypatch.setitem(recipes.RECIPES, "counting", lambda: counting)
    refused = call("train", "counting", "--out", tmp_path / "c", "--init", "sudoku-nano")
    assert refused.code == 2 and "'sudoku-nano', whose config is another than recipe 'counting' has" in refused.err
    assert refused.err.count("\n") < 4
    refused = call("train", "counting", "--out", tmp_path / "c", "--init", "sudoku-mano")
    assert refused.code == 2 and "sudoku-mano" in refused.err
    turned = replace(counting.config, sliding_rope=replace(counting.config.sliding_rope, theta=50.0))  # the same shapes
    monkeypatch.setitem(recipes.RECIPES, "counting", lambda: replace(counting, config=turned))
    refused = call("train", "counting", "--out", tmp_path / "c", "--init", later)
    assert refused.code == 2 and "than recipe 'counting' has: sliding_rope (hint" in refused.err


def test_both_the_average_and_the_last_weights_can_be_exported(
    call: Call, at: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.RECIPES["counting"]()
    averaged = replace(recipe, optimizer=replace(recipe.optimizer, ema=0.9))
    monkeypatch.setitem(recipes.RECIPES, "counting", lambda: averaged)
    assert call("train", "counting", "--out", tmp_path, "--no-compile").code == 0
    for name, options in (("average", ()), ("raw", ("--raw",))):
        assert call("train", "counting", "--out", tmp_path, "--export", tmp_path / name / "model", *options).code == 0
    average, raw, written = (weights(tmp_path / name) for name in ("average", "raw", "."))
    assert all(torch.equal(average[name], written[name]) for name in written)
    assert not torch.equal(average["embed_tokens.weight"], raw["embed_tokens.weight"])
    kept = torch.load(tmp_path / "trainer.pt", weights_only=True)["network"]["embed_tokens.weight"]
    assert torch.equal(raw["embed_tokens.weight"], kept.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--raw",), "--raw is given without --export"),
        (("--compute-dtype", "float16"), "--compute-dtype is 'float16'"),
        (("--resume", "--init", "sudoku-nano"), "--init"),
    ],
)
def test_conflicting_options_are_refused(
    call: Call, at: object, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    (tmp_path / "trainer.pt").touch()
    out = tmp_path if "--resume" in options else tmp_path / "fresh"
    done = call("train", "counting", "--out", out, *options)
    assert done.code == 2 and told in done.err
