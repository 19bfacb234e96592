"""`config.json`: the shape of a network as a frozen value.

A key that would change the maths in a way that this package does not know is refused by name; a neutral or unknown one
is kept in `source` and written back. Source: the published config.json and what `transformers` 5.23 saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockpress.config.checks import check, is_count, is_number
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

FAMILY = "diffusion_gemma"
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts", "top_k_experts", "moe_intermediate_size",
)  # fmt: skip
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_heads", "sliding_window", "num_experts", "top_k_experts",
    "expert_size", "canvas_length", "context_length",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")

# Fields whose other values would need maths that the stack does not have. Value: what we implement.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    "tie_word_embeddings": (True, None),
    "use_bidirectional_attention": ("vision", None),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "use_double_wide_mlp": (False, None),
    "attn_logit_softcapping": (None,),
    "quantization_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DiffusionGemma network, as `config.json` describes it.

    Sizes are numbers of features, `context_length` and `canvas_length` numbers of tokens. `source` is the file as it
    was read: what this class does not name travels through `to_dict` untouched.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    sliding_window: int
    sliding_rope: Rope = SLIDING_ROPE
    full_rope: Rope = FULL_ROPE
    num_experts: int
    top_k_experts: int
    expert_size: int
    canvas_length: int = 256
    context_length: int = 131_072
    rms_norm_eps: float = 1e-6
    softcap: float = 30.0
    pad_id: int | None = 0
    eos_ids: tuple[int, ...] = (1,)
    bos_id: int | None = 2
    image_id: int | None = None
    vision: Mapping[str, Any] | None = None
    dtype: str = "float32"
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check(is_count(getattr(self, name)), name, getattr(self, name), "a whole number of at least 1")
        most = f"at most num_experts ({self.num_experts})"
        check(self.top_k_experts <= self.num_experts, "top_k_experts", self.top_k_experts, most)
        check(is_number(self.rms_norm_eps) and self.rms_norm_eps >= 0, "rms_norm_eps", self.rms_norm_eps, "0 or more")
        check(is_number(self.softcap) and self.softcap > 0, "final_logit_softcapping", self.softcap, "a number above 0")
        for name, value in (("pad", self.pad_id), ("bos", self.bos_id), ("image", self.image_id)):
            check(value is None or is_count(value, 0), f"{name}_token_id", value, "a token id or null")
        for token in self.eos_ids:
            check(is_count(token, 0), "eos_token_id", token, "a token id or a list of them")
        check(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        check(self.vision is None or isinstance(self.vision, Mapping), "vision_config", self.vision, "an object")
        check(bool(self.layers), "layer_types", (), "a list with at least one layer")
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)

    def _check_layer(self, index: int, layer: LayerConfig) -> None:
        dim, heads = layer.head_dim, layer.kv_heads
        check(is_count(dim, 2) and dim % 2 == 0, f"head_dim of layer {index}", dim, "an even number")
        divides = is_count(heads) and self.num_heads % heads == 0
        need = f"a divisor of num_attention_heads ({self.num_heads})"
        check(divides, f"num_key_value_heads of layer {index}", heads, need)
        first = next(other.head_dim for other in self.layers if other.kind == layer.kind)
        alike = f"{first}, as in the other layers of its kind: they share one rotary embedding"
        check(dim == first, f"head_dim of layer {index}", dim, alike)

    def rope(self, kind: LayerKind) -> Rope:
        """The rotary embedding of that kind of layer."""
        return self.sliding_rope if kind == "sliding_attention" else self.full_rope

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`.

        Args:
            data: the parsed file. Both spellings of the full layers' sizes are read: `global_head_dim` with
                `num_global_key_value_heads`, and `per_layer_config`, which holds only differences.

        Raises:
            ConfigError: another family, a missing field, a value out of range, or a key that changes the maths.
        """
        text = _check_family(data)
        sliding_rope, full_rope = read_ropes(text)
        eos = text.get("eos_token_id")
        eos = 1 if eos is None else eos
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            layers=read_layers(text),
            sliding_window=text.get("sliding_window", 512),
            sliding_rope=sliding_rope,
            full_rope=full_rope,
            num_experts=text["num_experts"],
            top_k_experts=text["top_k_experts"],
            expert_size=text["moe_intermediate_size"],
            canvas_length=256 if data.get("canvas_length") is None else data["canvas_length"],
            context_length=text.get("max_position_embeddings", 131_072),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            softcap=text.get("final_logit_softcapping", 30.0),
            pad_id=text.get("pad_token_id", 0),
            eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
            bos_id=text.get("bos_token_id", 2),
            image_id=data.get("image_token_id", 258_880),
            vision=data.get("vision_config"),
            dtype=data.get("dtype") or data.get("torch_dtype") or text.get("dtype") or "float32",
            source=data,
        )

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this value, in the published layout; unknown keys of `source` are kept."""
        out: dict[str, Any] = {k: v for k, v in self.source.items() if k != "torch_dtype"}
        text: dict[str, Any] = dict(self.source.get("text_config", {}))
        for old in ("global_head_dim", "num_global_key_value_heads", "per_layer_config"):
            text.pop(old, None)
        general = next((layer for layer in self.layers if layer.sliding), self.layers[0])
        text |= {
            "model_type": FAMILY + "_text",
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
            "num_experts": self.num_experts,
            "top_k_experts": self.top_k_experts,
            "moe_intermediate_size": self.expert_size,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.rms_norm_eps,
            "final_logit_softcapping": self.softcap,
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": self.pad_id,
            "eos_token_id": list(self.eos_ids) if len(self.eos_ids) != 1 else self.eos_ids[0],
            "bos_token_id": self.bos_id,
        }
        text |= write_full_sizes(self.layers, general)
        out |= {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "model_type": FAMILY,
            "text_config": text,
            "canvas_length": self.canvas_length,
            "image_token_id": self.image_id,
            "dtype": self.dtype,
        }
        if self.vision is not None:
            out["vision_config"] = dict(self.vision)
        return out


def _check_family(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text part of a config.json of our family; refuses what the stack does not compute."""
    family = data.get("model_type")
    if family != FAMILY:
        raise ConfigError(
            f"config field model_type is {family!r}",
            hint=f"blockpress runs the family {FAMILY!r}; give it a checkpoint of that family",
        )
    text = data.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"config field text_config is {text!r}", hint="text_config must be an object")
    for key, allowed in _NEUTRAL.items():
        for part, where in ((data, ""), (text, "text_config.")):
            if key in part:
                check(part[key] in allowed, where + key, part[key], " or ".join(map(repr, allowed)))
    missing = [name for name in _REQUIRED if text.get(name) is None]
    check(not missing, f"text_config.{missing[0] if missing else ''}", None, "given: it has no default")
    return text
