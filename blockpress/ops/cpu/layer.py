"""Both halves of a layer in one call of C++ each, with attention between them.

    before    x --norm--> @ query, key, value --norms, RoPE--> q, k, v
    after     attention's output --> @ out --norm--> + x = h --> MLP, router, experts, norms --> + h, times a scalar

Invariant: each gives what the modules of `model/layers.py` give one by one, rounded where they round.
Run it:  python -m pytest tests/model/test_fused.py
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int64, c_void_p

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from blockpress.ops.cpu import bridge
from blockpress.ops.cpu.experts import StackedExperts


class Before(ctypes.Structure):
    """Weights of the first half; mirrors `native/forward.cpp`. value.data None: values are unnormed keys."""

    _fields_ = [
        ("norm", c_void_p),
        *((name, bridge.Matrix) for name in ("query", "key", "value")),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        *((name, c_int64) for name in ("hidden", "heads", "kv", "dim")),
        ("eps", c_float),
    ]


class After(ctypes.Structure):
    """Weights of the second half; mirrors `native/forward.cpp`. router.data None: a dense layer."""

    _fields_ = [
        *((name, bridge.Matrix) for name in ("out", "gate", "up", "down", "router")),
        ("experts", StackedExperts),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "mlp_after", "experts_norm", "experts_after")),
        *((name, c_void_p) for name in ("feed_after", "router_scale", "expert_scale")),
        *((name, c_void_p) for name in ("canvas_scalar", "causal_scalar")),
        *((name, c_int64) for name in ("hidden", "inner", "width", "top_k")),
        ("eps", c_float),
        ("root", c_float),
    ]


def before(
    layer: Before,
    x: Float[Tensor, "rows hidden"],
    cos: Float[Tensor, "rows dim"],
    sin: Float[Tensor, "rows dim"],
    skip: int,
) -> tuple[Float[Tensor, "asking heads dim"], Float[Tensor, "rows kv dim"], Float[Tensor, "rows kv dim"]]:
    """Queries of all rows but the first `skip`, keys and values of all rows; every tensor dense."""
    rows = len(x)
    query = x.new_empty(rows - skip, layer.heads, layer.dim)
    key, value = x.new_empty(rows, layer.kv, layer.dim), x.new_empty(rows, layer.kv, layer.dim)
    arguments = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, skip)
    bridge.call("before", x.dtype, byref(layer), *arguments, query.data_ptr(), key.data_ptr(), value.data_ptr())
    return query, key, value


def after(
    layer: After,
    x: Float[Tensor, "rows hidden"],
    mixed: Float[Tensor, "rows width"],
    causal: bool | Bool[Tensor, " rows"],
) -> Float[Tensor, "rows hidden"]:
    """The layer's output; x is its input, both for the rows that have queries. All tensors dense."""
    out = torch.empty_like(x)
    per_row, for_all = (None, int(causal)) if isinstance(causal, bool) else (causal.data_ptr(), 0)
    arguments = (x.data_ptr(), mixed.data_ptr(), out.data_ptr(), len(x), per_row, for_all)
    bridge.call("after", x.dtype, byref(layer), *arguments)
    return out
