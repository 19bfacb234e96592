"""Whether the kernels are correct: each check draws new inputs, runs a kernel and its plain version, and reports their
distance.

    {"part": "experts", "name": "bf16 uniform tokens=17", "error": 0.0021, "limit": 0.005, "passed": true}

An error is ||got - wanted|| / ||wanted||, or the number of wrong values where all must be exact. Outputs are filled
with NaN before a kernel runs, so that a value it does not write is detected.

Invariant: NaN passes no check, and a check that raises has failed.
Run it:  make check-gpu      on a CPU, small sizes: TRITON_INTERPRET=1 python -m blockpress.bench.gpu check
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KernelCheck:
    """`error(device)` must not exceed `limit`. `large`: too slow for the interpreter, so left out on a CPU."""

    name: str
    limit: float
    error: Callable[[torch.device], float]
    large: bool = False


def distance(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted|| in float64; NaN where `got` holds one.

    >>> distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    got, wanted = got.double().cpu(), wanted.double().cpu()
    assert got.shape == wanted.shape, f"{tuple(got.shape)} is not {tuple(wanted.shape)}"
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def different(got: Tensor, wanted: Tensor) -> float:
    """How many values differ.

    >>> different(torch.tensor([1, 2, 3]), torch.tensor([1, 3, 3]))
    1.0
    """
    assert got.shape == wanted.shape, f"{tuple(got.shape)} is not {tuple(wanted.shape)}"
    return float((got.cpu() != wanted.cpu()).sum())


def run_checks(parts: Iterable[str], device: torch.device, only: str = "") -> bool:
    """Run the checks of these parts whose names contain `only`, a line of JSON each; returns whether all passed."""
    # Uninitialised memory is filled with NaN; unlike `use_deterministic_algorithms` this imports no compiler.
    torch.set_deterministic_debug_mode("warn")
    if device.type == "cuda":  # other inputs every time; on a CPU, where tests run, always the same
        print(json.dumps({"seed": torch.seed()}), flush=True)
    else:
        torch.manual_seed(0)
    results = []
    for part in parts:
        for check in _checks(part):
            if only in check.name and not (check.large and device.type == "cpu"):
                results.append(_passes(part, check, device))
    print(f"{sum(results)} of {len(results)} checks passed", flush=True)
    return all(results)


def _checks(part: str) -> list[KernelCheck]:
    module = importlib.import_module(f"blockpress.bench.gpu.{part}")
    return module.checks() if hasattr(module, "checks") else []


def _passes(part: str, check: KernelCheck, device: torch.device) -> bool:
    line: dict[str, object] = {"part": part, "name": check.name}
    started = time.perf_counter()
    try:
        error = check.error(device)
    except Exception as reason:  # a check that raises must not stop the others
        print(json.dumps(line | {"passed": False, "raised": f"{type(reason).__name__}: {reason}"}), flush=True)
        return False
    passed = error <= check.limit
    print(
        json.dumps(
            line
            | {
                "error": float(f"{error:.3g}"),
                "limit": check.limit,
                "passed": passed,
                "seconds": round(time.perf_counter() - started, 2),
            }
        ),
        flush=True,
    )
    return passed
