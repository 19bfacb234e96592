"""Routed experts: every token goes through `top_k` of them, weighted by the router.

    chosen   token 0: 3 1   token 1: 1 2   token 2: 3 2
    sorted   1: 0 1 | 2: 1 2 | 3: 0 2          `ordered`: products expert by expert, then each token's sum

`gate_up` is [experts, 2 * size, hidden] with the gate's rows first, `down` is [experts, hidden, size]. All versions
give the same sums: `moe_loop` (the reference, expert by expert over the tokens that chose it), `moe_dense` (all
experts as one wide MLP with weight 0 for those not chosen: fewer, larger products, best where experts are few), and
without gradients `ordered`. Packed weights are unpacked one expert at a time, and only those that a token chose. C++ is
in `cpu/`, Triton in `kernels/`.

Invariant of `ordered`: a sum depends on its token's own experts alone, in the order in which the router chose them.
Run it:  python -m pytest tests/ops/test_experts.py
Source: reference model, `DiffusionGemmaTextRouter` and `DiffusionGemmaTextExperts`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from blockpress.ops import kernels, rows
from blockpress.ops.cpu import bridge
from blockpress.ops.cpu import experts as in_cpp
from blockpress.ops.geglu import geglu
from blockpress.ops.linear import linear
from blockpress.ops.weight import Packed


def route(
    scores: Float[Tensor, "tokens experts"], top_k: int, expert_scale: Float[Tensor, " experts"]
) -> tuple[Float32[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Softmax over all experts in float32, the best `top_k`, renormalised to sum 1, times each expert's scale."""
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights * expert_scale.float()[chosen], chosen


def moe_loop(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"] | Packed,
    down: Float[Tensor, "experts hidden size"] | Packed,
) -> Float[Tensor, "tokens hidden"]:
    """Expert by expert, each over the tokens that chose it: the reference."""
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, slot = torch.where(chosen == expert)
        gate, up = linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = linear(geglu(gate, up), down[expert])
        out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out


def moe_dense(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"],
    down: Float[Tensor, "experts hidden size"],
) -> Float[Tensor, "tokens hidden"]:
    """All experts as one MLP of width experts * size, with weight 0 where a token did not choose one."""
    experts, _, size = down.shape
    share = torch.zeros(x.shape[0], experts, dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
    gate, up = linear(x, gate_up.flatten(0, 1)).view(-1, experts, 2 * size).chunk(2, dim=-1)
    mixed = (geglu(gate, up) * share[..., None]).to(gate.dtype)
    return linear(mixed.flatten(1), down.transpose(0, 1).flatten(1))


def ordered(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"] | Packed,
    down: Float[Tensor, "experts hidden size"] | Packed,
) -> Float[Tensor, "tokens hidden"]:
    """`moe_loop` for weights of any kind, with one sort instead of a search for every expert's tokens."""
    tokens, k = chosen.shape
    if not tokens:
        return torch.empty_like(x)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(down.shape[0]).scatter_add_(0, flat, torch.ones_like(flat)).tolist()
    parts = []
    for expert, inputs in enumerate(x.index_select(0, order // k).split(counts)):
        if len(inputs):
            gate, up = linear(inputs, gate_up[expert]).chunk(2, dim=-1)
            parts.append(linear(geglu(gate, up), down[expert]))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    y, slots = torch.cat(parts), inverse.view(tokens, k)
    if rows.supports(y):
        return rows.weighted_sum(y, slots, weights)
    return (y[slots] * weights[..., None]).to(x.dtype).sum(1)


def moe_forward(
    x: Float[Tensor, "tokens hidden"],
    weights: Float32[Tensor, "tokens k"],
    chosen: Int[Tensor, "tokens k"],
    gate_up: Float[Tensor, "experts double hidden"] | Packed,
    down: Float[Tensor, "experts hidden size"] | Packed,
) -> Float[Tensor, "tokens hidden"]:
    """The fastest version here. `moe_dense` does experts / top_k times the arithmetic; that pays up to twice.

    How many tokens there are never decides: a token's bits would depend on the others in its forward.
    """
    if x.is_cuda and kernels.available():
        from blockpress.ops.kernels import experts as in_triton

        if in_triton.supports(x, gate_up, down):
            return in_triton.moe_forward(x, weights, chosen, gate_up, down)
    gradients = torch.is_grad_enabled() or torch.compiler.is_compiling()
    stacks = in_cpp.stacked(gate_up, down) if bridge.supports(x) else None
    if stacks is not None:
        return in_cpp.moe_forward(x, weights, chosen, stacks)
    few = down.shape[0] <= 2 * chosen.shape[1]
    if few and isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return moe_dense(x, weights, chosen, gate_up, down)
    return (moe_loop if gradients else ordered)(x, weights, chosen, gate_up, down)
