"""`blockpress doctor`: whether this machine can run blockpress, found out by doing it.

Invariant: every line is ok, warn or fail, and one that is not ok says what to do. A check that breaks is a failed
check, never the end of the others.

Run it:  blockpress doctor
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from blockpress.cli import options, paths
from blockpress.cli.checks import DRIFT, Check
from blockpress.errors import BlockpressError

if TYPE_CHECKING:
    from blockpress.lm import LM

PUZZLE = "500678000600005300008300567809061420400800791703920000901537004280019600345086079"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
NEEDED = 1 << 30  # bytes that torch and the shipped model take, with room to breathe


def doctor(json: options.Json = False, device: options.Device = "cpu") -> None:
    """Check that this machine is ready.

    Looks at Python, torch, processors and memory, loads the shipped models, solves a fixed puzzle, and compares the
    fast ways of this machine with the plain ones on a few numbers. The exit code is 1 if something fails.

    \b
    Examples:
      blockpress doctor
      blockpress doctor --device cuda --json
    """
    options.check_device(device)
    checks = []
    for check in examine(device):
        checks.append(check)
        if not json:
            hint = f"   (hint: {check.hint})" if check.hint else ""
            print(f"{check.status:5} {check.name:12} {check.detail}{hint}", flush=True)
    failed = any(check.status == "fail" for check in checks)
    if json:
        options.print_json({"ready": not failed, "checks": [asdict(check) for check in checks]})
    if failed:
        raise typer.Exit(1)


def examine(device: str = "cpu") -> Iterator[Check]:
    """All checks, in order, each as soon as it is known."""
    tests: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("processor", _processor),
        ("cuda", _cuda),
        ("memory", _memory),
        ("models", lambda: _models(device)),
        ("native", paths.native),
        ("paths", lambda: paths.agreement(device)),
        ("parts", _parts),
    ]
    for name, test in tests:
        try:
            yield from test()
        except BlockpressError as error:
            yield Check(name, "fail", error.message, error.hint)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            yield Check(name, "fail", text, "install blockpress afresh; if that does not help, report this line")


def _python() -> Iterator[Check]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "fail", detail, "" if good else "install Python 3.11 or newer")


def _torch() -> Iterator[Check]:
    import torch

    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _processor() -> Iterator[Check]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    known = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in known.items()}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    name = values.get("model name") or platform.processor() or "unnamed"
    fast = [flag for flag in FLAGS if flag in flags]
    yield Check("processor", "ok", f"{os.cpu_count()} cores of {name}; {', '.join(fast) or 'no flags known'}")


def _cuda() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("cuda", "ok", "no GPU: everything runs on the processor")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        detail = f"cuda:{index} is {torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} free"
        yield Check("cuda", "ok", detail)


def _memory() -> Iterator[Check]:
    info = Path("/proc/meminfo")
    if not info.is_file():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield Check("memory", "ok", f"{_gib(total)} in all")
        return
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    enough = free >= NEEDED
    hint = "" if enough else f"close other programs: the shipped model wants {_gib(NEEDED)}"
    yield Check("memory", "ok" if enough else "warn", f"{_gib(free)} of {_gib(total)} free", hint)


def _models(device: str) -> Iterator[Check]:
    from blockpress.lm import load
    from blockpress.weights import resolve, shipped

    for name in shipped():
        lm = load(name, device=device)
        count = sum(parameter.numel() for parameter in lm.network.parameters())
        yield Check("model", "ok", f"{name} loads: {count:,} parameters in {str(lm.network.dtype)[6:]}")
    lm = load(resolve(options.SHIPPED), device=device)
    yield _solves(lm)
    yield _agrees(lm)
    yield paths.engine(lm, PUZZLE)


def _solves(lm: LM) -> Check:
    """The whole path on a fixed easy puzzle, and how long a forward takes."""
    from blockpress.cli.sudoku import answer

    answer(lm, [PUZZLE], lm.generation.sampling)  # the first run of a process pays for allocations
    begun = time.perf_counter()
    done = answer(lm, [PUZZLE], lm.generation.sampling)[0]
    speed = 1000 * (time.perf_counter() - begun) / (done.forwards + 1)
    hint = "" if done.solved else "the model's files may be damaged: install blockpress afresh"
    return Check("puzzle", "ok" if done.solved else "fail", f"{done.verdict}, {speed:.1f} ms a forward", hint)


def _agrees(lm: LM) -> Check:
    """Plain and fused attention on one canvas, as a relative difference of the logits."""
    from blockpress import sudoku
    from blockpress.ops import attention

    prompt = lm.encode(sudoku.layout(PUZZLE))
    canvas = [token % lm.config.vocab_size for token in range(lm.config.canvas_length)]
    kept, logits = lm.network.attention_op, []
    try:
        for op in (attention.plain, attention.fused):
            lm.network.attention_op = op
            logits.append(lm.denoise_logits(prompt, canvas).double())
    finally:
        lm.network.attention_op = kept
    plain, fused = logits
    difference = float((plain - fused).norm() / plain.norm())
    good = difference <= DRIFT
    hint = "" if good else f"this torch computes attention wrongly on {lm.network.device}: install another version"
    detail = f"plain and fused attention differ by {difference:.1e} (relative)"
    return Check("numbers", "ok" if good else "fail", detail, hint)


def _parts() -> Iterator[Check]:
    compiler = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    hint = "" if compiler else "install g++ to train faster (torch.compile)"
    yield Check("compiler", "ok" if compiler else "warn", compiler or "no C++ compiler", hint)
    for package, use in (("transformers", "the oracle of the tests"), ("triton", "kernels for GPUs")):
        try:
            yield Check(package, "ok", f"{metadata.version(package)}: {use}")
        except metadata.PackageNotFoundError:
            yield Check(package, "ok", f"not installed, and not needed: {use}")


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
