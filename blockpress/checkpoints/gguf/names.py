"""A tensor's name in our network, and its names in a GGUF file.

    ours                                            in the file
    embed_tokens.weight                             token_embd.weight          (output.weight: a tie, rarely written)
    norm.weight                                     output_norm.weight
    self_conditioning.gate_proj.weight              self_cond_gate.weight
    layers.N.self_attn.q_proj.weight                blk.N.attn_q.weight
    layers.N.pre_feedforward_layernorm.weight       blk.N.ffn_norm.weight
    layers.N.router.scale, .per_expert_scale        blk.N.ffn_gate_inp.scale, blk.N.ffn_down_exps.scale
    layers.N.experts.gate_up_proj                   blk.N.ffn_gate_up_exps.weight, or ffn_gate_exps and ffn_up_exps
    layers.N.layer_scalar, .causal_scalar           blk.N.layer_output_scale.weight, blk.N.enc_layer_output_scale.weight

Values are stored as in the published checkpoint. The converters for Gemma 1 to 3 add 1 to the norms, because those
models multiply by 1 + weight; the one for Gemma 4 adds 0 (`Gemma4Model.norm_shift`), as do its descendants.

Invariant: every tensor of a network has a name here, and no two have the same.

>>> stored_names("layers.3.causal_scalar")
('blk.3.enc_layer_output_scale.weight', 'blk.3.enc_layer_output_scale')

Run it:  python -m pytest --doctest-modules blockpress/checkpoints/gguf/names.py
Source: the `gguf` package's `TENSOR_NAMES`, llama.cpp's `conversion/gemma.py` and its pull request 24423.
"""

from __future__ import annotations

import re

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FREQUENCIES = "rope_freqs.weight"

_OUTSIDE = {
    "embed_tokens.weight": EMBEDDING,
    "norm.weight": "output_norm.weight",
    "self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    "self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    "self_conditioning.up_proj.weight": "self_cond_up.weight",
    "self_conditioning.down_proj.weight": "self_cond_down.weight",
}
_INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "layer_scalar": "layer_output_scale.weight",
    "causal_scalar": "enc_layer_output_scale.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def stored_names(ours: str) -> tuple[str, ...]:
    """The names under which a tensor of our network may be stored, the usual one first."""
    inside = _LAYER.fullmatch(ours)
    if inside is None:
        return (_OUTSIDE[ours],)
    name = f"blk.{inside[1]}.{_INSIDE[inside[2]]}"
    return (name, name.removesuffix(".weight")) if inside[2].endswith("scalar") else (name,)


def stored_halves(ours: str) -> tuple[str, str] | None:
    """The two names under which gate and up of a layer's experts may be stored separately; None for other tensors.

    >>> stored_halves("layers.0.experts.gate_up_proj")
    ('blk.0.ffn_gate_exps.weight', 'blk.0.ffn_up_exps.weight')
    """
    if not ours.endswith("experts.gate_up_proj"):
        return None
    name = stored_names(ours)[0]
    return name.replace("gate_up", "gate"), name.replace("gate_up", "up")
