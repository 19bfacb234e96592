"""Routed experts in C++: tokens are sorted by expert, and each expert runs once over its tokens.

`moe_forward` reads weights of every kind that C++ knows. `amx_grouped` is for bfloat16 where the processor has matrix
tiles (Intel's AMX): a weight's rows go into tiles as they lie, so only tokens are packed.

Invariant: a sum depends on its token's own experts alone, in the order in which the router chose them.
Run it:  python -m pytest tests/ops/test_experts.py
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL, byref, c_int, c_int64, c_long, c_void_p
from functools import cache

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from blockpress.ops import compiled
from blockpress.ops.cpu import bridge
from blockpress.ops.weight import Weight


class StackedExperts(ctypes.Structure):
    """The weights of all experts; mirrors `native/forward.cpp`."""

    _fields_ = [("gate_up", bridge.Matrix), ("down", bridge.Matrix), ("count", c_int64), ("size", c_int64)]


def stacked(gate_up: Weight, down: Weight) -> StackedExperts | None:
    """Stacks [experts, 2 * size, hidden] and [experts, hidden, size] as C++ reads them; None where it cannot."""
    wide, narrow = bridge.matrix(gate_up), bridge.matrix(down)
    if wide is None or narrow is None:
        return None
    return StackedExperts(wide, narrow, down.shape[0], down.shape[2])


def moe_forward(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    experts: StackedExperts,
) -> Float[Tensor, "tokens hidden"]:
    """`experts.loop`, with the sum over experts rounded once."""
    (tokens, k), hidden, dtype = chosen.shape, x.shape[1], x.dtype
    assert experts.gate_up.columns == hidden and experts.down.columns == experts.size, "one size of all"
    assert experts.gate_up.rows == 2 * experts.count * experts.size and experts.down.rows == experts.count * hidden
    x, weights, chosen = bridge.widened(x).contiguous(), weights.contiguous(), chosen.long().contiguous()
    slots, out = x.new_empty(tokens * k, hidden), torch.empty_like(x)
    pointers = (weights.data_ptr(), chosen.data_ptr(), slots.data_ptr(), out.data_ptr())
    bridge.call("mix", x.dtype, x.data_ptr(), tokens, hidden, k, byref(experts), *pointers)
    return out.to(dtype)


def amx_grouped(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"],
    down: Float[Tensor, "experts hidden size"],
) -> Float[Tensor, "tokens hidden"]:
    """`experts.ordered` on matrix tiles; only where `supports_amx` is true."""
    library, (tokens, k) = _library(), chosen.shape
    assert library is not None, "call supports_amx() first"
    experts, hidden, size = down.shape
    x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.contiguous()
    slots, out = x.new_empty(tokens * k, hidden), torch.empty_like(x)
    pointers = [tensor.data_ptr() for tensor in (x, gate_up, down, weights, chosen, slots, out)]
    library.mix(*pointers, tokens, k, hidden, size, experts, torch.get_num_threads())
    return out


def supports_amx(x: Tensor, gate_up: Weight, down: Weight) -> bool:
    """Whether `amx_grouped` can run: bfloat16 on a CPU with matrix tiles, sizes of whole tiles, no gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.bfloat16 or not len(x):
        return False
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return False
    for tensor in (x, gate_up, down):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.dtype != x.dtype:
            return False
    whole = down.shape[1] % 32 == 0 and down.shape[2] % 32 == 0
    return whole and gate_up.is_contiguous() and down.is_contiguous() and _library() is not None


@cache
def _library() -> CDLL | None:
    library = compiled.library("experts")
    if library is None or not library.has_tiles():
        return None
    library.mix.argtypes, library.mix.restype = [c_void_p] * 7 + [c_long] * 5 + [c_int], None
    return library
