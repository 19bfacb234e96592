"""`blockpress doctor`: each line has a verdict, and a fault is found and does not end the others."""

from __future__ import annotations

import json

import pytest
import torch

from blockpress import sudoku
from blockpress.cli import doctor, parity
from blockpress.lm import LM, load
from blockpress.ops import attention, compiled, experts, integers, spans, vocabulary

from .conftest import Call


def test_this_machine_is_ready_and_its_fast_paths_are_compared(call: Call) -> None:
    done = call("doctor")
    lines = done.out.splitlines()
    assert done.code == 0 and all(line.split()[0] in ("ok", "warn") for line in lines)
    for name in ("python", "torch", "processor", "cuda", "memory", "model", "puzzle", "numbers", "compiler"):
        assert any(line.split()[1] == name for line in lines), name
    assert "ms a forward" in done.out and "differ by" in done.out
    found = worst(done.out)
    assert [found[name] for name in ("engine", "vocabulary", "experts", "spans", "integers")] == ["ok"] * 5


def test_wrong_attention_is_a_failed_check(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = attention.fused
    # A wrong scale of the output alone would be normed away.
    monkeypatch.setattr(attention, "fused", lambda query, *given: fused(1.01 * query, *given))
    done = call("doctor", "--json")
    said = json.loads(done.out)
    assert done.code == 1 and said["ready"] is False
    (broken,) = [check for check in said["checks"] if check["status"] == "fail"]
    assert broken["name"] == "numbers" and "install another version" in broken["hint"]


def test_a_check_that_breaks_is_a_failed_check(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LM, *given: object) -> torch.Tensor:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(LM, "denoise_logits", fail)
    done = call("doctor")
    assert done.code == 1 and "fail  models       RuntimeError: no luck   (hint: " in done.out
    assert "compiler" in done.out


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", 1 << 60)
    memory = next(check for check in doctor.examine() if check.name == "memory")  # before those that take long
    assert memory.status == "warn" and "close other programs" in memory.hint


def test_the_fixed_puzzle_has_one_solution() -> None:
    assert sudoku.count_solutions(doctor.PUZZLE) == 1


def worst(said: str) -> dict[str, str]:
    """The status of each check that was printed, the worst where there are several of a name."""
    found: dict[str, str] = {}
    for line in said.splitlines():
        status, name = line.split()[:2]
        found[name] = status if found.get(name, "ok") == "ok" else found[name]
    return found


def test_a_wrong_fast_path_fails_and_is_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    mix, look, see, product = (
        experts.moe_forward,
        spans.varlen_attention,
        vocabulary.sample_from_hidden,
        integers.matmul,
    )
    monkeypatch.setattr(integers, "matmul", lambda x, weight: 1.001 * product(x, weight))
    monkeypatch.setattr(experts, "moe_forward", lambda x, weights, *given: mix(x, 1.05 * weights, *given))
    monkeypatch.setattr(spans, "varlen_attention", lambda query, given: look(1.05 * query, given))
    monkeypatch.setattr(vocabulary, "sample_from_hidden", lambda x, weight, **given: see(1.05 * x, weight, **given))
    found = worst(call("doctor").out)
    assert [found[name] for name in ("vocabulary", "experts", "spans", "integers")] == ["fail"] * 4


def test_a_differing_engine_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load("sudoku-nano")
    assert parity.engine(lm, doctor.PUZZLE).status == "ok"
    see = vocabulary.sample_from_hidden
    monkeypatch.setattr(vocabulary, "sample_from_hidden", lambda x, weight, **given: see(-x, weight, **given))
    done = parity.engine(lm, doctor.PUZZLE)
    assert done.status == "fail" and "other tokens" in done.detail and "BLOCKPRESS_NATIVE" in done.hint


def test_without_a_compiler_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda name: None)
    (told,) = parity.native()
    assert told.status == "warn" and "by torch alone: there is no C++ compiler" in told.detail and "g++" in told.hint
