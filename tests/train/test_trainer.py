"""The loop: a run that stops and goes on is the same run, a state is whole or not there, and a bad step is an error."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blockpress
from blockpress.config import PRESETS
from blockpress.errors import CheckpointError, TrainingError
from blockpress.train import trainer as trainer_module
from blockpress.train.objective import Objective, TrainingBatch
from blockpress.train.recipes import TrainingRecipe
from blockpress.train.trainer import STATE, Trainer
from tests.conftest import FileLimit
from tests.forks import python

Recipes = Callable[..., TrainingRecipe]
pytestmark = pytest.mark.end_to_end


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(copy_recipe: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """An uninterrupted run of six steps."""
    trainer = Trainer(copy_recipe(), tmp_path_factory.mktemp("whole"))
    trainer.reports = list(trainer.run(report_every=2))  # type: ignore[attr-defined]
    return trainer


def test_a_run_reports_and_logs_one_line_a_report(whole: Trainer):
    reports = whole.reports  # type: ignore[attr-defined]
    assert [report.step for report in reports] == [2, 4, 6]
    lines = [json.loads(line) for line in (whole.out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line, report in zip(lines, reports, strict=True):
        assert line.keys() == vars(report).keys()
        assert line["canvas_loss"] == pytest.approx(report.canvas_loss, abs=1e-5)
        assert 0 < line["causal_loss"] < 10
        assert 0 <= line["accuracy"] <= 1
        assert line["gradient_norm"] > 0
    assert [line["draws"] for line in lines] == [16, 32, 48]
    assert lines[-1]["rate"] == pytest.approx(1 / 3, abs=1e-5)
    assert lines[0]["seconds"] < lines[-1]["seconds"]


def test_every_parameter_is_trained(whole: Trainer, copy_recipe: Recipes, tmp_path: Path):
    fresh = weights(Trainer(copy_recipe(), tmp_path))
    scalars = {name for name in fresh if name.endswith("_scalar")}
    assert {name for name, value in weights(whole).items() if torch.equal(value, fresh[name])} == scalars


def test_the_same_recipe_gives_the_same_weights(whole: Trainer, copy_recipe: Recipes, tmp_path: Path):
    again = Trainer(copy_recipe(), tmp_path)
    list(again.run())
    assert same(weights(again), weights(whole))
    other = Trainer(copy_recipe(seed=4), tmp_path / "other")
    list(other.run())
    assert not same(weights(other), weights(whole))


def test_micro_batches_sum_to_the_whole_step(copy_recipe: Recipes, tmp_path: Path):
    # Nothing is drawn for the causal loss, so with its weight alone the gradient must be the same however it is cut.
    clean = Objective(causal_weight=1e6)
    steps = [Trainer(copy_recipe(micro=micro, objective=clean), tmp_path).train_step() for micro in (4, 2, 1)]
    for step in steps[1:]:
        assert step[1].item() == pytest.approx(steps[0][1].item(), rel=1e-3)
        assert step[3].item() == pytest.approx(steps[0][3].item(), rel=1e-2)


@pytest.mark.parametrize("stop", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(
    whole: Trainer, copy_recipe: Recipes, tmp_path: Path, stop: int
):
    first = Trainer(copy_recipe(), tmp_path)
    for report in first.run(report_every=1, save_seconds=0.0):
        if report.step == stop + 1:  # the report comes before the save, so this step is lost
            break
    second = Trainer(copy_recipe(seed=3), tmp_path)
    second.resume()
    resumed = second.seconds
    assert (second.step, resumed > 0) == (stop, True)
    rest = list(second.run(report_every=1))
    assert [report.step for report in rest] == list(range(stop + 1, 7))
    assert same(weights(second), weights(whole))
    for ours, theirs in zip(second.optimizers, whole.optimizers, strict=True):
        assert repr(ours.state_dict()) == repr(theirs.state_dict())
    assert rest[-1].draws == 48
    assert second.seconds > resumed


def test_a_finished_run_that_is_resumed_does_nothing(whole: Trainer, copy_recipe: Recipes):
    again = Trainer(copy_recipe(), whole.out)
    again.resume()
    assert list(again.run()) == []
    assert same(weights(again), weights(whole))


def test_a_longer_run_continues_and_reports_it(whole: Trainer, copy_recipe: Recipes, tmp_path: Path):
    (tmp_path / STATE).write_bytes((whole.out / STATE).read_bytes())
    longer = Trainer(copy_recipe(), tmp_path, steps=8)
    longer.resume()
    assert [report.step for report in longer.run(report_every=1)] == [7, 8]
    assert [(segment["from_step"], segment["steps"]) for segment in longer.segments] == [(0, 6), (6, 8)]


def test_a_save_that_fails_leaves_the_old_state(copy_recipe: Recipes, tmp_path: Path, file_limit: FileLimit):
    trainer = Trainer(copy_recipe(), tmp_path)
    trainer.train_step()
    trainer.save()
    before, size = weights(trainer), (tmp_path / STATE).stat().st_size
    trainer.train_step()
    for room in (size // 2, size - 1, 0):
        with file_limit(room), pytest.raises(TrainingError) as caught:
            trainer.save()
        said = caught.value.message
        assert str(tmp_path / STATE) in said and re.search(
            r"cannot be written: .*; it takes [\d,]+ bytes, and [\d,]+ bytes are free there", said
        )
        assert [file.name for file in tmp_path.iterdir()] == [STATE], "and no part of the new one"
    again = Trainer(copy_recipe(), tmp_path)
    again.resume()
    assert again.step == 1
    assert same(weights(again), before)
    trainer.save()
    again.resume()
    assert again.step == 2


def test_a_log_ends_with_whole_lines_where_the_disk_is_full(
    copy_recipe: Recipes, tmp_path: Path, file_limit: FileLimit
):
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n" * 3)
    with (
        file_limit(20),
        pytest.raises(TrainingError, match=r"log\.jsonl cannot be written: .*; it takes [\d,]+ bytes"),
    ):
        list(Trainer(copy_recipe(), tmp_path).run(report_every=1))
    assert log.read_text() == "{}\n" * 3


def test_an_export_that_fails_leaves_the_older_one(whole: Trainer, tmp_path: Path, file_limit: FileLimit):
    def files() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    whole.export(tmp_path)
    before, sizes = files(), [len(content) for content in files().values()]
    for room in (min(sizes) - 1, sorted(sizes)[-2] - 1, max(sizes) - 1):
        with file_limit(room), pytest.raises(CheckpointError, match=r"cannot be written.*bytes are free there"):
            whole.export(tmp_path)
        assert files() == before
        with file_limit(room), pytest.raises(CheckpointError):
            whole.export(tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a disk")
def test_a_disk_that_is_really_full_is_named(copy_recipe: Recipes, tmp_path: Path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        trainer = Trainer(copy_recipe(), tmp_path)
        trainer.save()
        size = (tmp_path / STATE).stat().st_size
        with (tmp_path / "other").open("wb") as other, suppress(OSError):
            other.write(bytes((256 << 10) - size - 4096))
        with pytest.raises(
            TrainingError, match=r"cannot be written: the disk is full; it takes [\d,]+ bytes, and [\d,]+"
        ):
            trainer.save()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["other", STATE]
        Trainer(copy_recipe(), tmp_path).resume()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_state_with_older_names_resumes_under_the_same_settings(copy_recipe: Recipes, tmp_path: Path):
    Trainer(copy_recipe(), tmp_path).save()
    state = torch.load(tmp_path / STATE, weights_only=True)
    older = {"max_trajectory_steps": "ages", "steps_past_settling": "past", "row_groups": "groups"}
    begun = state["segments"]
    objective = {older.get(name, name): value for name, value in begun[0]["objective"].items()}
    assert set(older.values()) <= set(objective)
    renamed = [begun[0] | {"objective": objective}]
    before = {"recipe": "copy", "before": {"recipe": "copy", "segments": renamed}, "segments": renamed}
    torch.save(state | {"segments": renamed, "before": before}, tmp_path / STATE)
    again = Trainer(copy_recipe(), tmp_path)
    again.resume()
    assert again.segments == begun
    assert again.before == before | {"before": {"recipe": "copy", "segments": begun}, "segments": begun}


def refused(copy_recipe: Recipes, out: Path, *told: str, **changes: object) -> None:
    trainer = Trainer(copy_recipe(**changes), out)
    with pytest.raises(TrainingError) as caught:
        trainer.resume()
    assert [word for word in told if word not in caught.value.message] == []
    assert caught.value.hint


def test_resuming_without_a_state_is_refused(copy_recipe: Recipes, tmp_path: Path):
    refused(copy_recipe, tmp_path, "no state", str(tmp_path))


def test_a_state_of_another_recipe_is_refused(whole: Trainer, copy_recipe: Recipes):
    refused(copy_recipe, whole.out, "'copy'", name="sudoku")


def test_a_truncated_state_is_refused(whole: Trainer, copy_recipe: Recipes, tmp_path: Path):
    content = (whole.out / STATE).read_bytes()
    for length in (0, len(content) // 2, len(content) - 10):
        (tmp_path / STATE).write_bytes(content[:length])
        refused(copy_recipe, tmp_path, STATE)


def test_a_state_of_another_shape_is_refused(whole: Trainer, copy_recipe: Recipes, small, tmp_path: Path):  # type: ignore[no-untyped-def]
    refused(copy_recipe, whole.out, STATE, config=replace(small, hidden_size=16))
    refused(copy_recipe, whole.out, STATE, optimizer=replace(copy_recipe().optimizer, muon_rate=None))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"not a state at all", id="text"),
        pytest.param([1, 2], id="a list"),
        pytest.param("step", id="without its step"),
        pytest.param("network", id="without its network"),
    ],
)
def test_a_file_that_is_no_state_is_refused(whole: Trainer, copy_recipe: Recipes, tmp_path: Path, damage: object):
    if isinstance(damage, bytes):
        (tmp_path / STATE).write_bytes(damage)
    elif isinstance(damage, str):
        state = torch.load(whole.out / STATE, weights_only=True)
        del state[damage]
        torch.save(state, tmp_path / STATE)
    else:
        torch.save(damage, tmp_path / STATE)
    refused(copy_recipe, tmp_path, STATE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_moves_nothing(copy_recipe: Recipes, tmp_path: Path, value: float):
    trainer = Trainer(copy_recipe(), tmp_path)
    trainer.train_step()
    with torch.no_grad():
        trainer.network.layers[0].post_attention_layernorm.weight[0] = value
    before = weights(trainer)
    with pytest.raises(TrainingError, match="step 1: ") as caught:
        trainer.train_step()
    assert "not finite" in caught.value.message
    assert caught.value.hint == "no state to --resume is saved: start again: give --compute-dtype float32"
    assert trainer.step == 1
    assert all(torch.equal(x, before[name]) or x.isnan().any() for name, x in weights(trainer).items())


def test_the_way_out_of_a_loss_that_is_not_finite_exists(copy_recipe: Recipes, tmp_path: Path):
    trainer = Trainer(copy_recipe(), tmp_path, dtype=torch.float32)
    trainer.save()
    with torch.no_grad():
        trainer.network.layers[0].post_attention_layernorm.weight[0] = math.nan
    with pytest.raises(TrainingError) as caught:
        trainer.train_step()
    assert caught.value.hint.startswith("--resume goes on from the last saved state: lower OptimizerConfig.rate (")
    lower = replace(copy_recipe().optimizer, rate=1e-6)
    again = Trainer(copy_recipe(optimizer=lower), tmp_path, dtype=torch.float32)
    again.resume()
    assert again.train_step().isfinite().all() and again.segments[-1]["optimizer"]["rate"] == 1e-6


@pytest.mark.slow
def test_training_lowers_both_losses(copy_recipe: Recipes, tmp_path: Path):
    trainer = Trainer(copy_recipe(steps=30, rows=8, micro=8), tmp_path)
    first, *_, last = trainer.run(report_every=10)
    assert last.causal_loss < first.causal_loss - 0.2
    assert last.canvas_loss < first.canvas_loss


def test_an_export_loads_and_answers(whole: Trainer, tmp_path: Path):
    whole.export(tmp_path)
    lm = blockpress.load(tmp_path)
    for name, value in weights(whole).items():
        assert torch.equal(lm.network.state_dict()[name], value.bfloat16().float()), name
    reply = lm.generate("1234", max_tokens=6)
    assert reply.usage.completion_tokens <= 6
    facts = json.loads((tmp_path / "training.json").read_text())
    assert (facts["recipe"], facts["seed"], facts["step"], facts["draws"]) == ("copy", 3, 6, 48)
    assert facts["parameters"] == sum(p.numel() for p in whole.network.parameters())


COMPILED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from tests.train.conftest import make_copy_recipe, small_config
from blockpress.train.objective import Objective
from blockpress.train.trainer import Trainer
torch.set_num_threads(1)
for dtype, near, layer in ((torch.bfloat16, 2e-2, 0), (torch.float32, 1e-4, 1)):
    config = replace(small_config(), layers=small_config().layers[layer : layer + 1])
    recipe = make_copy_recipe(config=config, objective=Objective(draws=2, on_policy=1), micro=4)
    plain, traced = (Trainer(recipe, Path(sys.argv[1]), dtype=dtype) for _ in range(2))
    assert torch.equal(plain.train_step(), traced.train_step())  # makes what is made once, else it is traced twice
    traced._losses = torch.compile(traced._plain_losses, dynamic=False, backend="eager")
    for _ in range(2):
        one, other = plain.train_step(), traced.train_step()
        assert torch.allclose(one, other, rtol=near), (dtype, one, other)
    assert plain.segments[0]["dtype"] == str(dtype).removeprefix("torch.")
"""


@pytest.mark.slow
def test_compiled_and_plain_steps_agree_in_both_types(tmp_path: Path):
    """Traced as for the compiler, but run by torch: code of its own would take minutes to build. In a process without
    the checks of shapes, which the compiler would trace as well."""
    done = subprocess.run([*python(), "-c", COMPILED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_default_type_is_the_fast_one(copy_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("bfloat16", "float32"):
        monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", name)
        trainer = Trainer(copy_recipe(), tmp_path)
        assert trainer.dtype == getattr(torch, name)
        assert {group.dtype for group in trainer.optimizers[1:]} == {trainer.dtype}  # type: ignore[attr-defined]


def test_int8_is_refused_by_name_unless_another_type_is_given(
    copy_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "int8")
    with pytest.raises(TrainingError, match="BLOCKPRESS_COMPUTE_DTYPE is 'int8'"):
        Trainer(copy_recipe(), tmp_path)
    recipe = copy_recipe(config=PRESETS["sudoku-nano"](), init="sudoku-nano")
    begun = weights(Trainer(recipe, tmp_path, dtype=torch.float32))
    monkeypatch.delenv("BLOCKPRESS_COMPUTE_DTYPE")
    assert same(begun, weights(Trainer(recipe, tmp_path, dtype=torch.float32)))


def test_micro_batches_hold_rows_of_one_length_bucket(copy_recipe: Recipes, tmp_path: Path):
    short, long = 1, trainer_module.BUCKET // 6

    class Mixed:
        def rows(self, step: int, count: int, progress: float) -> TrainingBatch:
            canvases = torch.tensor([long, short] * (count // 2))
            return TrainingBatch(torch.full((count, 5 + 6 * long), 7), torch.full((count,), 5), canvases)

    trainer = Trainer(copy_recipe(source=lambda *_: Mixed()), tmp_path)
    seen = []
    whole = trainer._losses
    trainer._losses = lambda tokens, *rest: seen.append(tokens.shape) or whole(tokens, *rest)  # type: ignore[assignment]
    trainer.train_step()
    assert seen == [(2, trainer_module.BUCKET), (2, 5 + 6 * long)]
