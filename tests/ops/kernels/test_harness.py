"""The GPU harness without a GPU: what it says, what it needs, and that the parts that it times are whole."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from blockpress.bench.gpu import PARTS, baseline, check, filled, steps
from blockpress.bench.gpu.report import GpuReport
from blockpress.config import PRESETS, ModelConfig

HIDDEN = ("jaxtyping", "typer", "rich", "jinja2", "PIL", "huggingface_hub", "beartype", "hypothesis", "pytest")
"""Not on a bare GPU machine."""

BARE = f"""
import runpy, sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name.split(".")[0] in {HIDDEN} else found(name, *rest))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.interpreter
@pytest.mark.parametrize("command", ["check", "bench"])
def test_without_a_gpu_the_harness_exits_with_one_line(command: str, interpreted: Run) -> None:
    done = interpreted("-m", "blockpress.bench.gpu", command, interpret=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no CUDA device" in done.stderr


@pytest.mark.interpreter
def test_checks_run_on_a_bare_machine(interpreted: Run) -> None:
    pytest.importorskip("triton")
    arguments = ["check", "--part", "experts", "--only", "bfloat16 one 2x64x320 tokens=3"]
    code = f"{BARE}sys.argv[1:] = {arguments}\nrunpy.run_module('blockpress.bench.gpu', run_name='__main__')"
    done = interpreted("-c", code, bare=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)["passed"] for line in done.stdout.splitlines()[:-1]][:1] == [True]


@pytest.mark.interpreter
def test_the_parts_import_on_a_bare_machine(interpreted: Run) -> None:
    names = [f"blockpress.bench.gpu.{part}" for part in PARTS]
    code = f"{BARE}import importlib\nfor name in {names}: importlib.import_module(name)\nprint('triton' in sys.modules)"
    done = interpreted("-c", code, interpret=False, bare=True)
    assert done.returncode == 0, done.stderr


def test_a_check_fails_by_nan_by_excess_and_by_raising(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(device: torch.device) -> float:
        raise ValueError("no")

    errors: list[tuple[Callable[[torch.device], float], bool]] = [
        (lambda device: 0.1, True), (lambda device: 0.3, False), (lambda device: float("nan"), False), (raises, False),
    ]  # fmt: skip
    checks = [check.KernelCheck(name="one", limit=0.2, error=error) for error, _ in errors]
    monkeypatch.setitem(sys.modules, "blockpress.bench.gpu.part", Mock(checks=lambda: checks))
    monkeypatch.setattr(torch, "set_deterministic_debug_mode", lambda _: None)
    assert not check.run_checks(["part"], torch.device("cpu"))
    *lines, total = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [passes for _, passes in errors]
    assert json.loads(lines[-1])["raised"] == "ValueError: no" and total == "1 of 4 checks passed"


def test_a_figure_is_printed_at_once_and_again_in_the_table() -> None:
    out = io.StringIO()
    report = GpuReport(part="experts", out=out)
    report.add("bf16", 0.5, "ms", floor=0.25)
    assert json.loads(out.getvalue()) == {
        "part": "experts", "name": "bf16", "value": 0.5, "unit": "ms", "floor": 0.25, "share": 0.5,
    }  # fmt: skip
    assert "50%" in report.table()


@pytest.fixture(scope="module")
def small() -> ModelConfig:
    return replace(PRESETS["tiny"](), expert_size=32)


@pytest.mark.parametrize("form", filled.EXPERTS)
def test_the_timed_step_gives_finite_numbers(form: str, small: ModelConfig) -> None:
    network = filled.filled(small, form, torch.device("cpu"))
    with torch.inference_mode():
        seen = steps.denoise_step(network, 2, 5)()
    assert seen.signal is not None and seen.signal.shape == (2 * small.canvas_length, small.hidden_size)
    assert bool(seen.entropy.isfinite().all()) and float(seen.signal.float().std()) > 0


@pytest.mark.parity
def test_the_baseline_step_gives_tokens(small: ModelConfig) -> None:
    pytest.importorskip("transformers")
    with torch.inference_mode():
        drawn = baseline.baseline_step(baseline.build(small, torch.device("cpu")), 2, 5)()
    assert drawn.shape == (2, small.canvas_length) and int(drawn.max()) < small.vocab_size
