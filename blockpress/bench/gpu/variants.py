"""What `compile_check` compiles: the kernels at the published model's sizes, most of them for one canvas.

Invariant: block sizes, warps and stages are those that `experts.choose_tiles`, `vocabulary.sample_from_hidden` and
`attention.attend` choose.
Run it:  python -m blockpress.bench.gpu.compile_check head
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from blockpress.ops.kernels import attention, four_bits, head, probabilities, products, routing
from blockpress.ops.kernels.experts import ExpertTile, choose_tiles

HIDDEN, SIZE, EXPERTS, TOP = 2816, 704, 128, 8
ROWS = 256
FLOATS = ["peak", "rest", "moment", "coarse", "temperature", "entropy", "highest", "mass", "rough", "parts", "share"]
"""Arguments that are float32 in every kernel; but `share` is bfloat16 in `probabilities.multiply`."""

WHOLE = ["ids", "edges", "best", "order", "amount", "chosen", "firsts", "counts", "stops", "table", "slot_mapping"]
STRIDED = ["query", "key", "value", "key_pages", "value_pages"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel with its types and constants; `aligned` names the pointers and numbers divisible by 16."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 4
    aligned: tuple[str, ...] = ()


def variants() -> Iterator[Variant]:
    """Every kernel."""
    yield from _experts()
    yield from _vocabulary()
    yield from _attention()


def _experts() -> Iterator[Variant]:
    """Kernels of the experts, with the tiles that `experts.choose_tiles` gives."""
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


def _gate_up(kind: str, tile: ExpertTile, descriptor: bool) -> Variant:
    code = "bf16" if kind == "bfloat16" else "fp8e4nv"
    types = {"x": f"*{code}", "x_scale": "*fp32", "order": "*i32", "work": "*i32", "weight": f"*{code}"}
    types |= {"weight_scale": "*bf16", "hidden": f"*{code}", "hidden_scale": "*fp32"}
    constants = _constants(tile) | {"TOP": TOP, "FP8": kind == "e4m3", "DESCRIPTOR": descriptor, "EVEN": True}
    return _described("gate_up", kind, products.gate_up_kernel, types, constants, tile, code)


def _down(kind: str, tile: ExpertTile, descriptor: bool, group: int) -> Variant:
    code = "bf16" if kind == "bfloat16" else "fp8e4nv"
    types = {"hidden": f"*{code}", "hidden_scale": "*fp32", "order": "*i32", "work": "*i32", "share": "*fp32"}
    types |= {"weight": f"*{code}", "weight_scale": "*bf16", "out": "*bf16"}
    constants = _constants(tile) | {"GROUP": group, "FP8": kind == "e4m3", "DESCRIPTOR": descriptor, "EVEN": True}
    return _described("down", kind, products.down_kernel, types, constants, tile, code)


def _described(
    name: str, kind: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: ExpertTile, code: str
) -> Variant:
    how = "pointer"
    if constants["DESCRIPTOR"]:
        how, types = "descriptor", types | {"weight": f"tensordesc<{code}[{tile.rows},{tile.depth}]>"}
    label = f"{name} {kind} {tile.tokens} tokens {how}"
    return Variant(name=label, kernel=kernel, types=types, constants=constants, warps=tile.warps, stages=tile.stages)


def _four_bits(kind: str, group: int, gate_up: ExpertTile, down: ExpertTile) -> Iterator[Variant]:
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


def _constants(tile: ExpertTile) -> dict[str, int]:
    return {"HIDDEN": HIDDEN, "SIZE": SIZE, "ROWS": tile.rows, "TOKENS": tile.tokens, "DEPTH": tile.depth}


def _vocabulary() -> Iterator[Variant]:
    """In bfloat16."""
    for rows in (ROWS, 32):
        width = head.launch_shape(rows, torch.bfloat16)
        for name, flags in {
            "exact": {"COARSE": True, "BANNED": False},
            "exact, banned": {"COARSE": True, "BANNED": True},
            "no signal": {"COARSE": False, "BANNED": False},
        }.items():
            constants = {"CAPPED": True, "EVEN": True, "TILE": head.TILE, **flags}
            yield _variant(f"head multiply {rows} rows {name}", head.multiply, constants, width)
    tile = {"CAPPED": True, "TILE": head.TILE}
    yield _variant("head sample", head.sample_kernel, {**tile, "COARSE": True, "TILES": 2048}, {"num_warps": 8})
    capped = {"CAPPED": True, "SPAN": probabilities.SPAN}
    yield _variant("probabilities softmax", probabilities.softmax_weights, capped, {"num_warps": 4})
    for rows in (ROWS, 32):
        yield _variant(
            f"probabilities multiply {rows} rows",
            probabilities.multiply,
            {"EVEN": True},
            probabilities.launch_shape(rows, torch.bfloat16),
        )
    yield _variant("probabilities reduce", probabilities.reduce_split_k, {"COLUMNS": probabilities.COLUMNS}, {})
    picked = {"GROUP": probabilities.GROUP, "KEPT": probabilities.KEPT}
    yield _variant("probabilities select", probabilities.select_top, {**tile, **picked}, {"num_warps": 8})
    yield _variant(
        "probabilities weighted sum",
        probabilities.weighted_sum,
        {"KEPT": probabilities.KEPT, "COLUMNS": probabilities.COLUMNS, "AT_ONCE": 16},
        {},
    )


def _attention() -> Iterator[Variant]:
    for label, kv_heads, dim, windowed in (("sliding", 8, 256, True), ("full", 2, 512, False)):
        for tokens in (1, ROWS, 32 * ROWS):
            tile = attention.choose_tile(tokens, 16, kv_heads, dim, torch.bfloat16)
            constants = {
                "SLOTS": 32,
                "WIDTH": 32,
                "GROUP": 16 // kv_heads,
                "PAGE": 256,
                "DIM": dim,
                "WINDOWED": windowed,
            }
            constants |= {"query_row": 16 * dim, "key_row": kv_heads * dim, "value_row": kv_heads * dim}
            constants |= {"key_pages_token": dim, "value_pages_token": dim}
            constants |= {"ROWS": tile.rows, "KEYS": tile.keys, "PARTED": tile.parted}
            shape = {"num_warps": tile.warps, "num_stages": tile.stages}
            yield _variant(f"attend {label} {tokens} rows", attention.attend_kernel, constants, shape)
        constants = {"PARTS": 4, "ROWS": 16, "DIM": dim}
        yield _variant(f"attend combine {label}", attention.combine_kernel, constants, {}, {"partial": "*fp32"})
        constants = {"PAGE": 256, "DIM": dim, "WIDTH": dim}
        yield _variant(f"attend write {label}", attention.write_kernel, constants, {"num_warps": 1})


def _variant(
    name: str, kernel: Any, constants: dict[str, Any], shape: dict[str, int], types: dict[str, str] | None = None
) -> Variant:
    """A kernel with the types that its arguments' names imply; all numbers but counts of rows are divisible by 16."""
    shape = dict(shape)
    warps, stages = shape.pop("num_warps", 4), shape.pop("num_stages", 3)
    known = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(WHOLE, "*i32") | {"partial": "*bf16"}
    known |= {"uniform": "*fp64", "argmax": "*i64", "sample": "*i64", "banned": "*i8", "causals": "*i8"}
    known |= dict.fromkeys(("highests", "totals"), "*fp32") | dict.fromkeys(("cap", "least", "dropped"), "fp32")
    known |= dict.fromkeys(
        ["n", "vocab", "width", "count", "tiles", "splits", "tokens", "heads", "window", "rows", "table_row"], "i32"
    )
    if constants.get("PARTED"):
        known |= {"partial": "*fp32"}
    if kernel is probabilities.multiply:
        known |= {"share": "*bf16"}
    constants = constants | shape
    strides = {name for name in kernel.arg_names if name.rpartition("_")[0] in STRIDED} - set(STRIDED)
    given = {name: "i32" if name in strides else known.get(name, "*bf16") for name in kernel.arg_names} | (types or {})
    return Variant(
        name=name,
        kernel=kernel,
        types={name: kind for name, kind in given.items() if name not in constants},
        constants=constants,
        warps=warps,
        stages=stages,
        aligned=("vocab", "width", *strides),
    )
