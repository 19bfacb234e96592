"""The two commands: `check` (are the kernels correct) and `bench` (how far are they from the roofline).

Invariant: without a GPU, one line says so and the exit status is 2; `check` runs on a CPU if TRITON_INTERPRET=1 is set.
Run it:  make check-gpu; make bench-gpu PART=experts
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import torch

from blockpress.bench.gpu import PARTS, check
from blockpress.bench.gpu.report import GpuReport

NO_GPU = "no CUDA device here: run this on a machine with a GPU, or `check` with TRITON_INTERPRET=1 on the CPU"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: done, all correct; 1: a check failed; 2: there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m blockpress.bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["check", "bench"])
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--only", default="", help="check: only names that contain this")
    chosen = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if chosen.command == "check" and interpreted:
        torch.set_num_threads(1)
        return int(not check.run_checks(chosen.part or PARTS, torch.device("cpu"), chosen.only))
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if chosen.command == "check":
        return int(not check.run_checks(chosen.part or PARTS, torch.device("cuda"), chosen.only))
    reports = []
    for part in chosen.part or PARTS:
        report = GpuReport(part=part)
        importlib.import_module(f"blockpress.bench.gpu.{part}").bench(report)
        torch.cuda.empty_cache()
        reports.append(report)
    print("\n".join(report.table() for report in reports), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
