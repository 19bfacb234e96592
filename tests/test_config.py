"""config.json and generation_config.json: both spellings, what is refused by name, and the way out and in again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from blockpress.config import (
    PRESETS,
    AutoregressiveSampling,
    GenerationConfig,
    LayerConfig,
    ModelConfig,
    Rope,
    Sampling,
)
from blockpress.config.families import SIZES
from blockpress.errors import BlockpressError, ConfigError, RequestError

SLIDING = LayerConfig(kind="sliding_attention", head_dim=8, kv_heads=2)
FULL = LayerConfig(kind="full_attention", head_dim=16, kv_heads=1)
TINY = PRESETS["tiny"]()

PUBLISHED: dict[str, Any] = {
    # What the published file holds, but for the size of the vision tower.
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "boi_token_id": 255_999,
    "eoi_token_id": 258_882,
    "image_token_id": 258_880,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "vision_config": {"model_type": "gemma4_vision", "hidden_size": 1152, "num_hidden_layers": 27},
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": "vision",
        "sliding_window": 1024,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "max_position_embeddings": 262_144,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": [1, 106, 50],
        "bos_token_id": 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        },
        "a_key_of_the_future": {"kept": True},
    },
}


def file(text: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **outer: Any) -> dict[str, Any]:
    """A small config.json with some keys of the text part, or of the outer one, changed or dropped."""
    data = json.loads(json.dumps(TINY.to_dict()))
    data["text_config"] = {k: v for k, v in {**data["text_config"], **(text or {})}.items() if k not in drop}
    return {k: v for k, v in {**data, **outer}.items() if k not in drop}


def read(text: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **outer: Any) -> ModelConfig:
    return ModelConfig.from_dict(file(text, drop, **outer))


def refused(call: Callable[[], object], kind: type[BlockpressError], *told: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert [word for word in told if word not in caught.value.message] == []
    assert caught.value.hint


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str):
    config = PRESETS[name]()
    data = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(data) == config
    assert ModelConfig.from_dict(data).to_dict() == data


def test_the_published_file_is_the_preset():
    read_back = ModelConfig.from_dict(PUBLISHED)
    assert replace(read_back, vision=None) == PRESETS["diffusiongemma-26B-A4B"]()
    assert [i for i, layer in enumerate(read_back.layers) if not layer.sliding] == [5, 11, 17, 23, 29]
    assert read_back.vision == PUBLISHED["vision_config"]


def test_unknown_fields_are_written_back():
    data = ModelConfig.from_dict(PUBLISHED).to_dict()
    assert data["text_config"]["a_key_of_the_future"] == {"kept": True}
    assert (data["boi_token_id"], data["eoi_token_id"]) == (255_999, 258_882)
    assert data["vision_config"] == PUBLISHED["vision_config"]
    assert data["text_config"]["global_head_dim"] == 512
    assert "per_layer_config" not in data["text_config"]


def test_neither_reading_nor_writing_changes_the_given_file():
    before = json.dumps(PUBLISHED)
    ModelConfig.from_dict(PUBLISHED).to_dict()["text_config"]["hidden_size"] = 7
    assert json.dumps(PUBLISHED) == before


def test_a_derived_config_writes_its_own_values_and_not_its_sources():
    config = replace(ModelConfig.from_dict(PUBLISHED), hidden_size=64, layers=(SLIDING, FULL))
    assert ModelConfig.from_dict(config.to_dict()) == config


LAYERS = {
    "published spelling": (SLIDING, SLIDING, FULL, SLIDING, FULL),
    "one full layer": (FULL,),
    "all alike": (SLIDING, replace(FULL, head_dim=8, kv_heads=2)),
    "full layers differ": (SLIDING, replace(FULL, kv_heads=4), FULL),
    "sliding layers differ": (SLIDING, replace(SLIDING, kv_heads=1), FULL),
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_any_mix_of_layers_round_trips(layers: tuple[LayerConfig, ...]):
    config = replace(TINY, layers=layers)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))).layers == layers


ROPES = [
    Rope(theta=5e5),
    Rope(theta=1e6, kind="proportional", partial=0.25),
    Rope(theta=1e4, kind="proportional", partial=1.0, factor=8.0),
]


@pytest.mark.parametrize("rope", ROPES)
def test_ropes_round_trip(rope: Rope):
    config = replace(TINY, sliding_rope=rope, full_rope=rope)
    again = ModelConfig.from_dict(config.to_dict())
    assert again.rope("sliding_attention") == again.rope("full_attention") == rope


# --------------------------------------------------------------------------------------------------------- spellings

NO_SPELLING = ("global_head_dim", "num_global_key_value_heads", "per_layer_config")
KINDS = ["sliding_attention", "full_attention"] * 2


def sizes(config: ModelConfig) -> list[tuple[int, int]]:
    return [(layer.head_dim, layer.kv_heads) for layer in config.layers]


@pytest.mark.parametrize("key", [str, int], ids=["text keys", "whole keys"])
def test_both_spellings_of_full_heads_are_read(key: Callable[[int], Any]):
    base = {"num_hidden_layers": 4, "layer_types": KINDS, "head_dim": 8, "num_key_value_heads": 2}
    published = read({**base, "global_head_dim": 16, "num_global_key_value_heads": 1}, drop=NO_SPELLING[2:])
    full = {"head_dim": 16, "num_key_value_heads": 1}
    data = file(drop=NO_SPELLING)
    data["text_config"] |= {**base, "per_layer_config": {key(1): full, key(3): full}}
    saved = ModelConfig.from_dict(data)
    assert sizes(published) == sizes(saved) == [(8, 2), (16, 1)] * 2


def test_per_layer_config_holds_only_differences():
    base = {"num_hidden_layers": 4, "layer_types": KINDS, "head_dim": 8, "num_key_value_heads": 2}
    data = file(drop=NO_SPELLING)
    data["text_config"] |= {**base, "per_layer_config": {"1": {"num_key_value_heads": 4}}}
    assert sizes(ModelConfig.from_dict(data)) == [(8, 2), (8, 4), (8, 2), (8, 2)]


def test_without_either_spelling_full_heads_have_512_features():
    assert sizes(read(drop=NO_SPELLING)) == [(8, 2), (512, 2)]


def test_full_layers_use_the_general_key_value_heads_by_default():
    assert sizes(read({"global_head_dim": 32}, drop=("num_global_key_value_heads",))) == [(8, 2), (32, 2)]
    assert sizes(read({"num_global_key_value_heads": None})) == [(8, 2), (16, 2)]


def test_the_last_layer_is_full_whatever_the_file_says():
    config = read({"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3})
    assert [layer.kind for layer in config.layers] == ["sliding_attention"] * 2 + ["full_attention"]


def test_without_layer_types_every_sixth_layer_is_full():
    config = read({"num_hidden_layers": 8}, drop=("layer_types",))
    assert [i for i, layer in enumerate(config.layers) if not layer.sliding] == [5, 7]


def test_absent_fields_take_the_references_defaults():
    optional = (
        "sliding_window",
        "rope_parameters",
        "max_position_embeddings",
        "rms_norm_eps",
        "canvas_length",
        "dtype",
    )
    config = read(drop=(*optional, "final_logit_softcapping", "eos_token_id", "pad_token_id", "bos_token_id"))
    assert (config.sliding_window, config.context_length, config.canvas_length) == (512, 131_072, 256)
    assert (config.softcap, config.rms_norm_eps, config.dtype) == (30.0, 1e-6, "float32")
    assert (config.pad_id, config.eos_ids, config.bos_id) == (0, (1,), 2)
    assert config.sliding_rope == Rope(theta=1e4)
    assert config.full_rope == Rope(theta=1e6, kind="proportional", partial=0.25)


@pytest.mark.parametrize(("eos", "ids"), [(None, (1,)), (106, (106,)), ([1, 106, 50], (1, 106, 50)), ([7], (7,))])
def test_eos_may_be_null_one_or_many(eos: Any, ids: tuple[int, ...]):
    data = file(vocab_size=262_144)
    data["text_config"] |= {"vocab_size": 262_144, "eos_token_id": eos}
    assert ModelConfig.from_dict(data).eos_ids == ids


def test_the_older_name_of_the_type_is_read_and_the_newer_one_written():
    config = read(drop=("dtype",), torch_dtype="bfloat16")
    assert config.dtype == "bfloat16"
    assert "torch_dtype" not in config.to_dict()
    assert config.to_dict()["dtype"] == "bfloat16"


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", ["gemma3", "gemma4_unified", "llama", None, "diffusion_gemma_text"])
def test_another_family_is_refused(family: Any):
    refused(lambda: read(model_type=family), ConfigError, "model_type", repr(family))


@pytest.mark.parametrize("text", [None, [], "x"])
def test_the_text_part_must_be_an_object(text: Any):
    refused(lambda: ModelConfig.from_dict({**file(), "text_config": text}), ConfigError, "text_config", repr(text))


REFUSED_KEYS = [
    ("hidden_activation", "relu"),
    ("attention_bias", True),
    ("tie_word_embeddings", False),
    ("use_bidirectional_attention", "all"),
    ("hidden_size_per_layer_input", 256),
    ("num_kv_shared_layers", 4),
    ("use_double_wide_mlp", True),
    ("attn_logit_softcapping", 50.0),
    ("audio_config", {"model_type": "gemma4_audio"}),
]


@pytest.mark.parametrize(("key", "value"), REFUSED_KEYS)
def test_a_key_that_changes_the_maths_is_refused_by_name(key: str, value: Any):
    refused(lambda: read({key: value}), ConfigError, f"text_config.{key}", repr(value))
    refused(lambda: read(**{key: value}), ConfigError, key, repr(value))


@pytest.mark.parametrize("key", ["num_experts", "top_k_experts", "moe_intermediate_size"])
def test_a_missing_size_without_a_default_is_named(key: str):
    refused(lambda: read(drop=(key,)), ConfigError, key)
    refused(lambda: read({key: None}), ConfigError, key)


@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_left_out_but_never_null(key: str):
    assert ModelConfig.from_dict(file({"layer_types": None}, drop=(key,)))
    if key not in ("pad_token_id", "bos_token_id"):
        refused(lambda: read({key: None}), ConfigError, f"text_config.{key}", "None")


@pytest.mark.parity
@pytest.mark.parametrize("family", ["diffusion_gemma", "gemma4", "gemma4_text"])
def test_what_a_file_leaves_out_is_what_transformers_makes_of_it(family: str):
    import transformers

    theirs = {
        "diffusion_gemma": transformers.DiffusionGemmaConfig,
        "gemma4": transformers.Gemma4Config,
        "gemma4_text": transformers.Gemma4TextConfig,
    }[family]
    given = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16, "enable_moe_block": True}
    given |= {"hidden_size_per_layer_input": 0}
    data = given if family == "gemma4_text" else {"text_config": given}
    ours = ModelConfig.from_dict({"model_type": family, **data})
    made = theirs(**data)
    text = made.get_text_config()
    fields = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_attention_heads": "num_heads",
        "sliding_window": "sliding_window",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "rms_norm_eps",
        "final_logit_softcapping": "softcap",
        "pad_token_id": "pad_id",
        "bos_token_id": "bos_id",
    }
    assert {name: getattr(ours, name) for name in fields.values()} == {
        name: getattr(text, other) for other, name in fields.items()
    }
    sizes = [(text.per_layer_config[i].head_dim, text.per_layer_config[i].num_key_value_heads) for i in range(30)]
    assert [(layer.head_dim, layer.kv_heads) for layer in ours.layers] == sizes
    assert [layer.kind for layer in ours.layers] == text.layer_types
    assert ours.image_id == getattr(made, "image_token_id", None)
    assert ours.eos_ids == (text.eos_token_id,)


def test_only_gemma4_embeds_placeholders_as_the_pad_token():
    given = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16, "enable_moe_block": True}
    given |= {"hidden_size_per_layer_input": 0}
    data = {"model_type": "gemma4", "text_config": given}
    assert ModelConfig.from_dict(data).placeholder_ids == (258_880, 258_884, 258_881)
    assert ModelConfig.from_dict({**data, "audio_token_id": None, "video_token_id": 7}).placeholder_ids == (258_880, 7)
    assert ModelConfig.from_dict({**data, "text_config": given | {"pad_token_id": None}}).placeholder_ids == ()
    assert ModelConfig.from_dict({"model_type": "gemma4_text", **given}).placeholder_ids == ()
    assert ModelConfig.from_dict(PUBLISHED).placeholder_ids == ()
    refused(lambda: ModelConfig.from_dict({**data, "video_token_id": "<|video|>"}), ConfigError, "video_token_id")


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("vocab_size", 0, "vocab_size"),
        ("hidden_size", -1, "hidden_size"),
        ("hidden_size", 32.0, "hidden_size"),
        ("hidden_size", "32", "hidden_size"),
        ("hidden_size", True, "hidden_size"),
        ("num_hidden_layers", 0, "num_hidden_layers"),
        ("num_hidden_layers", 3, "layer_types"),
        ("layer_types", ["strided", "full_attention"], "layer_types"),
        ("sliding_window", 0, "sliding_window"),
        ("top_k_experts", 5, "top_k_experts"),
        ("head_dim", 7, "head_dim of layer 0"),
        ("global_head_dim", 15, "head_dim of layer 1"),
        ("num_key_value_heads", 3, "num_key_value_heads of layer 0"),
        ("num_global_key_value_heads", 3, "num_key_value_heads of layer 1"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("final_logit_softcapping", 0, "final_logit_softcapping"),
        ("final_logit_softcapping", None, "final_logit_softcapping"),
        ("final_logit_softcapping", float("inf"), "final_logit_softcapping"),
        ("per_layer_config", {"1": {"sliding_window": 4}}, "per_layer_config.1.sliding_window"),
    ],
)
def test_a_value_out_of_range_is_named(key: str, value: Any, name: str):
    refused(
        lambda: read({key: value}), ConfigError, name, repr(value) if "." not in name and "layer" not in name else ""
    )


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"rope_type": "yarn", "rope_theta": 1e4}, "rope_type"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"rope_type": "proportional", "rope_theta": 1e4, "factor": -1}, "factor"),
        ({"rope_type": "default", "rope_theta": 1e4, "beta_fast": 32}, "rope_parameters.beta_fast"),
    ],
)
def test_an_unknown_rope_is_refused(entry: dict[str, Any], name: str):
    refused(lambda: read({"rope_parameters": {"sliding_attention": entry}}), ConfigError, name)


def test_two_head_sizes_in_one_kind_are_refused_by_layer():
    refused(
        lambda: replace(TINY, layers=(SLIDING, FULL, replace(FULL, head_dim=8))), ConfigError, "head_dim of layer 2"
    )


def test_values_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        TINY.hidden_size = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Sampling(48)  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------- the sibling

SIBLING = replace(TINY, family="gemma4", canvas_length=1)
DENSE: dict[str, Any] = {"num_experts": 0, "top_k_experts": 0, "expert_size": 0}


@pytest.mark.parametrize("family", ["gemma4", "gemma4_text"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        DENSE,
        {"keys_are_values": False},
        {"keys_are_values": False, "layers": (SLIDING, FULL, replace(SLIDING, kv_heads=1), FULL)},
        {"softcap": None},
        {"eos_ids": (1, 106, 50), "pad_id": None},
    ],
    ids=["experts", "dense", "values of their own", "layers that differ", "no softcap", "ids"],
)
def test_a_sibling_round_trips(family: Any, changes: dict[str, Any]):
    config = replace(SIBLING, family=family, image_id=63 if family == "gemma4" else None, **changes)
    data = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(data) == config
    assert ModelConfig.from_dict(data).to_dict() == data
    assert ("text_config" in data) == (family == "gemma4")
    assert "canvas_length" not in data


def test_the_sibling_of_26_billion_is_the_same_stack_without_a_canvas():
    ours, its = PRESETS["diffusiongemma-26B-A4B"](), PRESETS["gemma4-26B-A4B"]()
    assert replace(its, family=ours.family, canvas_length=256) == ours
    assert (its.has_canvas, ours.has_canvas) == (False, True)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"family": "gemma5"}, "family"),
        ({"canvas_length": 12}, "canvas_length"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 0, "top_k_experts": 0}, "num_experts"),
        ({"expert_size": 0}, "expert_size"),
        ({"softcap": 0}, "final_logit_softcapping"),
        ({"keys_are_values": None}, "attention_k_eq_v"),
        ({"family": "diffusion_gemma", **DENSE}, "num_experts"),
        ({"family": "diffusion_gemma", "softcap": None}, "final_logit_softcapping"),
        ({"family": "diffusion_gemma", "keys_are_values": False}, "attention_k_eq_v"),
    ],
)
def test_invalid_families_are_named(changes: dict[str, Any], name: str):
    refused(lambda: replace(SIBLING, **changes), ConfigError, name)


def test_layers_without_the_switch_have_no_experts_whatever_else_the_file_says():
    data = SIBLING.to_dict()
    data["text_config"]["enable_moe_block"] = False
    assert ModelConfig.from_dict(data) == replace(SIBLING, **DENSE)
    data["text_config"]["enable_moe_block"] = "yes"
    refused(lambda: ModelConfig.from_dict(data), ConfigError, "text_config.enable_moe_block", "'yes'")


@pytest.mark.parametrize("key", ["num_experts", "top_k_experts", "moe_intermediate_size", "hidden_size"])
def test_a_missing_size_of_a_sibling_is_named(key: str):
    data = SIBLING.to_dict()
    data["text_config"][key] = None
    refused(lambda: ModelConfig.from_dict(data), ConfigError, f"text_config.{key}")


def test_the_full_layers_own_heads_count_only_where_keys_are_values():
    data = SIBLING.to_dict()
    assert sizes(ModelConfig.from_dict(data)) == [(8, 2), (16, 1)]
    data["text_config"]["attention_k_eq_v"] = False
    assert sizes(ModelConfig.from_dict(data)) == [(8, 2), (16, 2)]


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("steps", value) for value in (0, -1, 1.5, True, "48", None)],
        *[("entropy_bound", value) for value in (0, -0.1, float("nan"), float("inf"), "0.1", True)],
        *[("t_min", value) for value in (-1.0, 1e31, float("nan"), float("inf"))],
        *[("t_max", value) for value in (0.3, float("nan"), float("inf"), None)],
        *[("stability", value) for value in (-1, 0.5, False)],
        *[("max_verifications", value) for value in (-1, 0.5, True, "4")],
        *[("max_repairs", value) for value in (-1, 0.5, True, "4", 1001)],
        *[("repair_below", value) for value in (0, 1, -0.5, True, "a")],
        *[("checked_spans", value) for value in (5, "code", [(0, 1)])],
        *[("confidence", value) for value in (-0.001, float("nan"), "x")],
        *[("stop", value) for value in ("", ("a", ""), (1,), None, 3, {"a"}, b"a")],
        *[(rule, value) for rule in ("accept", "settle") for value in (0.1, "EntropyBound", True)],
    ],
)
def test_every_sampling_field_is_checked(field: str, value: Any):
    refused(lambda: Sampling(**{field: value}), RequestError, field, repr(value) if value != "" else "('',)")
    refused(lambda: Sampling().with_(**{field: value}), RequestError, field)


@pytest.mark.parametrize("stop", ["ab", ["ab"], ("ab",)])
def test_stop_may_be_one_text_or_many(stop: Any):
    assert Sampling(stop=stop).stop == ("ab",)


def test_with_changes_only_the_given_fields():
    assert Sampling(steps=5, stop="x").with_(t_max=0.9) == Sampling(steps=5, stop="x", t_max=0.9)
    refused(lambda: Sampling().with_(temperature=1.0), RequestError, "temperature")


def test_a_canvas_is_repaired_or_verified():
    refused(lambda: Sampling(max_repairs=1, max_verifications=1), RequestError, "max_repairs is 1")


@pytest.mark.parametrize("rule", ["accept", "settle", "checked_spans"])
def test_a_custom_rule_cannot_be_saved(rule: str):
    sampling = Sampling(**{rule: len})
    refused(lambda: GenerationConfig(sampling=sampling).to_dict(), ConfigError, rule, "len")


EDITS: dict[str, tuple[Any, ...]] = {
    "logit_bias": ([5], {"5": 1.0}, {-1: 1.0}, {True: 1.0}, {5: 100.5}, {5: math.nan}, {5: "1"}, 7),
    "allowed_token_ids": ([], "12", [1.5], [-1], {5: 1.0}, 7),
    "suppress_tokens": (None, "12", [None], [-1], 7),
    "presence_penalty": (2.1, -2.1, math.nan, "1", None, True),
    "frequency_penalty": (2.1, -2.1, math.inf, "1", None),
    "repetition_penalty": (0, -1, 1e4, 1e-9, math.nan, None),
    "repeat_last_n": (-1, 1.5, True, 2**31),
    "top_k": (0, -1, 1.5, True, 2**31),
    "top_p": (0, -0.1, 1.1, None, math.nan),
    "min_p": (-0.1, 1.1, None, math.nan),
}


@pytest.mark.parametrize("kind", [Sampling, AutoregressiveSampling])
@pytest.mark.parametrize("field", EDITS)
def test_an_edit_out_of_range_is_refused_by_name(kind: Any, field: str):
    for value in EDITS[field]:
        refused(lambda value=value: kind(**{field: value}), RequestError, f"sampling field {field}")
        refused(lambda value=value: kind().with_(**{field: value}), RequestError, field)


@pytest.mark.parametrize("kind", [Sampling, AutoregressiveSampling])
def test_edits_are_kept_as_plain_values_of_their_own(kind: Any):
    bias = {np.int64(9): np.float32(1.5), 2: 1}
    one = kind(logit_bias=bias, allowed_token_ids=np.array([4, 2, 4]), suppress_tokens={7, 3}, top_k=np.int32(4))
    bias[2] = 50
    assert (one.logit_bias, one.allowed_token_ids, one.suppress_tokens) == ({2: 1.0, 9: 1.5}, (2, 4), (3, 7))
    assert all(type(x) is int for x in (*one.logit_bias, *one.allowed_token_ids, *one.suppress_tokens, one.top_k))
    same = kind(logit_bias={9: 1.5, 2: 1.0}, allowed_token_ids=[2, 4], suppress_tokens=[3, 7], top_k=4)
    assert (one, hash(one)) == (same, hash(same)) and one != same.with_(logit_bias={})
    refused(lambda: kind(allowed_token_ids=[1, 2], suppress_tokens=[1, 2, 3]), RequestError, "allowed_token_ids")


def test_sampling_without_edits_edits_nothing():
    for plain in (Sampling(), AutoregressiveSampling(temperature=1.0)):
        assert not (plain.edits_logits or plain.truncates or plain.has_penalties or plain.changed)
    assert not Sampling(presence_penalty=1, repeat_last_n=0).edits_logits
    for field, value in {"logit_bias": {5: 0.5}, "presence_penalty": 1, "suppress_tokens": [4]}.items():
        assert Sampling(**{field: value}).edits_logits and not Sampling(**{field: value}).truncates


def test_edits_that_the_file_cannot_hold_are_not_saved_without_them():
    refused(lambda: GenerationConfig(sampling=Sampling(top_k=4)).to_dict(), ConfigError, "top_k", "4")
    edited = AutoregressiveSampling(logit_bias={4: 1.0})
    refused(lambda: GenerationConfig(autoregressive=edited).to_dict(), ConfigError, "logit_bias")


@pytest.mark.parametrize("config", [TINY, SIBLING])
def test_edits_of_single_tokens_are_read_and_written_as_the_reference_does(config: ModelConfig):
    """min_p needs do_sample, the other two do not; all three are written again."""
    told = {"repetition_penalty": 1.2, "suppress_tokens": [3, 5], "min_p": 0.1}
    read = GenerationConfig.from_dict({"do_sample": True, "top_k": 0, **told}, config)
    wanted = AutoregressiveSampling(temperature=1.0, min_p=0.1, repetition_penalty=1.2, suppress_tokens=(3, 5))
    assert read.autoregressive == wanted and not read.sampling.changed
    assert GenerationConfig.from_dict(read.to_dict(), config) == read
    assert GenerationConfig.from_dict(told, config).autoregressive == wanted.with_(temperature=0.0, min_p=0.0)
    plain = replace(read, autoregressive=AutoregressiveSampling())
    assert GenerationConfig.from_dict(plain.to_dict(), config).autoregressive == AutoregressiveSampling()
    with pytest.raises(ConfigError, match="repetition_penalty is 0"):
        GenerationConfig.from_dict({"repetition_penalty": 0}, config)


def test_boundary_values_are_allowed():
    sampling = Sampling(steps=1, t_min=0.5, t_max=0.5, stability=0, confidence=0)
    assert (sampling.steps, sampling.t_min, sampling.stability, sampling.confidence) == (1, sampling.t_max, 0, 0)
    refused(lambda: Sampling(t_min=0, t_max=0), RequestError, "t_max", "0")


# --------------------------------------------------------------------------------------------- generation_config.json

REFERENCE = {
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "max_new_tokens": 256,
}


def test_the_reference_s_generation_config_is_read():
    generation = GenerationConfig.from_dict(REFERENCE, TINY)
    assert generation.sampling == Sampling()
    assert generation.stop_ids == (1, 106, 50)
    assert generation.to_dict() == REFERENCE


def test_every_generation_field_is_read():
    other = {
        "max_denoising_steps": 7,
        "sampler_config": {"entropy_bound": 0.3},
        "t_min": 0.2,
        "t_max": 0.9,
        "stability_threshold": 2,
        "confidence_threshold": 0.01,
        "eos_token_id": 3,
    }
    generation = GenerationConfig.from_dict(other, TINY)
    wanted = Sampling(steps=7, entropy_bound=0.3, t_min=0.2, t_max=0.9, stability=2, confidence=0.01)
    assert (generation.sampling, generation.stop_ids) == (wanted, (3,))
    assert GenerationConfig.from_dict(generation.to_dict(), TINY) == generation


@pytest.mark.parametrize("data", [{}, dict.fromkeys(REFERENCE), {"sampler_config": {"entropy_bound": None}}])
def test_null_or_absent_means_the_default(data: dict[str, Any]):
    generation = GenerationConfig.from_dict(data, replace(TINY, eos_ids=(5, 6)))
    assert (generation.sampling, generation.stop_ids) == (Sampling(), (5, 6))


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("t_min", 0.0, "t_min"),  # after the last step: no step has it
        ("t_min", 0, "t_min"),
        ("t_min", 0.8, "t_min"),
        ("stability_threshold", 0, "stability"),
        ("confidence_threshold", 0, "confidence"),
        ("max_denoising_steps", 1, "steps"),
        ("sampler_config", {"entropy_bound": 1e30}, "entropy_bound"),
    ],
)
def test_an_extreme_value_that_has_a_meaning_is_read(key: str, value: Any, field: str):
    sampling = GenerationConfig.from_dict({**REFERENCE, key: value}, TINY).sampling
    assert getattr(sampling, field) == (value["entropy_bound"] if isinstance(value, dict) else value)


@pytest.mark.parametrize("limit", [{"temperature": 0}, {"temperature": 0.0}, {"top_p": 0}, {"top_p": 0.0}])
def test_at_its_limit_sampling_takes_the_likeliest_token(limit: dict[str, Any]):
    read = GenerationConfig.from_dict({"do_sample": True, "top_k": 64, **limit}, TINY)
    assert read.autoregressive.temperature == 0
    assert GenerationConfig.from_dict(read.to_dict(), TINY).autoregressive == read.autoregressive


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("max_denoising_steps", 0, "steps"),
        ("t_min", float("nan"), "t_min"),
        ("t_max", 0.1, "t_max"),
        ("stability_threshold", -1, "stability"),
        ("confidence_threshold", "low", "confidence"),
        ("sampler_config", {"_cls_name": "GreedySamplerConfig"}, "_cls_name"),
        ("sampler_config", {"entropy_bound": -1}, "entropy_bound"),
        ("eos_token_id", "</s>", "eos_token_id"),
        ("eos_token_id", [1, -2], "eos_token_id"),
    ],
)
def test_a_bad_generation_field_is_named(key: str, value: Any, name: str):
    refused(lambda: GenerationConfig.from_dict({**REFERENCE, key: value}, TINY), ConfigError, name)


FACTOR = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}}


@pytest.mark.parametrize(
    ("text", "outer", "name"),
    [
        ({}, {"canvas_length": 0}, "canvas_length"),
        ({"num_global_key_value_heads": 0}, {}, "num_global_key_value_heads"),
        ({"eos_token_id": "x"}, {}, "eos_token_id"),
        ({"pad_token_id": "x"}, {}, "pad_"),
        ({}, {"dtype": "float31"}, "dtype"),
        ({}, {"vision_config": 3}, "vision_config"),
        ({"rope_parameters": {"rope_theta": 5e5}}, {}, "rope_parameters"),
        ({"rope_parameters": FACTOR}, {}, "factor"),
        ({"rope_parameters": [1]}, {}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": "x"}}, {}, "rope_parameters"),
        ({"per_layer_config": [1]}, {}, "per_layer_config"),
        ({"per_layer_config": {"1": 3}}, {}, "per_layer_config"),
        ({"per_layer_config": {"7": {"head_dim": 4}}}, {}, "per_layer_config"),
        ({"layer_types": 5}, {}, "layer_types"),
    ],
)
def test_a_value_of_another_kind_is_refused_and_never_ignored(text: dict[str, Any], outer: dict[str, Any], name: str):
    refused(lambda: read(text, **outer), ConfigError, name)


def test_a_sampler_config_that_is_no_object_is_refused():
    refused(lambda: GenerationConfig.from_dict({"sampler_config": "x"}, TINY), ConfigError, "sampler_config")


def test_a_kind_of_layer_is_checked():
    refused(lambda: replace(TINY, layers=(replace(FULL, kind="strided"),)), ConfigError, "strided")  # type: ignore[arg-type]
