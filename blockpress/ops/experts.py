"""Routed experts: every token goes through `top_k` of them, weighted by the router.

`gate_up` is [experts, 2 * size, hidden] with the gate's rows first, `down` is [experts, hidden, size]. All versions
give the same sums: `loop` (the truth, one expert after another over its own tokens), `dense` (all experts as one wide
MLP with weight 0 for those not chosen: fewer, larger products, best where experts are few), and without gradients
those of grouped.py. Packed weights are unpacked one expert at a time, and only those that a token chose.
Source: reference model, `DiffusionGemmaTextRouter` and `DiffusionGemmaTextExperts`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import grouped, kernels
from blockpress.ops.cpu import bridge
from blockpress.ops.cpu import experts as in_cpp
from blockpress.ops.geglu import geglu
from blockpress.ops.linear import linear
from blockpress.ops.weight import Packed

MANY = 1024
"""Tokens from which on the arithmetic that `dense` spends in vain costs more than sorting them, on a CPU."""


def route(
    scores: Float[Tensor, "tokens experts"], top_k: int, expert_scale: Float[Tensor, " experts"]
) -> tuple[Float32[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Softmax over all experts in float32, the best `top_k`, renormalised to sum 1, times each expert's scale."""
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights * expert_scale.float()[chosen], chosen


def loop(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"] | Packed,
    down: Float[Tensor, "experts hidden size"] | Packed,
) -> Float[Tensor, "tokens hidden"]:
    """One expert after another, each over the tokens that chose it."""
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, slot = torch.where(chosen == expert)
        gate, up = linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = linear(geglu(gate, up), down[expert])
        out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out


def dense(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"],
    down: Float[Tensor, "experts hidden size"],
) -> Float[Tensor, "tokens hidden"]:
    """All experts as one MLP of width experts * size, with weight 0 where a token did not choose one."""
    experts, _, size = down.shape
    share = torch.zeros(x.shape[0], experts, dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
    gate, up = F.linear(x, gate_up.flatten(0, 1)).view(-1, experts, 2 * size).chunk(2, dim=-1)
    mixed = (geglu(gate, up) * share[..., None]).to(gate.dtype)
    return F.linear(mixed.flatten(1), down.transpose(0, 1).flatten(1))


def moe_forward(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"] | Packed,
    down: Float[Tensor, "experts hidden size"] | Packed,
) -> Float[Tensor, "tokens hidden"]:
    """The fastest of them: `dense` spends experts / top_k times the arithmetic, and pays up to twice."""
    if x.is_cuda and kernels.available():
        from blockpress.ops.kernels import experts as in_triton

        if in_triton.supports(x, gate_up, down):
            return in_triton.moe_forward(x, weights, chosen, gate_up, down)
    gradients = torch.is_grad_enabled() or torch.compiler.is_compiling()
    stacks = in_cpp.stacked(gate_up, down) if bridge.supports(x) else None
    if stacks is not None:
        return in_cpp.moe_forward(x, weights, chosen, stacks)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        if grouped.supports(x, gate_up, down):
            return grouped.amx_grouped(x, weights, chosen, gate_up, down)
        if down.shape[0] <= 2 * chosen.shape[1] and (gradients or len(x) <= MANY):
            return dense(x, weights, chosen, gate_up, down)
    return (loop if gradients else grouped.ordered)(x, weights, chosen, gate_up, down)
