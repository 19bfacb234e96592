"""The kernels of the vocabulary and of attention as `compile_check` compiles them: the published model, and one canvas.

Invariant: block sizes, warps and stages are those that `vocabulary.see` and `attention.attend` choose.
Run it:  python -m blockpress.ops.kernels.compile_check head
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from blockpress.ops.kernels import attention, belief, head
from blockpress.ops.kernels.compile_check import Variant

ROWS = 256
FLOATS = ["peak", "rest", "moment", "coarse", "temperature", "entropy", "highest", "mass", "rough", "parts", "share"]
"""Arguments that are float32 in every kernel; in `belief.multiply`, `share` is what the product became."""

WHOLE = ["ids", "edges", "best", "order", "amount", "kept", "chosen", "firsts", "counts", "stops", "table", "places"]
STRIDED = ["query", "key", "value", "key_pages", "value_pages"]


def variants() -> Iterator[Variant]:
    """Every kernel, in bfloat16."""
    for rows in (ROWS, 32):
        width = head.shape(rows, torch.bfloat16)
        for name, flags in {
            "exact": {"COARSE": True, "DENIED": False},
            "exact, denied": {"COARSE": True, "DENIED": True},
            "no signal": {"COARSE": False, "DENIED": False},
        }.items():
            constants = {"CAPPED": True, "EVEN": True, "TILE": head.TILE, **flags}
            yield _variant(f"head multiply {rows} rows {name}", head.multiply, constants, width)
    tile = {"CAPPED": True, "TILE": head.TILE}
    yield _variant("head choose", head.choose, {**tile, "COARSE": True, "TILES": 2048}, {"num_warps": 8})
    yield _variant("belief spread", belief.spread, {"CAPPED": True, "SPAN": belief.SPAN}, {"num_warps": 4})
    for rows in (ROWS, 32):
        yield _variant(
            f"belief multiply {rows} rows", belief.multiply, {"EVEN": True}, belief.shape(rows, torch.bfloat16)
        )
    yield _variant("belief gather", belief.gather, {"COLUMNS": belief.COLUMNS}, {})
    picked = {"GROUP": belief.GROUP, "KEPT": belief.KEPT}
    yield _variant("belief pick", belief.pick, {**tile, **picked}, {"num_warps": 8})
    yield _variant("belief weigh", belief.weigh, {"KEPT": belief.KEPT, "COLUMNS": belief.COLUMNS, "AT_ONCE": 16}, {})
    yield from _attention()


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
        yield _variant(f"attend combine {label}", attention.combine_kernel, constants, {}, {"seen": "*fp32"})
        constants = {"PAGE": 256, "DIM": dim, "WIDTH": dim}
        yield _variant(f"attend write {label}", attention.write_kernel, constants, {"num_warps": 1})


def _variant(
    name: str, kernel: Any, constants: dict[str, Any], shape: dict[str, int], types: dict[str, str] | None = None
) -> Variant:
    """A kernel with the types that its arguments' names stand for; all numbers but counts of rows are divided by 16."""
    shape = dict(shape)
    warps, stages = shape.pop("num_warps", 4), shape.pop("num_stages", 3)
    known = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(WHOLE, "*i32") | {"seen": "*bf16"}
    known |= {"uniform": "*fp64", "argmax": "*i64", "sample": "*i64", "denied": "*i8", "causals": "*i8"}
    known |= dict.fromkeys(("highests", "totals"), "*fp32") | dict.fromkeys(("cap", "least", "dropped"), "fp32")
    known |= dict.fromkeys(
        ["n", "vocab", "width", "count", "tiles", "stretches", "tokens", "heads", "window", "rows", "table_row"], "i32"
    )
    if constants.get("PARTED"):
        known |= {"seen": "*fp32"}
    if kernel is belief.multiply:
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
