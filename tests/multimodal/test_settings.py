"""What a checkpoint says about its tower and its pictures: read, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blockpress.config import PRESETS
from blockpress.config.vision import PictureSettings, PictureTokens, VisionConfig, pictures_see_themselves
from blockpress.errors import ConfigError

# As the published 26B-A4B checkpoints have it.
PUBLISHED = {
    "model_type": "gemma4_vision", "attention_bias": False, "attention_dropout": 0.0, "default_output_length": 280,
    "global_head_dim": 72, "head_dim": 72, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 4304, "max_position_embeddings": 131072, "num_attention_heads": 16, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": 10240,
    "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "standardize": True,
    "use_clipped_linears": False,
}  # fmt: skip
TOWER = VisionConfig.from_dict(PUBLISHED)


def test_the_published_tower_is_read() -> None:
    assert (TOWER.num_layers, TOWER.hidden_size, TOWER.intermediate_size) == (27, 1152, 4304)
    assert (TOWER.num_heads, TOWER.head_dim, TOWER.patch_size, TOWER.pooling) == (16, 72, 16, 3)
    assert (TOWER.standardize, TOWER.clipped, TOWER.rope_theta, TOWER.positions) == (True, False, 100.0, 10_240)


@pytest.mark.parity
def test_the_defaults_are_the_reference_s() -> None:
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    theirs = Gemma4VisionConfig()
    assert VisionConfig.from_dict({}) == VisionConfig.from_dict(theirs.to_dict())
    assert VisionConfig.from_dict({}).num_layers == theirs.num_hidden_layers
    written = Gemma4ImageProcessorPil(patch_size=16).to_dict()
    assert PictureSettings.from_dict(TOWER, written) == PictureSettings.from_dict(TOWER, {})
    assert PictureSettings.from_dict(TOWER, {}) == PictureSettings(patch_size=16, pooling=3, max_soft_tokens=280)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_type": "siglip"}, "model_type"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"head_dim": 70}, "head_dim"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"output_proj_dims": 8}, "output_proj_dims"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"rope_parameters": {"factor": 2}}, "factor"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"standardize": "yes"}, "standardize"),
        ({"use_clipped_linears": 1}, "use_clipped_linears"),
    ],
    ids=str,
)
def test_another_tower_is_refused_by_name(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        VisionConfig.from_dict(PUBLISHED | change)


def test_a_processor_is_read() -> None:
    read = PictureSettings.from_dict(
        TOWER,
        {
            "image_seq_length": 280,
            "processor_class": "Gemma4Processor",
            "image_processor": {
                "max_soft_tokens": 560,
                "patch_size": 16,
                "do_normalize": True,
                "image_mean": [0.0] * 3,
            },
            "video_processor": {"max_soft_tokens": 140, "num_frames": 32},
        },
    )
    assert (read.max_soft_tokens, read.video_soft_tokens) == (560, 140)
    # 32 is the library's own default; any other number is somebody's choice, unless they chose a rate.
    assert (read.frames_per_second, read.video_frames) == (1.0, None)
    assert PictureSettings.from_dict(TOWER, {"video_processor": {"num_frames": 8}}).video_frames == 8
    rated = PictureSettings.from_dict(TOWER, {"video_processor": {"num_frames": None, "fps": 2}})
    assert (rated.frames_per_second, rated.video_frames) == (2, None)


@pytest.mark.parametrize(
    ("images", "name"),
    [
        ({"patch_size": 14}, "patch_size"),
        ({"pooling_kernel_size": 2}, "pooling_kernel_size"),
        ({"max_soft_tokens": 100}, "max_soft_tokens"),
        ({"resample": 2}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_convert_rgb": False}, "do_convert_rgb"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"do_normalize": True, "image_std": [0.5, 0.5, 0.5]}, "image_std"),
        ({"do_normalize": True, "image_mean": 0.5}, "image_mean"),
    ],
    ids=str,
)
def test_another_processor_is_refused_by_name(images: dict[str, Any], name: str) -> None:
    for data in (images, {"image_processor": images}):
        with pytest.raises(ConfigError, match=name):
            PictureSettings.from_dict(TOWER, data)


@pytest.mark.parametrize(
    ("videos", "name"),
    [
        ({"max_soft_tokens": 71}, "video_soft_tokens"),
        ({"fps": 0}, "fps"),
        ({"num_frames": 0}, "num_frames"),
        ({"fps": 1, "num_frames": 8}, "num_frames"),
        ([1], "video_processor"),
        ({"patch_size": 8}, "video_processor.patch_size"),
    ],
    ids=str,
)
def test_another_video_processor_is_refused_by_name(videos: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        PictureSettings.from_dict(TOWER, {"video_processor": videos})


def test_the_published_ids_and_attention() -> None:
    published = PRESETS["diffusiongemma-26B-A4B"]()
    assert PictureTokens.of(published) == PictureTokens(image=258_880, begin=255_999, end=258_882)
    assert pictures_see_themselves(published)
    said = {"text_config": {"use_bidirectional_attention": "vision"}}
    assert pictures_see_themselves(replace(published, source=said))
    assert not pictures_see_themselves(replace(published, source={"text_config": {}}))
