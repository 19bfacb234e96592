"""The vision tower's tensors, by name and shape, and the smallest tower there is.

The tower itself is not built yet. Its tensors are known all the same, so that a checkpoint keeps them; and a model of
our own that never sees an image carries a minimal tower, since `transformers` invents one of 167 million parameters
for a checkpoint without.

Invariant: the names and shapes are those of the state dict that `transformers` builds from the same config.

Run it:  python -m pytest tests/weights/test_vision.py
Source: `Gemma4VisionModel`, `DiffusionGemmaMultimodalEmbedder`, `Gemma4VisionConfig` of `transformers` 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blockpress.errors import ConfigError

TOWER = "model.encoder.vision_tower."
PROJECTION = "model.encoder.embed_vision.embedding_projection.weight"

Shapes = dict[str, tuple[int, ...]]

# What `Gemma4VisionConfig` takes where the file is silent.
_DEFAULTS: dict[str, int] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "position_embedding_size": 10_240,
}
_MINIMAL: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 4,
    # At a pooling of 1 the reference drops every soft token.
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}


def vision_tensors(vision_config: Mapping[str, Any], text_hidden: int) -> Shapes:
    """Names and shapes of a tower's tensors as they are stored.

    Args:
        vision_config: `vision_config` of a `config.json`, of the kind `gemma4_vision`.
        text_hidden: features of the stack that the soft tokens are projected to.

    Raises:
        ConfigError: another kind of tower, or a size that is no whole number of at least 1.

    >>> sum(torch.Size(shape).numel() for shape in vision_tensors(_MINIMAL, 192).values())
    2672
    """
    kind = vision_config.get("model_type", "gemma4_vision")
    if kind != "gemma4_vision":
        raise ConfigError(f"config field vision_config.model_type is {kind!r}", hint="only 'gemma4_vision' is known")
    size = {name: _count(vision_config, name, default) for name, default in _DEFAULTS.items()}
    hidden = size["hidden_size"]
    shapes: Shapes = {
        TOWER + "patch_embedder.input_proj.weight": (hidden, 3 * size["patch_size"] ** 2),
        TOWER + "patch_embedder.position_embedding_table": (2, size["position_embedding_size"], hidden),
    }
    for index in range(size["num_hidden_layers"]):
        shapes |= _layer(
            f"{TOWER}encoder.layers.{index}.", size, clipped=bool(vision_config.get("use_clipped_linears"))
        )
    if vision_config.get("standardize"):
        shapes |= {TOWER + "std_bias": (hidden,), TOWER + "std_scale": (hidden,)}
    return shapes | {PROJECTION: (text_hidden, _count(vision_config, "output_proj_dims", hidden))}


def minimal_vision(seed: int, text_hidden: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tower of one layer and 8 features: its `vision_config`, and its bfloat16 tensors by published name.

    It has never seen an image: what it says about one means nothing. The same seed gives the same tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in vision_tensors(_MINIMAL, text_hidden).items():
        drawn = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        tensors[name] = drawn.to(torch.bfloat16)
    return dict(_MINIMAL), tensors


def _layer(prefix: str, size: Mapping[str, int], *, clipped: bool) -> Shapes:
    hidden, inner, dim = size["hidden_size"], size["intermediate_size"], size["head_dim"]
    queries, keys = size["num_attention_heads"] * dim, size["num_key_value_heads"] * dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    shapes: Shapes = {f"{prefix}{name}.weight": (hidden,) for name in norms}
    shapes |= {f"{prefix}self_attn.{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
    for name, shape in linears.items():
        shapes[f"{prefix}{name}.linear.weight"] = shape
        if clipped:
            shapes |= {f"{prefix}{name}.{end}": () for end in ("input_min", "input_max", "output_min", "output_max")}
    return shapes


def _count(vision_config: Mapping[str, Any], name: str, default: int) -> int:
    value = vision_config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"config field vision_config.{name} is {value!r}", hint=f"{name} must be a whole number from 1"
        )
    return value
