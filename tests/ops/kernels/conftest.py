"""Kernels run in a process of their own: whether Triton interprets is decided when it is first imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forks import python

ROOT = Path(__file__).parents[3]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def interpreted() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`interpreted("-m", "module", ...)`: a Python process on the CPU, with Triton's interpreter or (False) without.

    `bare`: one that has imported nothing yet.
    """

    def run(*arguments: str, interpret: bool = True, bare: bool = False) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if interpret else "0"}
        command = [*([sys.executable] if bare else python()), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="session")
def checked(interpreted: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[[str], Results]:
    """`checked("experts")`: what `python -m blockpress.bench.gpu check --part experts` says, by the checks' names."""
    kept: dict[str, Results] = {}

    def results(part: str) -> Results:
        if part not in kept:
            done = interpreted("-m", "blockpress.bench.gpu", "check", "--part", part)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            assert lines, done.stderr
            kept[part] = {line["name"]: line for line in lines}
        return kept[part]

    return results


COMPILED = (" 32 tokens", "attend sliding 256 rows", "attend full 256 rows")
COMPILED += ("multiply 256 rows", "head sample", "probabilities select")


@pytest.fixture(scope="session")
def compiled(interpreted: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[[str], list[str]]:
    """`compiled("head sample")`: the lines of `compile_check` on these kernels; one process for all that is asked."""
    done = interpreted("-m", "blockpress.bench.gpu.compile_check", *COMPILED, interpret=False)
    assert done.returncode == 0, done.stderr

    def lines(part: str) -> list[str]:
        assert part in COMPILED
        return [line for line in done.stdout.splitlines() if part in line]

    return lines
