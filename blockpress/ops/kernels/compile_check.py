"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, matrix instructions.

    kernel                      registers  spills  shared  wgmma  mma.sync
    gate_up bfloat16 32 tokens        128       0    160K     16         0

A kernel whose matrix instructions are `mma.sync`, or that spills, is slower than its floor; both show here and not in
any test of values. Kernels are compiled for Hopper at the published model's sizes.

Invariant: runs in a process without TRITON_INTERPRET.

Run it:  python -m blockpress.ops.kernels.compile_check [PARTS OF NAMES]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blockpress.ops.kernels import four_bits, products, routing
from blockpress.ops.kernels.experts import Tile, choose_tiles

TARGET = GPUTarget("cuda", 90, 32)
HIDDEN, SIZE, EXPERTS, TOP = 2816, 704, 128, 8


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel with its types and its constants; `aligned` names the pointers and numbers that 16 divides."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 4
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one compiled kernel: registers a thread, bytes spilled, bytes of shared memory, instructions of each kind."""

    registers: int
    spills: int
    shared: int
    wgmma: int
    mma_sync: int
    warps: int

    @property
    def programs(self) -> int:
        """How many fit on a multiprocessor of 65,536 registers and 227 KiB."""
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
    compiled = triton.compile(source, target=TARGET, options=options)
    text = compiled.asm["ptx"]
    report = _assemble(text)
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
    """What the assembler that comes with Triton says of a kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "kernel.ptx"
        source.write_text(text, encoding="utf-8")
        command = [str(program), "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(room) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def variants() -> Iterator[Variant]:
    """Every kernel of the experts, with the tiles that `experts.choose_tiles` gives."""
    yield Variant(
        name="choose", kernel=routing.choose_kernel,
        types={"scores": "*bf16", "expert_scale": "*bf16", "weights": "*fp32", "chosen": "*i32", "tokens": "i32"},
        constants={"EXPERTS": EXPERTS, "TOP": TOP, "WIDTH": EXPERTS, "PLACES": TOP, "ROWS": 4},
    )  # fmt: skip
    yield Variant(
        name="arrange", kernel=routing.arrange_kernel,
        types={"chosen": "*i32", "order": "*i32", "work": "*i32", "count": "i32", "tiles": "i32"},
        constants={"WIDTH": EXPERTS, "TILE": 32, "BLOCK": 1024},
    )  # fmt: skip
    for kind in ("bfloat16", "e4m3"):
        for tokens in (16, 256, 512, 4096):
            tiles = choose_tiles(kind, tokens * TOP, EXPERTS)
            for descriptor in (False, True):
                yield _gate_up(kind, tiles.gate_up, descriptor)
                yield _down(kind, tiles.down, descriptor, tiles.gate_up.rows)
    for kind, group in (("int4", 32), ("int4", 64), ("nvfp4", 16), ("mxfp4", 32)):
        for tokens in (16, 256, 512):
            tiles = choose_tiles(kind, tokens * TOP, EXPERTS)
            yield from _four_bits(kind, group, tiles.gate_up, tiles.down)


def _gate_up(kind: str, tile: Tile, descriptor: bool) -> Variant:
    code = "bf16" if kind == "bfloat16" else "fp8e4nv"
    types = {"x": f"*{code}", "x_scale": "*fp32", "order": "*i32", "work": "*i32", "weight": f"*{code}"}
    types |= {"weight_scale": "*bf16", "hidden": f"*{code}", "hidden_scale": "*fp32"}
    constants = _constants(tile) | {"TOP": TOP, "FP8": kind == "e4m3", "DESCRIPTOR": descriptor, "EVEN": True}
    return _described("gate_up", kind, products.gate_up_kernel, types, constants, tile, code)


def _down(kind: str, tile: Tile, descriptor: bool, group: int) -> Variant:
    code = "bf16" if kind == "bfloat16" else "fp8e4nv"
    types = {"hidden": f"*{code}", "hidden_scale": "*fp32", "order": "*i32", "work": "*i32", "share": "*fp32"}
    types |= {"weight": f"*{code}", "weight_scale": "*bf16", "out": "*bf16"}
    constants = _constants(tile) | {"GROUP": group, "FP8": kind == "e4m3", "DESCRIPTOR": descriptor, "EVEN": True}
    return _described("down", kind, products.down_kernel, types, constants, tile, code)


def _described(
    name: str, kind: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Tile, code: str
) -> Variant:
    how = "pointer"
    if constants["DESCRIPTOR"]:
        how, types = "descriptor", types | {"weight": f"tensordesc<{code}[{tile.rows},{tile.depth}]>"}
    label = f"{name} {kind} {tile.tokens} tokens {how}"
    return Variant(name=label, kernel=kernel, types=types, constants=constants, warps=tile.warps, stages=tile.stages)


def _four_bits(kind: str, group: int, gate_up: Tile, down: Tile) -> Iterator[Variant]:
    scale, outer = ("*bf16", 0) if kind == "int4" else ("*u8", int(kind == "nvfp4"))
    types = {"x": "*bf16", "hidden": "*bf16", "order": "*i32", "work": "*i32", "share": "*fp32", "out": "*bf16"}
    types |= {"weight": "*i32", "scale": scale, "outer": "*fp32"}
    common = {"KIND": kind, "GROUP": group, "OUTER": outer, "EVEN": True}
    for name, kernel, tile, more in (
        ("gate_up", four_bits.gate_up_kernel, gate_up, {"TOP": TOP}),
        ("down", four_bits.down_kernel, down, {}),
    ):
        yield Variant(
            name=f"{name} {kind} g{group} {tile.tokens} tokens", kernel=kernel, types=types,
            constants=common | _constants(tile) | more, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip


def _constants(tile: Tile) -> dict[str, int]:
    return {"HIDDEN": HIDDEN, "SIZE": SIZE, "ROWS": tile.rows, "TOKENS": tile.tokens, "DEPTH": tile.depth}


def main(*wanted: str) -> None:
    """A line for every kernel whose name holds one of these parts; for all without any."""
    print(f"{'kernel':40} registers  spills   shared  programs  wgmma  mma.sync")
    from blockpress.ops.kernels import variants as others

    for variant in (*variants(), *others.variants()):
        if wanted and not any(part in variant.name for part in wanted):
            continue
        got = compile_for(variant)
        figures = f"{got.registers:9} {got.spills:7} {got.shared:8} {got.programs:9} {got.wgmma:6} {got.mma_sync:9}"
        print(f"{variant.name:40} {figures}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
