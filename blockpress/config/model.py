"""`config.json`: the shape of a network as a frozen value.

A key that would change the maths in a way that is not implemented here is refused by name; a neutral or unknown one is
kept in `source` and written back. Source: the published config.json and what `transformers` 5.23 saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockpress.config.checks import is_count, is_number, require
from blockpress.config.families import CANVAS, FAMILIES, REASONS, SIZES, SOFTCAP, Family, Traits
from blockpress.config.layers import (
    FULL_ROPE,
    SLIDING_ROPE,
    LayerConfig,
    LayerKind,
    Rope,
    read_layers,
    read_ropes,
    write_full_sizes,
)
from blockpress.errors import ConfigError

FAMILY: Family = "diffusion_gemma"
_EXPERT_FIELDS = ("num_experts", "top_k_experts", "moe_intermediate_size")
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_heads", "sliding_window", "canvas_length", "context_length",
)  # fmt: skip
_EXPERTS = ("num_experts", "top_k_experts", "expert_size")
DTYPES = ("float32", "bfloat16", "float16")

# Fields of which the stack implements only these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    "tie_word_embeddings": (True, None),
    "use_bidirectional_attention": ("vision", None),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "use_double_wide_mlp": (False, None),
    "attn_logit_softcapping": (None,),
    "audio_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network of DiffusionGemma or of its sibling Gemma 4, as `config.json` describes it.

    Sizes are numbers of features, `context_length` and `canvas_length` numbers of tokens; a family without canvases
    writes one token at a time, so its `canvas_length` is 1. Without experts (a dense network) the three numbers that
    describe them are 0. `source` is the file as read: `to_dict` passes fields that this class does not name through.
    """

    family: Family = FAMILY
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    sliding_window: int
    sliding_rope: Rope = SLIDING_ROPE
    full_rope: Rope = FULL_ROPE
    keys_are_values: bool = True
    """Full layers have no v_proj: a value is the key before its norm and RoPE."""
    num_experts: int
    top_k_experts: int
    expert_size: int
    canvas_length: int = CANVAS
    context_length: int = SIZES["max_position_embeddings"]
    rms_norm_eps: float = SIZES["rms_norm_eps"]
    softcap: float | None = SOFTCAP
    pad_id: int | None = 0
    eos_ids: tuple[int, ...] = (1,)
    bos_id: int | None = 2
    image_id: int | None = None
    vision: Mapping[str, Any] | None = None
    dtype: str = "float32"
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.family in FAMILIES, "family", self.family, f"one of {', '.join(FAMILIES)}")
        for name in _COUNTS:
            require(is_count(getattr(self, name)), name, getattr(self, name), "a whole number of at least 1")
        self._check_family()
        most = f"at most num_experts ({self.num_experts})"
        require(self.top_k_experts <= self.num_experts, "top_k_experts", self.top_k_experts, most)
        require(is_number(self.rms_norm_eps) and self.rms_norm_eps >= 0, "rms_norm_eps", self.rms_norm_eps, "0 or more")
        named = {"pad_token_id": self.pad_id, "bos_token_id": self.bos_id, **self._placeholders()}
        for name, value in named.items():
            require(value is None or is_count(value, 0), name, value, "a token id or null")
        for token in self.eos_ids:
            require(is_count(token, 0), "eos_token_id", token, "a token id or a list of them")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(self.vision is None or isinstance(self.vision, Mapping), "vision_config", self.vision, "an object")
        require(bool(self.layers), "layer_types", (), "a list with at least one layer")
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)

    def _check_family(self) -> None:
        """Experts, a softcap and keys as values: required in DiffusionGemma, optional in Gemma 4."""
        # A dense network has none of the experts' three numbers; one of them alone is a mistake.
        dense = not self.has_canvas and not any(getattr(self, name) for name in _EXPERTS)
        for name in _EXPERTS:
            require(
                is_count(getattr(self, name), 0 if dense else 1), name, getattr(self, name), "a whole number above 0"
            )
        limited = is_number(self.softcap) and self.softcap is not None and self.softcap > 0
        need = "a number above 0" if self.has_canvas else "a number above 0, or null"
        require(
            limited or (self.softcap is None and not self.has_canvas), "final_logit_softcapping", self.softcap, need
        )
        require(isinstance(self.keys_are_values, bool), "attention_k_eq_v", self.keys_are_values, "true or false")
        if self.has_canvas:
            require(self.keys_are_values, "attention_k_eq_v", self.keys_are_values, f"true in the family {self.family}")
        else:
            need = f"1: the family {self.family} has no canvas, it writes token by token"
            require(self.canvas_length == 1, "canvas_length", self.canvas_length, need)

    def _check_layer(self, index: int, layer: LayerConfig) -> None:
        dim, heads = layer.head_dim, layer.kv_heads
        require(is_count(dim, 2) and dim % 2 == 0, f"head_dim of layer {index}", dim, "an even number")
        divides = is_count(heads) and self.num_heads % heads == 0
        need = f"a divisor of num_attention_heads ({self.num_heads})"
        require(divides, f"num_key_value_heads of layer {index}", heads, need)
        first = next(other.head_dim for other in self.layers if other.kind == layer.kind)
        alike = f"{first}, as in the other layers of its kind: they share one rotary embedding"
        require(dim == first, f"head_dim of layer {index}", dim, alike)

    def rope(self, kind: LayerKind) -> Rope:
        """The rotary embedding of that kind of layer."""
        return self.sliding_rope if kind == "sliding_attention" else self.full_rope

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids that are embedded as the pad token, as the reference of `gemma4` does: those of image, video and audio,
        whose embeddings its towers' features replace. The other families have none."""
        if self.family != "gemma4" or self.pad_id is None:
            return ()
        return tuple(number for number in self._placeholders().values() if number is not None)

    def _placeholders(self) -> dict[str, int | None]:
        others = {"video_token_id": 258_884, "audio_token_id": 258_881}
        return {"image_token_id": self.image_id} | {name: self.source.get(name, id) for name, id in others.items()}

    @property
    def has_canvas(self) -> bool:
        """Whether the network denoises canvases; Gemma 4 is autoregressive only."""
        return FAMILIES[self.family].has_canvas

    def has_value(self, layer: LayerConfig) -> bool:
        """Whether that layer has a v_proj of its own."""
        return layer.sliding or not self.keys_are_values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`.

        Args:
            data: the parsed file. Both spellings of the full layers' sizes are read: `global_head_dim` with
                `num_global_key_value_heads`, and `per_layer_config`, which has only differences.

        Raises:
            ConfigError: another family, a missing field, a value out of range, or a key that changes the maths.
        """
        family, text = _read_family(data)
        traits = FAMILIES[family]
        sliding_rope, full_rope = read_ropes(text)
        eos = text.get("eos_token_id")
        eos = 1 if eos is None else eos
        keys_are_values = traits.has_canvas or text["attention_k_eq_v"]
        length = data.get("canvas_length")
        return cls(
            family=family,
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            layers=read_layers(text, keys_are_values),
            sliding_window=text["sliding_window"],
            sliding_rope=sliding_rope,
            full_rope=full_rope,
            keys_are_values=keys_are_values,
            **_experts(text, traits),
            canvas_length=1 if not traits.has_canvas else CANVAS if length is None else length,
            context_length=text["max_position_embeddings"],
            rms_norm_eps=text["rms_norm_eps"],
            softcap=text["final_logit_softcapping"],
            pad_id=text["pad_token_id"],
            eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
            bos_id=text["bos_token_id"],
            image_id=data.get("image_token_id", 258_880) if traits.nested else None,
            vision=data.get("vision_config"),
            dtype=data.get("dtype") or data.get("torch_dtype") or text.get("dtype") or "float32",
            source=data,
        )

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this value, in the published layout; unknown keys of `source` are kept."""
        traits = FAMILIES[self.family]
        # Weights are not packed when they are written with this config, even if it was read with packed ones.
        dropped = ("torch_dtype", "quantization_config")
        kept: dict[str, Any] = {k: v for k, v in self.source.items() if k not in dropped}
        text = self._text_dict(traits, dict(kept.get("text_config", {})) if traits.nested else kept)
        out: dict[str, Any] = {"architectures": [traits.architecture], "dtype": self.dtype}
        if not traits.nested:
            return text | out
        out |= {"model_type": self.family, "text_config": text, "image_token_id": self.image_id}
        if self.has_canvas:
            out["canvas_length"] = self.canvas_length
        if self.vision is not None:
            out["vision_config"] = dict(self.vision)
        return kept | out

    def _text_dict(self, traits: Traits, text: dict[str, Any]) -> dict[str, Any]:
        """The text part of the file: the fields that were read, updated."""
        for old in ("global_head_dim", "num_global_key_value_heads", "per_layer_config", "quantization_config"):
            text.pop(old, None)
        general = next((layer for layer in self.layers if layer.sliding), self.layers[0])
        text |= {
            "model_type": traits.text_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": general.kv_heads,
            "head_dim": general.head_dim,
            "layer_types": [layer.kind for layer in self.layers],
            "sliding_window": self.sliding_window,
            "rope_parameters": {
                "sliding_attention": self.sliding_rope.to_dict(),
                "full_attention": self.full_rope.to_dict(),
            },
            "num_experts": self.num_experts or None,
            "top_k_experts": self.top_k_experts or None,
            "moe_intermediate_size": self.expert_size or None,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.rms_norm_eps,
            "final_logit_softcapping": self.softcap,
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": self.pad_id,
            "eos_token_id": list(self.eos_ids) if len(self.eos_ids) != 1 else self.eos_ids[0],
            "bos_token_id": self.bos_id,
        }
        if not self.has_canvas:
            text["enable_moe_block"] = self.num_experts > 0
            text["attention_k_eq_v"] = self.keys_are_values
            text["hidden_size_per_layer_input"] = 0  # without it, the reference would assume 256
        return text | write_full_sizes(self.layers, general, self.keys_are_values)


def _read_family(data: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family and the text part of a config.json, with the family's defaults; refuses what is not implemented."""
    family: Any = data.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"config field model_type is {family!r}",
            hint=f"blockpress runs the families {', '.join(FAMILIES)}; give it a checkpoint of one of them",
        )
    traits = FAMILIES[family]
    given = data.get("text_config") if traits.nested else data
    if not isinstance(given, Mapping):
        raise ConfigError(f"config field text_config is {given!r}", hint="text_config must be an object")
    text, where = {**traits.defaults, **given}, "text_config." if traits.nested else ""
    for key, allowed in _NEUTRAL.items():
        need = " or ".join(map(repr, allowed)) + (f" ({REASONS[key]})" if key in REASONS else "")
        for part, prefix in ((data, ""), (text, where)):
            if key in part:
                require(part[key] in allowed, prefix + key, part[key], need)
    moe = text.get("enable_moe_block")
    require(traits.has_canvas or isinstance(moe, bool), f"{where}enable_moe_block", moe, "true or false")
    for name in _EXPERT_FIELDS if traits.has_canvas or moe else ():
        require(text.get(name) is not None, where + name, None, "given: it has no default")
    for name in SIZES:
        nullable = name in ("pad_token_id", "bos_token_id")
        require(nullable or text[name] is not None, where + name, None, f"left out ({SIZES[name]}), or a number")
    return family, text


def _experts(text: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    """The experts' numbers; all 0 where the layers have no experts, whatever else the file says."""
    sparse = traits.has_canvas or text["enable_moe_block"]
    return {ours: text[name] if sparse else 0 for ours, name in zip(_EXPERTS, _EXPERT_FIELDS, strict=True)}
