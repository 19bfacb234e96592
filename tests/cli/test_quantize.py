"""`blockpress quantize` and `blockpress synthesize`: what they write, print, report and refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blockpress.checkpoints import resolve, save_checkpoint
from blockpress.config import PRESETS, GenerationConfig
from blockpress.quantize.convert import REPORT
from tests.conftest import make_random_network

from .conftest import Call


def test_a_model_is_written_and_its_errors_are_printed(call: Call, tmp_path: Path) -> None:
    done = call("quantize", "sudoku-nano", tmp_path / "out", "--format", "int8", "--no-report")
    assert done.code == 0, done.err
    assert "sudoku-nano in int8: 4.7 MiB -> 2.4 MiB" in done.out
    for kind in ("attention", "dense MLP", "experts", "self-conditioning"):
        assert kind in done.out
    assert done.out.count("model.decoder.layers") >= 8 and "\x1b" not in done.out
    assert "report" not in json.loads((tmp_path / "out" / REPORT).read_text())


@pytest.mark.slow
def test_the_report_compares_both_models(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("quantize", "sudoku-nano", out, "--format", "int8", "--samples", 2, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    report = said["report"]
    assert report == json.loads((out / REPORT).read_text())["report"]
    assert (report["prompts"], report["prompt_kind"], report["seed"]) == (2, "puzzles", 0)
    assert 0 < report["first"]["kl"] < 0.01 and 0 < report["second"]["kl"] < 0.05
    assert report["first"]["agreement"] > 0.9 and report["tokens_same"] > 0.5
    assert 0 <= report["solved_changed"] <= 2 and report["steps_original"] > 1
    printed = call("quantize", "sudoku-nano", out, "--format", "fp8", "--samples", 2).out
    for words in ("2 prompts (puzzles)", "step 1: KL", "step 2: KL", "steps to settle", "puzzles solved"):
        assert words in printed


@pytest.mark.slow
def test_prompts_come_from_a_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("123456789\n\n000000000\n")
    done = call(
        "quantize", "sudoku-nano", tmp_path / "out", "--format", "fp8", "--json", "--prompts", tmp_path / "prompts"
    )
    report = json.loads(done.out)["report"]
    assert report["prompts"] == 2 and report["prompt_kind"] == "given" and "solved_original" not in report


def test_a_model_without_a_tokenizer_is_asked_in_token_ids(call: Call, tmp_path: Path) -> None:
    assert call("synthesize", "tiny", tmp_path / "random").code == 0
    done = call("quantize", tmp_path / "random", tmp_path / "out", "--format", "fp8", "--samples", 2, "--json")
    assert json.loads(done.out)["report"]["prompt_kind"] == "random token ids"


def test_without_enough_memory_the_report_is_left_out(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockpress.hardware.free_memory", lambda: {"cpu": 1000})
    done = call("quantize", "sudoku-nano", tmp_path / "out", "--format", "fp8")
    assert done.code == 0 and "no report: " in done.err and "1000 bytes are free" in done.err
    assert (tmp_path / "out" / "model.safetensors").is_file() and "KL" not in done.out


def test_a_model_without_a_canvas_is_written_and_not_compared(call: Call, tmp_path: Path) -> None:
    config = replace(PRESETS["tiny"](), family="gemma4", canvas_length=1)
    save_checkpoint(tmp_path / "gemma", make_random_network(config), generation=GenerationConfig(has_canvas=False))
    done = call("quantize", tmp_path / "gemma", tmp_path / "out", "--format", "int8", "--json")
    assert done.code == 0 and "no report: " in done.err and "gemma4 has none" in done.err
    assert json.loads(done.out)["report"] is None and "report" not in json.loads(
        (tmp_path / "out" / REPORT).read_text()
    )
    (tmp_path / "prompts").write_text("1")
    asked = ("--format", "int8", "--prompts", tmp_path / "prompts")
    refused = call("quantize", tmp_path / "gemma", tmp_path / "other", *asked)
    assert refused.code == 2 and "--prompts" in refused.err and not (tmp_path / "other").exists()


def test_prompts_need_a_tokenizer_before_anything_is_written(call: Call, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("1")
    assert call("synthesize", "tiny", tmp_path / "random").code == 0
    asked = ("--format", "int8", "--prompts", tmp_path / "prompts")
    done = call("quantize", tmp_path / "random", tmp_path / "out", *asked)
    assert done.code == 2 and "no tokenizer.json" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "q4"), ("q4", "fp8, int8, nvfp4, int4")),
        (("--format", "fp8", "--group", 32), ("group is 32", "only int4")),
        (("--format", "fp8", "--samples", 0), ("--samples is 0",)),
        (("--format", "fp8", "--prompts", "missing.txt"), ("missing.txt",)),
        (("--format", "fp8", "--no-report", "--prompts", "x"), ("--prompts", "--no-report")),
        (("--format", "fp8", "--no-report", "--samples", 3), ("--samples", "--no-report")),
        (("--format", "fp8", "--no-report", "--seed", 0), ("--seed", "--no-report")),
        (("--format", "fp8", "--no-report", "--device", "cpu"), ("--device", "--no-report")),
        (("--format", "fp8", "--prompts", "missing.txt", "--samples", 3), ("--samples", "--prompts")),
        (("--format", "int4", "--keep", "*"), ("would become smaller",)),
        ((), ("--format",)),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(
    arguments: tuple[object, ...], words: tuple[str, ...], call: Call, tmp_path: Path
) -> None:
    done = call("quantize", "sudoku-nano", tmp_path / "out", *arguments)
    assert done.code == 2 and all(word in done.err for word in words)
    assert not (tmp_path / "out").exists()


def test_the_output_must_not_be_the_input(call: Call) -> None:
    assert "itself" in call("quantize", "sudoku-nano", resolve("sudoku-nano"), "--format", "fp8").err


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "nvfp4", "int4"])
def test_random_checkpoints_are_written_in_every_format(form: str, call: Call, tmp_path: Path) -> None:
    done = call("synthesize", "sudoku-nano", tmp_path / "out", "--format", form, "--layers", 2, "--seed", 4, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["format"], said["seed"], said["path"]) == (form, 4, str(tmp_path / "out"))
    shown = call("ls", "--json")
    assert shown.code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == (form != "bf16") and config["synthetic"]["seed"] == 4


def test_synthesize_refuses_by_name(call: Call, tmp_path: Path) -> None:
    for arguments, word in ((("huge",), "huge"), (("tiny", "--format", "q4"), "q4"), (("tiny", "--layers", 9), "9")):
        done = call("synthesize", arguments[0], tmp_path / "out", *arguments[1:])
        assert done.code == 2 and word in done.err and not (tmp_path / "out").exists()
