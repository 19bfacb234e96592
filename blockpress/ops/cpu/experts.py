"""Routed experts in C++: tokens are sorted by expert, and each expert runs once over its tokens.

Weights of every kind that C++ knows are read as they are stored.

Invariant: a sum depends on its token's own experts alone, in the order in which the router chose them.
Run it:  python -m pytest tests/ops/test_experts.py
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

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
