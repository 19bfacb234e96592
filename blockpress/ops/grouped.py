"""Routed experts without gradients: tokens are sorted by expert once, and every expert reads its own in one piece.

    chosen   token 0: 3 1   token 1: 1 2   token 2: 3 2
    sorted   1: 0 1 | 2: 1 2 | 3: 0 2          products expert by expert, then every token sums its own

`ordered` does it in torch, for weights of any kind. `amx_grouped` does all of it in one call of C++ where the processor
has matrix tiles for bfloat16 (Intel's AMX): a weight's rows go into tiles as they lie, so only tokens are packed.

Invariant: a sum depends on its token's own experts alone, in the order in which the router chose them.
Run it:  python -m pytest tests/ops/test_experts.py
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_long, c_void_p
from functools import cache

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from blockpress.ops import compiled, rows
from blockpress.ops.geglu import geglu
from blockpress.ops.linear import linear
from blockpress.ops.weight import Packed, Weight


def ordered(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"] | Packed,
    down: Float[Tensor, "experts hidden size"] | Packed,
) -> Float[Tensor, "tokens hidden"]:
    """`experts.loop` with one sort in place of a search for every expert's tokens."""
    tokens, k = chosen.shape
    if not tokens:
        return torch.empty_like(x)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(down.shape[0]).scatter_add_(0, flat, torch.ones_like(flat)).tolist()
    parts = []
    for expert, own in enumerate(x.index_select(0, order // k).split(counts)):
        if len(own):
            gate, up = linear(own, gate_up[expert]).chunk(2, dim=-1)
            parts.append(linear(geglu(gate, up), down[expert]))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    y, places = torch.cat(parts), back.view(tokens, k)
    if rows.supports(y):
        return rows.weighted_sum(y, places, weights)
    return (y[places] * weights[..., None]).to(x.dtype).sum(1)


def amx_grouped(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"],
    down: Float[Tensor, "experts hidden size"],
) -> Float[Tensor, "tokens hidden"]:
    """The same in C++; only where `supports` says so."""
    library, (tokens, k) = _library(), chosen.shape
    assert library is not None, "fits() comes first"
    experts, hidden, size = down.shape
    x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.contiguous()
    slots, out = x.new_empty(tokens * k, hidden), torch.empty_like(x)
    pointers = [tensor.data_ptr() for tensor in (x, gate_up, down, weights, chosen, slots, out)]
    library.mix(*pointers, tokens, k, hidden, size, experts, torch.get_num_threads())
    return out


def supports(x: Tensor, gate_up: Weight, down: Weight) -> bool:
    """Whether `amx_grouped` may take them: bfloat16 on a CPU with matrix tiles, sizes of whole tiles, no gradient."""
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
