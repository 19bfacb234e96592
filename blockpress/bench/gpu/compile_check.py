"""Compiled kernels inspected without a GPU: registers, spills, shared memory, matrix instructions.

    kernel                      registers  spills  shared  wgmma  mma.sync
    gate_up bfloat16 32 tokens        128       0    160K     16         0

A kernel whose matrix instructions are `mma.sync`, or that spills, is slower than its floor; both show here and in no
test of values. Kernels are compiled for Hopper at the published model's sizes.

Invariant: runs in a process without TRITON_INTERPRET.

Run it:  python -m blockpress.bench.gpu.compile_check [PARTS OF NAMES]
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blockpress.bench.gpu.variants import Variant, variants

TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One compiled kernel: registers a thread, bytes spilled, bytes of shared memory, instructions of each kind."""

    registers: int
    spills: int
    shared: int
    wgmma: int
    mma_sync: int
    warps: int

    @property
    def programs(self) -> int:
        """Programs resident on a multiprocessor of 65,536 registers and 227 KiB."""
        return min(65536 // max(1, self.registers * 32 * self.warps), (227 << 10) // max(1, self.shared + 1024), 16)


def compile_for(variant: Variant) -> Resources:
    """Compile for Hopper and read the assembler's report."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=divisible)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    with redirect_stdout(io.StringIO()) as log, triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=TARGET, options=options)
    text = compiled.asm["ptx"]
    report = log.getvalue() or _assemble(text)  # what Triton has kept from another time was not assembled now
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill", report)]
    return Resources(
        registers=int(re.findall(r"Used (\d+) registers", report)[0]),
        spills=sum(spills),
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", text)),
        mma_sync=len(re.findall(r"\bmma\.sync", text)),
        warps=variant.warps,
    )


def _assemble(text: str) -> str:
    """The report on a kernel of the assembler that comes with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(text, encoding="utf-8")
        command = [str(program), "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(directory) / "kernel.cubin")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def main(*wanted: str) -> None:
    """Print a line for every kernel whose name contains one of these strings; without any, for all."""
    print(f"{'kernel':40} registers  spills   shared  programs  wgmma  mma.sync")
    for variant in variants():
        if wanted and not any(part in variant.name for part in wanted):
            continue
        got = compile_for(variant)
        figures = f"{got.registers:9} {got.spills:7} {got.shared:8} {got.programs:9} {got.wgmma:6} {got.mma_sync:9}"
        print(f"{variant.name:40} {figures}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
