"""The experts' kernels on the CPU, through Triton's interpreter, and what the compiler makes of them for Hopper.

The checks themselves are those of the GPU harness (`blockpress/bench/gpu/experts.py`), each against `ops.experts.loop`
over unpacked weights: so a GPU runs the same ones, and larger ones.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from blockpress.bench.gpu.experts import checks

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter

SMALL = [check.name for check in checks() if not check.large]
REPORT = re.compile(
    r"^(?P<name>.*?) +(?P<registers>\d+) +(?P<spills>\d+) +\d+ +(?P<programs>\d+) +(?P<wgmma>\d+) +(?P<sync>\d+)$"
)


@pytest.mark.parametrize("name", SMALL)
def test_the_expert_kernels_equal_the_reference(name: str, checked: Callable[[str], dict[str, dict[str, Any]]]) -> None:
    line = checked("experts")[name]
    assert line["passed"], line


def test_the_checks_cover_every_format_and_routing() -> None:
    for kind in ("bfloat16", "e4m3", "int4 row", "int4 g32", "int4 g64", "nvfp4", "mxfp4"):
        for routing in ("uniform", "skewed", "one"):
            assert any(check.name.startswith(f"{kind} {routing} ") for check in checks())


def test_the_compiler_uses_the_matrix_unit_and_spills_nothing(compiled: Callable[[str], list[str]]) -> None:
    found = [match for line in compiled(" 32 tokens") if (match := REPORT.match(line))]
    assert len(found) == 16
    for match in found:
        assert int(match["spills"]) == 0, match["name"]
        assert int(match["wgmma"]) > 0 and int(match["sync"]) == 0, match["name"]
        assert int(match["programs"]) >= 1, match["name"]


def test_supported_weight_layouts(interpreted: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """On a CPU nothing suits; of the layouts, those with zero points or int8 codes go the plain way."""
    code = """
import torch
from blockpress.ops.kernels.experts import packing_of, supports
from tests.ops.layouts import LAYOUTS
print({name: packing_of(make((2, 64, 128), 0)) for name, make in LAYOUTS.items()})
x = torch.zeros(1, 8, dtype=torch.bfloat16)
with torch.no_grad():
    print(supports(x, torch.zeros(2, 8, 8, dtype=torch.bfloat16), torch.zeros(2, 8, 4, dtype=torch.bfloat16)))
"""
    done = interpreted("-c", code)
    assert done.returncode == 0, done.stderr
    kinds, takes = done.stdout.splitlines()
    taken = {
        "fp8": "e4m3",
        "int4": "int4",
        "int4 groups": "int4",
        "nvfp4": "nvfp4",
        "nvfp4 divided": "nvfp4",
        "mxfp4": "mxfp4",
    }
    assert {name: kind for name, kind in eval(kinds).items() if kind is not None} == taken
    assert takes == "False"


def test_importing_the_plain_version_imports_no_triton(
    interpreted: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = interpreted(
        "-c", "import sys, blockpress.ops.experts, blockpress.ops.kernels; print('triton' in sys.modules)"
    )
    assert done.stdout.split() == ["False"], done.stderr
