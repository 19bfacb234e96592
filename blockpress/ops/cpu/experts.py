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


class Experts(ctypes.Structure):
    """The weights of all experts; `native/forward.cpp` declares the same."""

    _fields_ = [("gate_up", bridge.Matrix), ("down", bridge.Matrix), ("count", c_int64), ("size", c_int64)]


def stacked(gate_up: Float[Tensor, "experts double hidden"], down: Float[Tensor, "experts hidden size"]) -> Experts:
    """Dense stacks as C++ sees them."""
    return Experts(bridge.matrix(gate_up), bridge.matrix(down), down.shape[0], down.shape[2])


def mix(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"],
    down: Float[Tensor, "experts hidden size"],
) -> Float[Tensor, "tokens hidden"]:
    """`experts.loop`, its sum rounded once."""
    (tokens, k), hidden = chosen.shape, x.shape[1]
    assert gate_up.shape == (len(down), 2 * down.shape[2], hidden) and down.shape[1] == hidden, "one size of all"
    x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.long().contiguous()
    slots, out = x.new_empty(tokens * k, hidden), torch.empty_like(x)
    experts = stacked(gate_up, down)
    pointers = (weights.data_ptr(), chosen.data_ptr(), slots.data_ptr(), out.data_ptr())
    bridge.call("mix", x.dtype, x.data_ptr(), tokens, hidden, k, byref(experts), *pointers)
    return out
