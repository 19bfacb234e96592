"""Names: every tensor of ours has one published name, and the names are those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockpress.checkpoints.names import is_derived, is_quantised, is_vision, our_name, published_name
from blockpress.checkpoints.safetensors.vision import vision_tensors
from blockpress.config import PRESETS, ModelConfig
from blockpress.model import Network

# Of `google/diffusiongemma-26B-A4B-it`: what reference/model.md says of its tower.
TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "patch_size": 16,
    "standardize": True,
}


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_name_comes_back_from_its_published_one(preset: Callable[[], ModelConfig]) -> None:
    config = preset()
    with torch.device("meta"):
        names = list(Network(config).state_dict())
    written = [published_name(name, config.family) for name in names]
    assert [our_name(name, config.family) for name in written] == names
    assert [our_name(name) for name in written] == names
    assert not any(is_vision(name) or is_derived(name) or is_quantised(name) for name in written)


@pytest.mark.parity
def test_the_large_model_has_the_names_and_shapes_of_the_reference() -> None:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    config = PRESETS["diffusiongemma-26B-A4B"]()
    data = config.to_dict() | {"vision_config": TOWER}
    with torch.device("meta"):
        ours = Network(config).state_dict()
        theirs = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(data))
    ties = {name for name in theirs.state_dict() if our_name(name) and published_name(our_name(name) or "") != name}
    expected = {name: tuple(t.shape) for name, t in theirs.state_dict().items() if name not in ties}
    written = {published_name(name): tuple(tensor.shape) for name, tensor in ours.items()}
    assert written | vision_tensors(TOWER, config.hidden_size) == expected
    assert all(our_name(name) in ours for name in ties)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.decoder.layers.3.self_attn.q_proj.weight", None),
        ("model.decoder.layers.3.router.scale", None),
        ("model.decoder.layers.3.router.per_expert_scale", None),
        ("model.encoder.language_model.layers.3.layer_scalar", None),
        ("model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.input_max", "vision"),
        ("model.encoder.embed_vision.embedding_projection.weight", "vision"),
        ("model.vision_tower.encoder.layers.0.mlp.up_proj.input_max", "vision"),
        ("model.embed_vision.embedding_projection.weight", "vision"),
        ("model.language_model.layers.3.layer_scalar", None),
        ("model.language_model.rotary_emb.full_attention_inv_freq", "derived"),
        ("model.language_model.embed_tokens.embed_scale", "derived"),
        ("model.decoder.rotary_emb.sliding_attention_inv_freq", "derived"),
        ("model.decoder.rotary_emb.inv_freq", "derived"),
        ("model.encoder.language_model.embed_tokens.embed_scale", "derived"),
        ("model.decoder.layers.0.self_attn.q_proj.weight_scale", "quantised"),
        ("model.decoder.layers.0.experts.5.up_proj.weight_scale_2", "quantised"),
        ("model.decoder.layers.0.experts.5.up_proj.input_scale", "quantised"),
        ("model.decoder.layers.0.experts.5.up_proj.weight_packed", "quantised"),
        ("model.decoder.layers.0.experts.5.up_proj.weight_global_scale", "quantised"),
        ("model.decoder.layers.0.mlp.up_proj.qweight", "quantised"),
        ("model.decoder.layers.0.mlp.up_proj.weight.absmax", "quantised"),
    ],
)
def test_a_name_belongs_to_one_kind_of_tensor(name: str, kind: str | None) -> None:
    kinds = {"vision": is_vision, "derived": is_derived, "quantised": is_quantised}
    assert [label for label, holds in kinds.items() if holds(name)] == ([kind] if kind else [])
    assert (our_name(name) is None) == (kind == "vision")


@pytest.mark.parametrize(
    ("name", "family", "ours"),
    [
        ("model.decoder.layers.3.layer_scalar", "diffusion_gemma", "layers.3.layer_scalar"),
        ("model.encoder.language_model.layers.3.layer_scalar", "diffusion_gemma", "layers.3.causal_scalar"),
        ("model.language_model.layers.3.layer_scalar", "diffusion_gemma", None),
        ("model.layers.3.layer_scalar", "diffusion_gemma", None),
        ("model.language_model.layers.3.layer_scalar", "gemma4", "layers.3.causal_scalar"),
        ("model.layers.3.layer_scalar", "gemma4_text", "layers.3.causal_scalar"),
        ("model.layers.3.layer_scalar", "gemma4", "layers.3.causal_scalar"),
        ("model.decoder.layers.3.layer_scalar", "gemma4", None),
        ("model.norm.weight", "gemma4_text", "norm.weight"),
        ("model.vision_tower.std_bias", "gemma4_text", None),
        ("model.audio_tower.layers.0.norm.weight", "gemma4", None),
        ("lm_head.weight", "gemma4", "embed_tokens.weight"),
        ("layers.3.layer_scalar", "gemma4", None),
    ],
)
def test_a_name_belongs_to_its_family(name: str, family: Any, ours: str | None) -> None:
    assert our_name(name, family) == ours
