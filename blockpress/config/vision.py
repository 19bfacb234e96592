"""The vision tower's shape, how pictures are cut into patches, and the token ids that mark a picture in a prompt.

Three sources: `vision_config` of config.json (the tower), processor_config.json or preprocessor_config.json (resizing
and the budget of soft tokens), and the token ids of config.json.

Invariant: a value that exists is valid, and a key of a file that would change the maths in a way that is not
implemented is refused by name. No torch here.

Run it:  python -m pytest tests/multimodal/test_settings.py
Source: `Gemma4VisionConfig`, `Gemma4ImageProcessorPil`, `Gemma4VideoProcessor`, `DiffusionGemmaConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockpress.config.checks import is_count, is_number, require
from blockpress.config.model import ModelConfig

BUDGETS = (70, 140, 280, 560, 1120)
"""Most soft tokens per picture: the budgets that the model was trained with."""

_COUNTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10_240,
}
"""Defaults of `Gemma4VisionConfig`."""

# Fields of which the tower implements only these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("gemma4_vision",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
}
_NEUTRAL_IMAGES: dict[str, tuple[Any, ...]] = {
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "do_rescale": (True,),
    "resample": (3, None),
}
# `transformers` writes this default into every file that it saves; only another number is a choice.
_LIBRARY_FRAMES = 32

MINIMAL_TOWER: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 4,
    # With a pooling of 1 the reference drops every soft token.
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
"""The smallest tower that the reference builds; without one, it would make up a tower of 167 million parameters."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision tower, as `vision_config` describes it. Sizes are numbers of features; `patch_size` is in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    patch_size: int
    pooling: int
    """A soft token is the mean of pooling x pooling patches."""
    positions: int
    """Rows of each of the two position tables: most patches in a row or column of a picture."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    clipped: bool = False
    """Inputs and outputs of every linear layer are clamped to limits from the checkpoint."""
    standardize: bool = False
    """Soft tokens are shifted and scaled by vectors from the checkpoint."""

    def __post_init__(self) -> None:
        names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "kv_heads", "head_dim", "patch_size")
        for name in (*names, "pooling", "positions"):
            require(
                is_count(getattr(self, name)), f"vision_config.{name}", getattr(self, name), "a whole number from 1"
            )
        require(
            self.head_dim % 4 == 0, "vision_config.head_dim", self.head_dim, "a multiple of 4: two axes, two halves"
        )
        divides = self.num_heads % self.kv_heads == 0
        need = f"a divisor of num_attention_heads ({self.num_heads})"
        require(divides, "vision_config.num_key_value_heads", self.kv_heads, need)
        valid = is_number(self.rms_norm_eps) and self.rms_norm_eps >= 0
        require(valid, "vision_config.rms_norm_eps", self.rms_norm_eps, "0 or more")
        valid = is_number(self.rope_theta) and self.rope_theta > 0
        require(valid, "vision_config.rope_theta", self.rope_theta, "a number above 0")
        for name in ("clipped", "standardize"):
            require(
                isinstance(getattr(self, name), bool), f"vision_config.{name}", getattr(self, name), "true or false"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VisionConfig:
        """Read a `vision_config`.

        Raises:
            ConfigError: an unknown kind of tower, a value out of range, or a key that changes the maths.
        """
        require(isinstance(data, Mapping), "vision_config", data, "an object")
        _check_neutral(data, _NEUTRAL, "vision_config.")
        size = {}
        for name, default in _COUNTS.items():
            size[name] = data.get(name, default)
            require(is_count(size[name]), f"vision_config.{name}", size[name], "a whole number from 1")
        out = data.get("output_proj_dims", size["hidden_size"])
        need = f"hidden_size ({size['hidden_size']}): the projection reads what the tower gives"
        require(out == size["hidden_size"], "vision_config.output_proj_dims", out, need)
        return cls(
            hidden_size=size["hidden_size"],
            intermediate_size=size["intermediate_size"],
            num_layers=size["num_hidden_layers"],
            num_heads=size["num_attention_heads"],
            kv_heads=size["num_key_value_heads"],
            head_dim=size["head_dim"],
            patch_size=size["patch_size"],
            pooling=size["pooling_kernel_size"],
            positions=size["position_embedding_size"],
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=_read_theta(data.get("rope_parameters")),
            clipped=_flag(data, "use_clipped_linears"),
            standardize=_flag(data, "standardize"),
        )


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How pictures are resized and cut into patches, and which frames of a video are used."""

    patch_size: int
    pooling: int
    max_soft_tokens: int = 280
    video_soft_tokens: int = 70
    """Most soft tokens per frame of a video."""
    frames_per_second: float = 1.0
    video_frames: int | None = None
    """The number of frames, evenly spaced, instead of frames per second."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "pooling"):
            require(is_count(getattr(self, name)), name, getattr(self, name), "a whole number from 1")
        for name in ("max_soft_tokens", "video_soft_tokens"):
            value = getattr(self, name)
            require(is_count(value) and value in BUDGETS, name, value, f"one of {', '.join(map(str, BUDGETS))}")
        valid = is_number(self.frames_per_second) and self.frames_per_second > 0
        require(valid, "fps", self.frames_per_second, "a number above 0")
        valid = self.video_frames is None or is_count(self.video_frames)
        require(valid, "num_frames", self.video_frames, "a whole number from 1")

    @classmethod
    def from_dict(cls, vision: VisionConfig, data: Mapping[str, Any]) -> PictureSettings:
        """Read a processor_config.json, or a preprocessor_config.json, which has the same without `image_processor`.

        Args:
            vision: the tower that reads the patches; a file with other patches is refused.
            data: the parsed file; {} where the checkpoint has none: the defaults of `Gemma4ImageProcessor`.

        `num_frames` applies unless it is the 32 that `transformers` writes by itself: the model's own rule is one frame
        per second.
        """
        images, videos = data.get("image_processor", data), data.get("video_processor") or {}
        for part, where in ((images, "image_processor"), (videos, "video_processor")):
            require(isinstance(part, Mapping), where, part, "an object")
            _check_part(part, vision, f"{where}.")
        fps, frames = videos.get("fps"), videos.get("num_frames")
        frames = None if frames == _LIBRARY_FRAMES else frames
        one = fps is None or frames is None
        require(one, "video_processor.num_frames", frames, f"left out next to fps ({fps}): only one of them applies")
        return cls(
            patch_size=vision.patch_size,
            pooling=vision.pooling,
            max_soft_tokens=images.get("max_soft_tokens", 280),
            video_soft_tokens=videos.get("max_soft_tokens", 70),
            frames_per_second=1.0 if fps is None else fps,
            video_frames=frames,
        )


@dataclass(frozen=True, kw_only=True)
class PictureTokens:
    """Ids of `<|image|>` (placeholder and soft token), and of `<|image>` and `<image|>` around a picture."""

    image: int
    begin: int
    end: int

    @classmethod
    def of(cls, config: ModelConfig) -> PictureTokens:
        """The ids from a model's config.json; ConfigError where its vocabulary does not have them."""
        given = config.source
        image = 258_880 if config.image_id is None else config.image_id
        ids = {"image_token_id": image}
        ids |= {name: given.get(name, other) for name, other in (("boi_token_id", 255_999), ("eoi_token_id", 258_882))}
        for name, value in ids.items():
            known = is_count(value, 0) and value < config.vocab_size
            require(
                known, name, value, f"an id below vocab_size ({config.vocab_size}): the model has no token for pictures"
            )
        return cls(image=image, begin=ids["boi_token_id"], end=ids["eoi_token_id"])


def pictures_see_themselves(config: ModelConfig) -> bool:
    """Whether the tokens of one picture see each other in both directions, as the published models were trained.

    A config.json without `use_bidirectional_attention` reads pictures causally, as `transformers` does with it.
    """
    text = config.source.get("text_config")
    return text is None or text.get("use_bidirectional_attention") == "vision"


def _check_neutral(data: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in neutral.items():
        if key in data:
            require(data[key] in allowed, where + key, data[key], " or ".join(map(repr, allowed)))


def _check_part(part: Mapping[str, Any], vision: VisionConfig, where: str) -> None:
    _check_neutral(part, _NEUTRAL_IMAGES, where)
    for key, ours in (("patch_size", vision.patch_size), ("pooling_kernel_size", vision.pooling)):
        require(part.get(key, ours) == ours, where + key, part.get(key), f"{ours}, as vision_config has it")
    scale = part.get("rescale_factor", 1 / 255)
    require(is_number(scale) and math.isclose(scale, 1 / 255), where + "rescale_factor", scale, "1/255")
    if part.get("do_normalize"):
        for key, identity in (("image_mean", 0), ("image_std", 1)):
            values = part.get(key, [identity])
            neutral = isinstance(values, list | tuple) and all(value == identity for value in values)
            require(neutral, where + key, values, f"all {identity}: the tower itself scales pixels to -1..1")


def _read_theta(given: object) -> Any:
    """The theta of the axial rotary embedding, whose type the published file calls `default`."""
    if given is None:
        return 100.0
    require(isinstance(given, Mapping), "vision_config.rope_parameters", given, "an object")
    assert isinstance(given, Mapping)
    for key, value in given.items():
        known = key == "rope_theta" or (key == "rope_type" and value in ("axial", "default"))
        require(known, f"vision_config.rope_parameters.{key}", value, "left out, or rope_type 'axial' and a rope_theta")
    return given.get("rope_theta", 100.0)


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name, False)
    require(isinstance(value, bool) or value is None, f"vision_config.{name}", value, "true or false")
    return bool(value)
