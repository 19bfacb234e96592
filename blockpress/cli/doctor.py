"""`blockpress doctor`: whether this machine can run blockpress, tested by running it.

Invariant: every line is ok, warn or fail, and one that is not ok says what to do. A check that raises is a failed
check; the others still run.

Run it:  blockpress doctor
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING

import typer

from blockpress.cli import options, parity
from blockpress.cli.checks import DRIFT, DoctorCheck
from blockpress.errors import BlockpressError, one_line

if TYPE_CHECKING:
    from blockpress.lm import LM

PUZZLE = "500678000600005300008300567809061420400800791703920000901537004280019600345086079"
NEEDED = 1 << 30  # bytes that torch and the shipped model take, with some margin


def doctor(json: options.Json = False, device: options.Device = "cpu") -> None:
    """Check that this machine is ready.

    Looks at Python, torch, the processor, its speed in each type, and memory, loads the shipped models, solves a fixed
    puzzle, and compares the fast paths of this machine with the plain versions on random numbers. The exit code is 1 if
    something fails.

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


def examine(device: str = "cpu") -> Iterator[DoctorCheck]:
    """All checks, in order, each as soon as it is known."""
    tests: list[tuple[str, Callable[[], Iterator[DoctorCheck]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("processor", _processor),
        ("products", _products),
        ("cuda", _cuda),
        ("memory", _memory),
        ("models", lambda: _models(device)),
        ("native", parity.native),
        ("paths", lambda: parity.agreement(device)),
        ("parts", _parts),
    ]
    for name, test in tests:
        try:
            yield from test()
        except BlockpressError as error:
            yield DoctorCheck(name, "fail", error.message, error.hint)
        except Exception as error:
            hint = "install blockpress afresh; if that does not help, report this line"
            yield DoctorCheck(name, "fail", one_line(error), hint)


def _python() -> Iterator[DoctorCheck]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 11)
    yield DoctorCheck("python", "ok" if good else "fail", detail, "" if good else "install Python 3.11 or newer")


def _torch() -> Iterator[DoctorCheck]:
    import torch

    yield DoctorCheck("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _processor() -> Iterator[DoctorCheck]:
    from blockpress.hardware import isa, processor

    here, level = processor(), isa()
    detail = f"{here.cores} cores of {here.name}, ISA level {level}"
    if level != here.isa:
        detail += f", lowered from {here.isa} by BLOCKPRESS_ISA"
    if level == "neon":
        detail += "; the authors have not run this level: trust the lines below"
    yield DoctorCheck("processor", "ok", detail)


def _products() -> Iterator[DoctorCheck]:
    """How fast this processor multiplies in each dtype, and the dtype that bfloat16 weights are computed in."""
    import torch

    from blockpress.hardware import compute_dtype, float32_way, remeasure

    rates, method = remeasure(), float32_way()
    library = "oneDNN" if method == "onednn" else "MKL" if torch.backends.mkl.is_available() else "BLAS"
    parts = [f"float32 {rates.of(method):.0f} GFLOP/s by {library}"]
    parts += [f"{name} {rates.of(name):.0f}" for name in ("bfloat16", "float16", "int8") if rates.of(name)]
    computed_in = str(compute_dtype(torch.bfloat16, torch.device("cpu"))).removeprefix("torch.")
    threads = torch.get_num_threads()
    detail = (
        f"{', '.join(parts)} on {threads} thread{'s' * (threads > 1)}; reads {rates.reading:.0f} GB/s; "
        f"bfloat16 weights are computed in {computed_in}"
    )
    yield DoctorCheck("products", "ok", detail)


def _cuda() -> Iterator[DoctorCheck]:
    from blockpress.hardware import cards

    gpus = cards()
    if not gpus:
        yield DoctorCheck("cuda", "ok", "no GPU: everything runs on the processor")
    for card in gpus:
        yield DoctorCheck("cuda", "ok", f"{card.device} is {card.name}, {_gib(card.free)} of {_gib(card.total)} free")


def _memory() -> Iterator[DoctorCheck]:
    from blockpress.hardware import main_memory

    free, total = main_memory()
    enough = free >= NEEDED
    hint = "" if enough else f"close other programs: the shipped model wants {_gib(NEEDED)}"
    yield DoctorCheck("memory", "ok" if enough else "warn", f"{_gib(free)} of {_gib(total)} free", hint)


def _models(device: str) -> Iterator[DoctorCheck]:
    from blockpress.checkpoints import shipped
    from blockpress.lm import load

    small = None
    for name in shipped():
        lm = load(name, device=device)
        count = sum(parameter.numel() for parameter in lm.network.parameters())
        yield DoctorCheck("model", "ok", f"{name} loads: {count:,} parameters in {str(lm.network.dtype)[6:]}")
        small = lm if name == options.SHIPPED else small
    lm = load(options.SHIPPED, device=device) if small is None else small
    yield _solves(lm)
    yield _agrees(lm)
    yield parity.engine(lm, PUZZLE)


def _solves(lm: LM) -> DoctorCheck:
    """The whole path on a fixed easy puzzle, and the time of a forward."""
    from blockpress.cli.sudoku import answer

    answer(lm, [PUZZLE], lm.generation.sampling)  # the first run of a process pays for allocations
    started = time.perf_counter()
    result = answer(lm, [PUZZLE], lm.generation.sampling)[0]
    speed = 1000 * (time.perf_counter() - started) / (result.forwards + 1)
    hint = "" if result.solved else "the model's files may be damaged: install blockpress afresh"
    return DoctorCheck("puzzle", "ok" if result.solved else "fail", f"{result.verdict}, {speed:.1f} ms a forward", hint)


def _agrees(lm: LM) -> DoctorCheck:
    """Plain and fused attention on one canvas: the relative difference of the logits."""
    from blockpress import sudoku
    from blockpress.ops import attention

    prompt = lm.encode(sudoku.layout(PUZZLE))
    canvas = [token % lm.config.vocab_size for token in range(lm.config.canvas_length)]
    original, logits = lm.network.attention_op, []
    try:
        for op in (attention.plain, attention.fused):
            lm.network.attention_op = op
            logits.append(lm.denoise_logits(prompt, canvas).double())
    finally:
        lm.network.attention_op = original
    plain, fused = logits
    difference = float((plain - fused).norm() / plain.norm())
    good = difference <= DRIFT
    hint = "" if good else f"this torch computes attention wrongly on {lm.network.device}: install another version"
    detail = f"plain and fused attention differ by {difference:.1e} (relative)"
    return DoctorCheck("numbers", "ok" if good else "fail", detail, hint)


def _parts() -> Iterator[DoctorCheck]:
    from blockpress.ops.compiled import compiler as find_compiler

    compiler = find_compiler()
    hint = "" if compiler else "install g++ to train faster (torch.compile)"
    yield DoctorCheck("compiler", "ok" if compiler else "warn", compiler or "no C++ compiler", hint)
    for package, use in (("transformers", "the oracle of the tests"), ("triton", "kernels for GPUs")):
        try:
            yield DoctorCheck(package, "ok", f"{metadata.version(package)}: {use}")
        except metadata.PackageNotFoundError:
            yield DoctorCheck(package, "ok", f"not installed, and not needed: {use}")


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
