"""`ops.experts.moe_forward` on a GPU: sort the tokens by expert, two products, the sum over each token's experts.

    weights      products              activations                            extra weight memory
    bfloat16     bfloat16              unchanged                              none
    e4m3         e4m3 (wgmma)          e4m3, a scale per token or 64 values   none
    int4, e2m1   bfloat16 (wgmma)      unchanged, columns reordered           none

Nothing is repacked at load: all layouts are read as `ops/packed.py` stores them. For other weights (zero points, int8,
GGUF's blocks) `supports` is False, and the caller uses the plain version.

Invariant: no step waits for the host and no shape depends on the routing, so that a step can be captured in a graph.

Run it:  TRITON_INTERPRET=1 python -m blockpress.bench.gpu check --part experts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from blockpress.ops.kernels import four_bits, products
from blockpress.ops.kernels.jit import cdiv, power
from blockpress.ops.kernels.routing import Arrangement, arrange
from blockpress.ops.packed import E4M3, Codes, Float4, Nibbles
from blockpress.ops.weight import Packed

FP8_GROUP = 64
"""Features of `hidden` that share a scale in fp8: one program's."""


@dataclass(frozen=True, kw_only=True)
class ExpertTile:
    """One program's tile: rows of the weight, tokens, columns per step; and how it is compiled."""

    rows: int
    tokens: int
    depth: int
    warps: int = 4
    stages: int = 4
    descriptor: bool = False

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True, kw_only=True)
class ExpertTiles:
    """The tiles of both products, with the same number of tokens, since they share a work list."""

    gate_up: ExpertTile
    down: ExpertTile

    def __post_init__(self) -> None:
        assert self.gate_up.tokens == self.down.tokens, "one work list serves both products"


def choose_tiles(kind: str, assignments: int, experts: int) -> ExpertTiles:
    """Tiles for `assignments` (tokens x top_k): about as many tokens as an expert has, so that a weight is read once.

    The choice is estimated from bytes and compiled resources; it is not measured on a device yet.

    >>> [choose_tiles("bfloat16", 8 * tokens, 128).down.tokens for tokens in (1, 256, 512, 4096)]
    [16, 32, 64, 128]
    """
    per_expert = assignments / experts
    tokens = 16 if per_expert <= 8 else 32 if per_expert <= 24 else 64 if per_expert <= 64 else 128
    if kind == "bfloat16":
        depth = 64 if tokens > 32 else 128
        return ExpertTiles(
            gate_up=ExpertTile(rows=64, tokens=tokens, depth=depth, stages=4 if tokens < 128 else 3),
            down=ExpertTile(rows=128, tokens=tokens, depth=64, stages=4),
        )
    if kind == "e4m3":
        return ExpertTiles(
            gate_up=ExpertTile(rows=FP8_GROUP, tokens=tokens, depth=128, stages=4, warps=8 if tokens == 128 else 4),
            down=ExpertTile(rows=64 if tokens == 128 else 128, tokens=tokens, depth=FP8_GROUP, stages=4),
        )
    return ExpertTiles(
        gate_up=ExpertTile(rows=64, tokens=min(tokens, 64), depth=128, stages=4),
        down=ExpertTile(rows=64, tokens=min(tokens, 64), depth=64, stages=4),
    )


def packing_of(weight: Tensor | Packed) -> str | None:
    """The kernels that read the weight: bfloat16 (any float), e4m3, int4, nvfp4 or mxfp4; None: none of them."""
    if isinstance(weight, Tensor):
        return "bfloat16" if weight.is_contiguous() else None
    if isinstance(weight, Codes):
        whole = weight.codes.dtype == E4M3 and weight.scale.shape[-1] == 1 and weight.codes.shape[-1] % 16 == 0
        return "e4m3" if whole and weight.zero_point is None else None
    if isinstance(weight, Nibbles):
        fits = weight.zero_point is None and _reads_words(weight.shape[-1], weight.group, weight.scale.shape[-1])
        return "int4" if fits else None
    if isinstance(weight, Float4):
        kind = {("e4m3", 16): "nvfp4", ("e8m0", 32): "mxfp4"}.get((weight.kind, weight.group))
        return kind if _reads_words(weight.shape[-1], weight.group, weight.scale.shape[-1]) else None
    return None


def _reads_words(columns: int, group: int, groups: int) -> bool:
    return columns % 8 == 0 and (groups == 1 or group in (16, 32, 64))


def supports(x: Float[Tensor, "tokens hidden"], gate_up: Tensor | Packed, down: Tensor | Packed) -> bool:
    """Whether `moe_forward` can run: on a CUDA device, in bfloat16 without gradients, with weights that it reads."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or len(x) == 0 or torch.is_grad_enabled():
        return False
    if any(isinstance(weight, Tensor) and weight.dtype != x.dtype for weight in (gate_up, down)):
        return False
    kind = packing_of(gate_up)
    return kind is not None and kind == packing_of(down)


def moe_forward(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"] | Packed,
    down: Float[Tensor, "experts hidden size"] | Packed,
    tiles: ExpertTiles | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """`ops.experts.loop` up to rounding: sums stay in float32 from the products to the end.

    In fp8 the activations are rounded to e4m3 too, which changes the result by some 3 %.

    Args:
        tiles: None: `choose_tiles` by the number of tokens.
    """
    kind = packing_of(gate_up)
    assert kind is not None and kind == packing_of(down), "weights that no kernel here reads"
    experts, top_k = gate_up.shape[0], chosen.shape[1]
    tiles = tiles or choose_tiles(kind, chosen.numel(), experts)
    plan = arrange(chosen, experts, tiles.gate_up.tokens)
    out = torch.empty(chosen.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    share = weights.contiguous()
    if kind in ("bfloat16", "e4m3"):
        _codes(x.contiguous(), share, plan, gate_up, down, out, tiles)
    else:
        _four_bits(x, share, plan, gate_up, down, out, tiles, kind)
    return sum_over_experts(out, top_k)


def sum_over_experts(out: Float[Tensor, "assignments hidden"], top_k: int) -> Float[Tensor, "tokens hidden"]:
    """The sum of each token's rows, in the order of its chosen experts."""
    tokens, hidden = len(out) // top_k, out.shape[1]
    y = torch.empty(tokens, hidden, dtype=out.dtype, device=out.device)
    width = min(1024, power(hidden))
    products.combine_kernel[(tokens, cdiv(hidden, width))](
        out, y, tokens, TOP=top_k, HIDDEN=hidden, WIDTH=width, num_warps=4
    )
    return y


def quantise(x: Float[Tensor, "tokens hidden"]) -> tuple[Float[Tensor, "tokens hidden"], Float32[Tensor, " tokens"]]:
    """e4m3 codes and a scale per token; x is about codes * scale."""
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    products.quantise_kernel[(len(x),)](x, codes, scale, HIDDEN=x.shape[1], WIDTH=power(x.shape[1]), num_warps=4)
    return codes, scale


def _codes(
    x: Tensor, share: Tensor, plan: Arrangement, gate_up: Any, down: Any, out: Tensor, tiles: ExpertTiles
) -> None:
    """Both products in bfloat16, or in fp8 where the weights are Codes."""
    (_, hidden, size), assignments, fp8 = down.shape, len(out), isinstance(down, Codes)
    first, second = (gate_up.codes, down.codes) if fp8 else (gate_up, down)
    first_scale, second_scale = (gate_up.scale, down.scale) if fp8 else (out, out)
    inputs, input_scale = quantise(x) if fp8 else (x, out)
    middle = torch.empty(assignments, size, dtype=inputs.dtype, device=x.device)
    parts = cdiv(size, tiles.gate_up.rows)
    middle_scale = torch.empty(assignments, parts, dtype=torch.float32, device=x.device) if fp8 else out
    tile, entries = tiles.gate_up, len(plan.work)
    products.gate_up_kernel[(entries * parts,)](
        inputs, input_scale, plan.order, plan.work, _source(first, tile), first_scale, middle, middle_scale,
        TOP=assignments // len(x), HIDDEN=hidden, SIZE=size, FP8=fp8, ROWS=tile.rows, TOKENS=tile.tokens,
        DEPTH=tile.depth, DESCRIPTOR=tile.descriptor, EVEN=_even(size, tile.rows, hidden, tile.depth), **tile.launch,
    )  # fmt: skip
    tile = tiles.down
    products.down_kernel[(entries * cdiv(hidden, tile.rows),)](
        middle, middle_scale, plan.order, plan.work, share, _source(second, tile), second_scale, out,
        HIDDEN=hidden, SIZE=size, FP8=fp8, GROUP=tiles.gate_up.rows, ROWS=tile.rows, TOKENS=tile.tokens,
        DEPTH=tile.depth, DESCRIPTOR=tile.descriptor, EVEN=_even(hidden, tile.rows, size, tile.depth), **tile.launch,
    )  # fmt: skip


def _four_bits(
    x: Tensor, share: Tensor, plan: Arrangement, gate_up: Any, down: Any, out: Tensor, tiles: ExpertTiles, kind: str
) -> None:
    """Both products with 4-bit weights."""
    (_, hidden, size), assignments = down.shape, len(out)
    middle = torch.empty(assignments, size, dtype=x.dtype, device=x.device)
    tile, entries = tiles.gate_up, len(plan.work)
    words, scale, outer, group, how = _parts(gate_up)
    four_bits.gate_up_kernel[(entries * cdiv(size, tile.rows),)](
        four_bits.paired(x).contiguous(), plan.order, plan.work, words, scale, outer, middle,
        TOP=assignments // len(x), HIDDEN=hidden, SIZE=size, KIND=kind, GROUP=group, OUTER=how, ROWS=tile.rows,
        TOKENS=tile.tokens, DEPTH=tile.depth, EVEN=_even(size, tile.rows, hidden, tile.depth), **tile.launch,
    )  # fmt: skip
    tile = tiles.down
    words, scale, outer, group, how = _parts(down)
    four_bits.down_kernel[(entries * cdiv(hidden, tile.rows),)](
        middle, plan.order, plan.work, share, words, scale, outer, out,
        HIDDEN=hidden, SIZE=size, KIND=kind, GROUP=group, OUTER=how, ROWS=tile.rows, TOKENS=tile.tokens,
        DEPTH=tile.depth, EVEN=_even(hidden, tile.rows, size, tile.depth), **tile.launch,
    )  # fmt: skip


def _parts(weight: Nibbles | Float4) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Words, scales, global scales (any tensor if none), the group (0: the row), how the global scales apply."""
    words, group = weight.packed.view(torch.int32), weight.group if weight.scale.shape[-1] > 1 else 0
    if isinstance(weight, Nibbles):
        return words, weight.scale, weight.scale, group, 0
    if weight.global_scale is None:
        return words, weight.scale, weight.scale, weight.group, 0
    return words, weight.scale, weight.global_scale, weight.group, 2 if weight.divides else 1


def _source(weight: Tensor, tile: ExpertTile) -> Tensor | TensorDescriptor:
    """The kernel's argument for the weight: a pointer, or a descriptor of [experts * rows, columns]."""
    if not tile.descriptor:
        return weight
    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.rows, tile.depth])


def _even(rows: int, tile_rows: int, columns: int, depth: int) -> bool:
    return rows % tile_rows == 0 and columns % depth == 0
