"""Routed experts in C++: tokens are sorted by expert, and each expert runs over its own in one piece.

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
    """The weights of all experts; `native/forward.cpp` declares the same."""

    _fields_ = [("gate_up", bridge.Matrix), ("down", bridge.Matrix), ("count", c_int64), ("size", c_int64)]


def stacked(gate_up: Weight, down: Weight) -> StackedExperts | None:
    """Stacks [experts, 2 * size, hidden] and [experts, hidden, size] for C++; None where it cannot read them."""
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
    """`experts.loop`, its sum rounded once."""
    (tokens, k), hidden = chosen.shape, x.shape[1]
    assert experts.gate_up.columns == hidden and experts.down.columns == experts.size, "one size of all"
    assert experts.gate_up.rows == 2 * experts.count * experts.size and experts.down.rows == experts.count * hidden
    x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.long().contiguous()
    slots, out = x.new_empty(tokens * k, hidden), torch.empty_like(x)
    pointers = (weights.data_ptr(), chosen.data_ptr(), slots.data_ptr(), out.data_ptr())
    bridge.call("mix", x.dtype, x.data_ptr(), tokens, hidden, k, byref(experts), *pointers)
    return out
