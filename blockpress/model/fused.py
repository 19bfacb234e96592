"""A layer on a CPU without gradients: two calls of C++ with attention between them, instead of some fifty of torch.

The modules of layers.py own the weights. C++ gets pointers, which are kept for each layer and checked before every use:
a weight that was replaced or moved gets new ones.

Invariant: the same as the layer's modules one by one, within float32 rounding of the sums; `fused_layer` is None where
C++ cannot read the weights in place, and where torch is faster.
Run it:  python -m pytest tests/model/test_fused.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockpress.ops.cpu import bridge
from blockpress.ops.cpu import layer as cpu
from blockpress.ops.cpu.experts import stacked
from blockpress.ops.cpu.layer import After, Before

if TYPE_CHECKING:
    from blockpress.model.layers import Attend, Causal, Layer, Rotary

NORMS = {
    "attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_after": "post_feedforward_layernorm_1",
    "experts_norm": "pre_feedforward_layernorm_2",
    "experts_after": "post_feedforward_layernorm_2",
    "feed_after": "post_feedforward_layernorm",
}


@final
class Fused:
    """The weights of one layer as C++ reads them."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.dtype, self.supported = dtype, True
        self._parts = [
            (module._modules, name, part) for module in layer.modules() for name, part in module.named_children()
        ]
        self._watched: list[tuple[dict[str, Any], str, object, Tensor | None, int, torch.dtype | None]] = []
        # A part of another kind, such as an adapter, does something that is not known here.
        if any(type(part).__module__ != type(layer).__module__ for *_, part in self._parts):
            self.supported = False
        else:
            self.before, self.after = self._before(layer), self._after(layer)
            self.supported = self.supported and self._alike()

    def current(self) -> bool:
        """Whether every part and every weight is unchanged and still in the same memory."""
        for modules, name, part in self._parts:
            if modules.get(name) is not part:
                return False
        for owner, name, weight, tensor, pointer, dtype in self._watched:
            if owner.get(name) is not weight:
                return False
            if tensor is not None and (tensor.data_ptr() != pointer or tensor.dtype is not dtype):
                return False
        return True

    def __call__(self, x: Tensor, rotary: Rotary, attend: Attend, causal: Causal, skip: int) -> Tensor:
        """`Layer.forward`, with the same arguments and result."""
        batch, length, hidden = x.shape
        flat = x.reshape(-1, hidden).contiguous()
        cos, sin = (table.expand(batch, -1, -1, -1).reshape(-1, table.shape[-1]) for table in rotary)
        cos, sin = cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous()
        query, key, value = (
            part.view(batch, -1, *part.shape[1:]).transpose(1, 2)
            for part in cpu.before(self.before, flat, cos, sin, skip)
        )
        mixed = attend(query, key, value).transpose(1, 2).reshape(batch * (length - skip), -1).contiguous()
        if not self.after.canvas_scalar:
            causal = True
        if isinstance(causal, Tensor):
            causal = causal[skip:].repeat(batch) if batch > 1 else causal[skip:].contiguous()  # not repeated: 30 us
        out = cpu.after(self.after, flat[skip:], mixed, causal)
        return out.view(batch, length - skip, hidden)

    def _before(self, layer: Layer) -> Before:
        attention, to = layer.self_attn, Before()
        to.norm, to.eps = self._pointer(layer.input_layernorm), attention.eps
        to.query, to.key = self._matrix(attention.q_proj), self._matrix(attention.k_proj)
        if attention.v_proj is not None:
            to.value = self._matrix(attention.v_proj)
        to.query_norm, to.key_norm = self._pointer(attention.q_norm), self._pointer(attention.k_norm)
        to.hidden, to.dim = to.query.columns, attention.dim
        to.heads, to.kv = to.query.rows // attention.dim, to.key.rows // attention.dim
        return to

    def _after(self, layer: Layer) -> After:
        to = After()
        to.out, to.gate = self._matrix(layer.self_attn.o_proj), self._matrix(layer.mlp.gate_proj)
        to.up, to.down = self._matrix(layer.mlp.up_proj), self._matrix(layer.mlp.down_proj)
        to.hidden, to.inner, to.width, to.eps = to.down.rows, to.gate.rows, to.out.columns, layer.input_layernorm.eps
        if layer.sparse:
            stacks = stacked(self._watch(layer.experts, "gate_up_proj"), self._watch(layer.experts, "down_proj"))
            self.supported = self.supported and stacks is not None
            to.experts = to.experts if stacks is None else stacks
            to.router, to.top_k, to.root = self._matrix(layer.router.proj), layer.router.top_k, layer.router.root
            to.router_scale = self._pointer(layer.router, "scale")
            to.expert_scale = self._pointer(layer.router, "per_expert_scale")
        for field, module in NORMS.items():
            if hasattr(layer, module):
                setattr(to, field, self._pointer(getattr(layer, module)))
        to.causal_scalar = self._pointer(layer, "causal_scalar")
        if layer.has_canvas:
            to.canvas_scalar = self._pointer(layer, "layer_scalar")
        return to

    def _alike(self) -> bool:
        """Whether weights with the same input rows are either all multiplied as integers, or none is."""
        before, after, integers = self.before, self.after, bridge.INT8_ROWS
        value = before.value if before.value.data else before.key
        groups = (
            (before.query, before.key, value),
            (after.gate, after.up),
            (after.experts.gate_up, after.experts.down),
        )
        return all(len({weight.kind == integers for weight in group}) == 1 for group in groups)

    def _watch(self, module: nn.Module, name: str = "weight") -> Any:
        """A parameter, a buffer or a packed weight, which `current` will check before every use."""
        owners = (module._parameters, module._buffers, module.__dict__)
        owner = next(candidate for candidate in owners if candidate.get(name) is not None)
        weight = owner[name]
        tensor = weight if isinstance(weight, Tensor) else None
        where = (0, None) if tensor is None else (tensor.data_ptr(), tensor.dtype)
        self._watched.append((owner, name, weight, tensor, *where))
        return weight

    def _matrix(self, module: nn.Module) -> bridge.Matrix:
        result = bridge.matrix(self._watch(module))
        self.supported = self.supported and result is not None
        return bridge.Matrix() if result is None else result

    def _pointer(self, module: nn.Module, name: str = "weight") -> int:
        """The pointer of a vector, which must have the activations' type."""
        tensor: Tensor = self._watch(module, name)
        self.supported = self.supported and tensor.dtype == self.dtype and tensor.device.type == "cpu"
        return tensor.data_ptr()


_LAYERS: WeakKeyDictionary[nn.Module, Fused] = WeakKeyDictionary()


def fused_layer(layer: Layer, x: Tensor, skip: int) -> Callable[..., Tensor] | None:
    """The layer in C++, for inputs like x; None where it has to run module by module."""
    if not x.numel() or (skip and len(x) > 1) or skip >= x.shape[1] or not bridge.supports(x):
        return None
    if x.dtype not in bridge.SUFFIXES:
        return None
    fused = _LAYERS.get(layer)
    if fused is None or fused.dtype != x.dtype or not fused.current():
        fused = _LAYERS[layer] = Fused(layer, x.dtype)
    return fused if fused.supported else None
