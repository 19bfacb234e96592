"""The parts of a layer: gated MLP, router and experts, attention, and the layer that joins them.

    h = x + post_attention_norm(attention(input_norm(x)))
    d = post_ffw_norm_1(mlp(pre_ffw_norm(h)))
    m = post_ffw_norm_2(experts(pre_ffw_norm_2(h), route(h)))        the router reads h itself
    y = (h + post_ffw_norm(d + m)) * layer_scalar

A dense layer (Gemma 4 without experts) has no m and norms its MLP once: y = (h + post_ffw_norm(mlp(pre_ffw_norm(h)))) *
layer_scalar.

Module names are those of the published checkpoints, so that a tensor's name is its path.
Source: reference model, section 1 of its `config.json` and `DiffusionGemmaDecoderTextLayer`, `Gemma4TextDecoderLayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from blockpress.config import LayerConfig, ModelConfig
from blockpress.model.fused import fused_layer
from blockpress.ops import experts
from blockpress.ops.geglu import geglu
from blockpress.ops.linear import linear, lookup
from blockpress.ops.norm import rms_norm
from blockpress.ops.packed import HalfFloats
from blockpress.ops.rope import rotate
from blockpress.ops.weight import Packed, Weight
from blockpress.shapes import Heads, Hidden, KeyHeads

Rotary = tuple[Tensor, Tensor]
Attend = Callable[[Heads, KeyHeads, KeyHeads], Heads]
"""A layer's attention: it stores the rows' keys and values and returns what their queries attend to. Where the first
rows need only keys and values, there are fewer queries: those of the last rows."""

Causal = bool | Bool[Tensor, " length"]
"""Whether rows belong to the causal pass or to a canvas: one value for all of them, or one per row."""
Wanted = Float[Tensor, "batch wanted hidden"]


class PackedHolder(nn.Module):
    """A module some of whose parameters may have been replaced by packed weights.

    A packed weight is not a parameter, and a change of dtype does not affect it. `state_dict` has those that are floats
    (`HalfFloats`) as stored, and omits the others.
    """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in packed_weights(self).items():
            if isinstance(weight, HalfFloats):
                destination[prefix + name] = weight.values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedHolder:
        super()._apply(fn, recurse)
        # Packed weights move to the device to which `fn` moves bytes; nothing else of `fn` applies to them.
        for name, weight in packed_weights(self).items():
            setattr(self, name, weight.to(fn(torch.empty(0, dtype=torch.uint8, device=weight.device)).device))
        return self


class Weighted(PackedHolder):
    """A module with one matrix, its `weight`."""

    weight: Weight

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        weight = torch.empty(rows, columns, dtype=torch.float32)
        # Without memory there is nothing to draw, and torch would import its compiler for it, a second of work.
        self.weight = nn.Parameter(weight if weight.is_meta else weight.normal_(std=columns**-0.5))


class Linear(Weighted):
    """y = x @ weight^T, no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(Weighted):
    """Rows of the weight by token id."""

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return lookup(ids, self.weight, dtype)


def put_packed(module: nn.Module, name: str, weight: Packed) -> None:
    """Replace the module's parameter `name` by a packed weight."""
    if name in module._parameters:
        delattr(module, name)
    setattr(module, name, weight)


def packed_weights(module: nn.Module) -> dict[str, Packed]:
    """The packed weights of the module itself, by name."""
    # A protocol looks for all its members, 12 us each time: most values unpack nothing.
    members = ((name, value) for name, value in vars(module).items() if hasattr(value, "unpack"))
    return {name: value for name, value in members if isinstance(value, Packed)}


class RMSNorm(nn.Module):
    """A weighted RMSNorm over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """GeGLU: down(gelu_tanh(gate(x)) * up(x)), no bias."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, size)
        self.up_proj = Linear(hidden, size)
        self.down_proj = Linear(size, hidden)

    def forward(self, x: Hidden) -> Hidden:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Scores of the experts: unweighted RMSNorm, times `scale`, times 1/sqrt(hidden), projected."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = Linear(config.hidden_size, config.num_experts)
        self.scale = nn.Parameter(torch.ones(config.hidden_size, dtype=torch.float32))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts, dtype=torch.float32))
        self.root = config.hidden_size**-0.5
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.proj(rms_norm(x, None, self.eps) * self.scale * self.root)
        return experts.route(scores, self.top_k, self.per_expert_scale)


class Experts(PackedHolder):
    """The experts' weights as two stacked tensors, or two packed ones."""

    gate_up_proj: Weight
    down_proj: Weight

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, hidden, size = config.num_experts, config.hidden_size, config.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * size, hidden, dtype=torch.float32))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, size, dtype=torch.float32))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return experts.moe_forward(x, weights, chosen, self.gate_up_proj, self.down_proj)


class Attention(nn.Module):
    """Grouped attention of normed queries and keys. Without a v_proj, v is k before k's norm and RoPE."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        hidden, dim, eps = config.hidden_size, layer.head_dim, config.rms_norm_eps
        self.dim, self.eps = dim, eps
        self.q_proj = Linear(hidden, config.num_heads * dim)
        self.k_proj = Linear(hidden, layer.kv_heads * dim)
        self.v_proj = Linear(hidden, layer.kv_heads * dim) if config.has_value(layer) else None
        self.o_proj = Linear(config.num_heads * dim, hidden)
        self.q_norm = RMSNorm(dim, eps)
        self.k_norm = RMSNorm(dim, eps)

    def forward(self, x: Hidden, rotary: Rotary, attend: Attend, skip: int = 0) -> Wanted:
        """The attention output of x's rows except the first `skip`, of which only keys and values are computed."""
        cos, sin = (table.to(x.dtype) for table in rotary)
        key = self._heads(self.k_proj(x))
        value = key if self.v_proj is None else self._heads(self.v_proj(x))
        key = rotate(self.k_norm(key), cos, sin)
        query = self.q_norm(self._heads(self.q_proj(x[:, skip:])))
        query = rotate(query, cos[:, :, skip:], sin[:, :, skip:])
        mixed = attend(query, key, rms_norm(value, None, self.eps))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Heads:
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)


class Layer(nn.Module):
    """One layer. `layer_scalar` scales its output on a canvas, `causal_scalar` in the causal pass: they may differ.

    A family without canvases has the second alone.
    """

    layer_scalar: Tensor
    causal_scalar: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.sparse = config.num_experts > 0
        # The order decides which numbers a seed draws for each weight (`train/initialise.py`).
        if self.sparse:
            self.router = Router(config)
            self.experts = Experts(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        if self.sparse:
            self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        if self.sparse:
            self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.has_canvas = config.has_canvas
        if self.has_canvas:
            self.register_buffer("layer_scalar", torch.ones(1, dtype=torch.float32))
        self.register_buffer("causal_scalar", torch.ones(1, dtype=torch.float32))

    def forward(self, x: Hidden, rotary: Rotary, attend: Attend, *, causal: Causal, skip: int = 0) -> Wanted:
        """The layer's output for x's rows except the first `skip`, of which only keys and values are computed."""
        fused = fused_layer(self, x, skip)
        if fused is not None:
            return fused(x, rotary, attend, causal, skip)
        return self.by_modules(x, rotary, attend, causal=causal, skip=skip)

    def by_modules(self, x: Hidden, rotary: Rotary, attend: Attend, *, causal: Causal, skip: int = 0) -> Wanted:
        """The same, one operation after another: what `forward` does where C++ does not apply."""
        mixed = self.self_attn(self.input_layernorm(x), rotary, attend, skip)
        h = x[:, skip:] + self.post_attention_layernorm(mixed)
        if not h.numel():
            return h
        fed = self.mlp(self.pre_feedforward_layernorm(h))
        if self.sparse:
            flat = h.flatten(0, 1)
            routed = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat))
            fed = self.post_feedforward_layernorm_1(fed) + self.post_feedforward_layernorm_2(routed.view_as(h))
        y = h + self.post_feedforward_layernorm(fed)
        return y * self._scalar(causal, skip)

    def _scalar(self, causal: Causal, skip: int) -> Tensor:
        if isinstance(causal, Tensor) and self.has_canvas:
            return torch.where(causal[skip:, None], self.causal_scalar, self.layer_scalar)
        return self.layer_scalar if causal is False else self.causal_scalar


class SelfConditioning(nn.Module):
    """Adds the last step's self-conditioning embedding to the canvas: rms(embedded + mlp(rms_weighted(signal))).

    The outer norm has no weight and is applied even where the signal is zero (the first step).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.eps = config.rms_norm_eps

    def forward(self, embedded: Hidden, signal: Hidden) -> Hidden:
        normed = self.pre_norm(signal)
        update = self.down_proj(geglu(self.gate_proj(normed), self.up_proj(normed)))
        return rms_norm(embedded + update, None, self.eps)
