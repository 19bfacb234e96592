"""`blockpress bench` on the smallest model: every mode, every figure there, and what is wrong said by name."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from blockpress.bench import ceilings
from blockpress.cli.sweep import CARDS, FORMATS
from blockpress.costs import DEVICES, WIDTHS

from .conftest import Call

TINY = ["bench", "--preset", "tiny", "--prompt-len", "8", "--max-tokens", "12", "--threads", "1"]
FIELDS = {
    "model", "random_weights", "dtype", "compute_dtype", "workload", "soft_embedding", "answered", "failed", "refused", "errors", "solved", "seconds", "requests_per_second",
    "forwards", "canvases", "steps", "tokens", "prefill_ms", "forward_ms", "steps_per_canvas", "tokens_per_forward",
    "tokens_per_second", "tokens_per_second_user", "first_canvas_ms", "weight_bytes", "peak_bytes", "page_bytes", "step_bytes",
    "byte_share", "arithmetic_share", "floor_share", "machine",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)


def told(call: Call, *more: object) -> dict[str, Any]:
    done = call(*TINY, "--json", *more)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_diffusion_is_measured_with_a_fixed_number_of_steps(call: Call) -> None:
    said = told(call, "--steps", 3, "--batch", 2, "--max-tokens", 24)
    assert set(said) == FIELDS and said["random_weights"] is True
    assert (said["answered"], said["tokens"], said["canvases"], said["steps"], said["forwards"]) == (2, 48, 4, 12, 6)
    assert said["steps_per_canvas"] == {"mean": 3.0, "p50": 3.0, "p95": 3.0}
    assert said["tokens_per_forward"] == pytest.approx(24 / 7)  # the commit counts, though it shares a forward
    assert 0 < said["byte_share"] <= said["floor_share"] and said["machine"]["bytes_per_second"] > 0
    assert said["tokens_per_second"] == pytest.approx(48 / said["seconds"])
    assert said["prefill_ms"] <= said["forwards"] * said["forward_ms"]["mean"] <= 1000 * said["seconds"]


def test_adaptive_autoregressive_and_verified_modes_are_measured(call: Call) -> None:
    adaptive = told(call, "--soft-embedding", "sparse")
    assert 1 <= adaptive["steps"] == adaptive["forwards"] <= 48 and adaptive["soft_embedding"] == "sparse"
    token = told(call, "--mode", "autoregressive", "--dtype", "bfloat16")
    assert (token["tokens"], token["forwards"], token["steps"], token["dtype"]) == (12, 12, 0, "bfloat16")
    assert token["tokens_per_forward"] == 1
    verified = told(call, "--mode", "verified", "--steps", 2)
    assert verified["steps"] >= 2 and verified["tokens"] == 12 and verified["answered"] == 1


def test_storage_and_compute_types_are_reported(call: Call) -> None:
    types = ["--dtype", "bfloat16", "--compute-dtype", "float32"]
    said = told(call, "--steps", 2, *types)
    assert (said["dtype"], said["compute_dtype"]) == ("bfloat16", "float32")
    whole, narrow = (told(call, "--steps", 2, *more) for more in (types[2:], (*types[:3], "bfloat16")))
    assert (whole["dtype"], narrow["compute_dtype"]) == ("float32", "bfloat16")
    # Norms and scalars alone are widened.
    assert narrow["weight_bytes"] < said["weight_bytes"] < 0.6 * whole["weight_bytes"]
    assert "tiny in bfloat16, computed in float32, random weights" in call(*TINY, "--steps", 2, *types).out


@pytest.mark.parametrize("online", [["--rate", "1000"], ["--concurrency", "2"]], ids=" ".join)
def test_online_load_is_measured(call: Call, online: list[str]) -> None:
    said = told(call, "--steps", 2, "--requests", 3, *online)
    assert said["answered"] == 3 and said["tokens"] == 36 and said["first_canvas_ms"]["p95"] > 0


def test_the_shipped_model_is_asked_puzzles(call: Call) -> None:
    done = call("bench", "sudoku-nano", "--threads", 1, "--batch", 2)
    assert (
        done.code == 0
        and "2 answered, 2 of them solved" in done.out
        and "its own weights; puzzles, 90 tokens" in done.out.splitlines()[0]
    )
    names = ["machine", "requests", "prefill", "forward", "steps", "tokens", "speed", "first", "memory", "of"]
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == names


def test_a_config_gives_the_shape(call: Call, untrained: Path) -> None:
    done = call("bench", "--config", untrained / "config.json", "--steps", 1, "--max-tokens", 5, "--prompt-len", 4)
    assert done.code == 0 and "random weights, which write noise" in done.out


# Torch's own, where `transformers` first asks it for a compiler.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("rival", ["reference", "transformers"])
def test_a_rival_is_measured_in_turns(call: Call, rival: str) -> None:
    said = told(call, "--steps", 2, "--against", rival, "--rounds", 2)
    assert said["against"].startswith(rival) and said["steps"] == 2
    assert len(said["ours_seconds"]) == len(said["theirs_seconds"]) == 2
    assert said["ratio"] == pytest.approx(min(said["theirs_seconds"]) / min(said["ours_seconds"]))
    assert said["ours_step_ms"]["min"] == pytest.approx(1000 * min(said["ours_seconds"]) / 2)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_rival_runs_in_the_given_type(call: Call) -> None:
    types = ["--dtype", "bfloat16", "--compute-dtype", "float32"]
    for more, wanted in (([], "bfloat16"), (["--against-dtype", "float32"], "float32")):
        said = told(call, "--steps", 1, "--rounds", 1, "--against", "transformers", *types, *more)
        assert said["against"].endswith(f" in {wanted}") and said["compute_dtype"] == "float32"


def test_missing_transformers_is_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = call(*TINY, "--steps", 1, "--against", "transformers")
    assert done.code == 2 and "needs a transformers" in done.err and "pip install" in done.err


def test_without_matplotlib_a_sweep_is_refused_before_it_measures(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("blockpress.cli.sweep._measured", lambda *_: pytest.fail("it measures"))
    done = call("bench", "--preset", "tiny", "--sweep", "--out", tmp_path / "x.svg")
    assert done.code == 2 and "matplotlib" in done.err and "pip install 'blockpress[bench]'" in done.err


def test_a_sweep_is_drawn_and_printed(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "sweep.svg"
    given = ["bench", "--preset", "tiny", "--sweep", "--out", out, "--device", "cpu", "--device", "h200", "--json"]
    done = call(*given, "--users", "1,2", "--steps", 5)
    assert done.code == 0, done.err
    panels = json.loads(done.out)["panels"]
    assert [panel["title"].split(",")[-1] for panel in panels] == [" measured", " roofline"]
    assert set(panels[0]["curves"]) == {"diffusion", "autoregressive", "diffusion, floor", "autoregressive, floor"}
    assert all(set(curve) == {"1", "2"} and min(curve.values()) > 0 for p in panels for curve in p["curves"].values())
    said = "".join(ET.parse(out).getroot().itertext())
    for speed in panels[0]["curves"]["diffusion"].values():
        assert f"{speed:.4g}" in said


BAD = {
    "no model": (["bench"], "no model is given"),
    "two models": (["bench", "sudoku-nano", "--preset", "tiny"], "--preset is given with MODEL"),
    "no such preset": (["bench", "--preset", "tinny"], "'tinny'"),
    "no such config": (["bench", "--config", "absent.json"], "absent.json cannot be read"),
    "no steps": ([*TINY, "--steps", "0"], "--steps is 0"),
    "steps in words": ([*TINY, "--steps", "many"], "--steps is many"),
    "a batch of 0": ([*TINY, "--batch", "0"], "--batch is 0"),
    "a batch online": ([*TINY, "--rate", "3", "--batch", "2"], "--batch is given with --rate"),
    "an unknown mode": ([*TINY, "--mode", "quick"], "--mode is quick"),
    "steps token by token": ([*TINY, "--mode", "autoregressive", "--steps", "3"], "--steps is given"),
    "an unknown rival": ([*TINY, "--steps", "2", "--against", "vllm"], "--against is 'vllm'"),
    "a rival and adaptive steps": ([*TINY, "--against", "reference"], "both must run the same steps"),
    "a rival and requests": (
        [*TINY, "--steps", "2", "--against", "reference", "--requests", "3"],
        "--requests is given",
    ),
    "a type of nothing": ([*TINY, "--against-dtype", "float32"], "--against-dtype is given without --against"),
    "a type of the reference loop": (
        [*TINY, "--steps", "2", "--against", "reference", "--against-dtype", "float32"],
        "the very same network",
    ),
    "a type that there is not": (
        [*TINY, "--steps", "2", "--against", "transformers", "--against-dtype", "int3"],
        "--against-dtype is 'int3'",
    ),
    "arithmetic that rounds weights": ([*TINY, "--compute-dtype", "bfloat16"], "does not hold the weights in float32"),
    "rounds of nothing": ([*TINY, "--rounds", "3"], "--rounds is given without --against"),
    "an unknown embedding": ([*TINY, "--soft-embedding", "soft"], "--soft-embedding is 'soft'"),
    "puzzles for a random model": ([*TINY[:3], "--prompts", "sudoku"], "--prompts is sudoku"),
    "a card without a sweep": ([*TINY, "--device", "h100"], "--device is h100"),
    "an unknown device": ([*TINY, "--device", "abacus"], "abacus"),
    "a picture of nothing": ([*TINY, "--out", "x.svg"], "--out is given without --sweep"),
    "a sweep to nowhere": (["bench", "--sweep", "--device", "h100"], "--sweep is given without --out"),
    "a sweep of one mode": (["bench", "--sweep", "--mode", "diffusion"], "--mode is given with --sweep"),
    "a sweep of no format": (["bench", "--sweep", "--format", "int3", "--out", "x.svg"], "--format is 'int3'"),
    "users that shrink": (["bench", "--sweep", "--users", "4,2", "--out", "x.svg"], "--users is 4,2"),
    "a model for a card": (["bench", "sudoku-nano", "--sweep", "--device", "h100", "--out", "x.svg"], "MODEL is given"),
    "a type for a card": (
        ["bench", "--sweep", "--device", "h100", "--dtype", "bfloat16", "--out", "x.svg"],
        "--dtype is",
    ),
    "a folder for a picture": (["bench", "--sweep", "--device", "h100", "--out", "."], "--out is ., a folder"),
    "a prompt beyond the context": ([*TINY, "--prompt-len", "255"], "--prompt-len is 255"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[name]
    done = call(*arguments)
    assert done.code == 2 and not done.out, done
    assert expected in done.err and "(hint: " in done.err and len(done.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_names_of_the_options_are_those_of_the_figures() -> None:
    assert set(CARDS) == set(DEVICES) and set(FORMATS) == set(WIDTHS)
