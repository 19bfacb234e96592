"""`config.json`: the shape of a network as a frozen value.

A key that would change the maths in a way that this package does not know is refused by name; a neutral or unknown one
is kept in `source` and written back. Source: the published config.json and what `transformers` 5.23 saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from blockpress.config.checks import check, is_count, is_number
from blockpress.errors import ConfigError

FAMILY = "diffusion_gemma"
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts", "top_k_experts", "moe_intermediate_size",
)  # fmt: skip
LayerKind = Literal["sliding_attention", "full_attention"]

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
class Rope:
    """Rotary position embedding of one kind of layer.

    `proportional` rotates only the first `int(partial * head_dim // 2)` pairs and spreads their frequencies over the
    whole head; `default` rotates the first `partial` of the head with frequencies of that part.
    """

    theta: float
    kind: Literal["default", "proportional"] = "default"
    partial: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        check(is_number(self.theta) and self.theta > 0, "rope_theta", self.theta, "a number above 0")
        check(self.kind in ("default", "proportional"), "rope_type", self.kind, "'default' or 'proportional'")
        check(
            is_number(self.partial) and 0 <= self.partial <= 1,
            "partial_rotary_factor",
            self.partial,
            "a number from 0 to 1",
        )
        check(
            self.kind == "proportional" or self.partial == 1,
            "partial_rotary_factor",
            self.partial,
            "1 where rope_type is 'default'",
        )
        check(is_number(self.factor) and self.factor > 0, "factor", self.factor, "a number above 0")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rope:
        """Read one entry of `rope_parameters`; an unknown key there would change the angles, so it is refused."""
        known = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
        for key in data:
            check(key in known, f"rope_parameters.{key}", data[key], f"left out: only {', '.join(sorted(known))} count")
        return cls(
            theta=data.get("rope_theta", 10_000.0),
            kind=data.get("rope_type", "default"),
            partial=data.get("partial_rotary_factor", 1.0),
            factor=data.get("factor", 1.0) if data.get("rope_type") == "proportional" else 1.0,
        )

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind == "proportional":
            out["partial_rotary_factor"] = self.partial
            if self.factor != 1:
                out["factor"] = self.factor
        return out


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer's attention: its kind, the size of a head and the number of key/value heads."""

    kind: LayerKind
    head_dim: int
    kv_heads: int

    @property
    def sliding(self) -> bool:
        return self.kind == "sliding_attention"


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
    sliding_rope: Rope = Rope(theta=10_000.0)
    full_rope: Rope = Rope(theta=1_000_000.0, kind="proportional", partial=0.25)
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
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "sliding_window",
            "num_experts",
            "top_k_experts",
            "expert_size",
            "canvas_length",
            "context_length",
        ):
            check(is_count(getattr(self, name)), name, getattr(self, name), "a whole number of at least 1")
        check(bool(self.layers), "layer_types", (), "a list with at least one layer")
        check(
            self.top_k_experts <= self.num_experts,
            "top_k_experts",
            self.top_k_experts,
            f"at most num_experts ({self.num_experts})",
        )
        check(is_number(self.rms_norm_eps) and self.rms_norm_eps >= 0, "rms_norm_eps", self.rms_norm_eps, "0 or more")
        check(is_number(self.softcap) and self.softcap > 0, "final_logit_softcapping", self.softcap, "a number above 0")
        for index, layer in enumerate(self.layers):
            where = f"layer {index}"
            check(
                is_count(layer.head_dim, 2) and layer.head_dim % 2 == 0,
                f"head_dim of {where}",
                layer.head_dim,
                "an even number",
            )
            check(
                is_count(layer.kv_heads) and self.num_heads % layer.kv_heads == 0,
                f"num_key_value_heads of {where}",
                layer.kv_heads,
                f"a divisor of num_attention_heads ({self.num_heads})",
            )
            first = next(other for other in self.layers if other.kind == layer.kind)
            check(
                layer.head_dim == first.head_dim,
                f"head_dim of {where}",
                layer.head_dim,
                f"{first.head_dim}, as in the other layers of its kind: they share one rotary embedding",
            )

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
        ropes = text.get("rope_parameters") or {}
        defaults = {name: f.default for name, f in cls.__dataclass_fields__.items()}
        eos = text.get("eos_token_id")
        eos = 1 if eos is None else eos
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            layers=_read_layers(text),
            sliding_window=text.get("sliding_window", 512),
            sliding_rope=_read_rope(ropes, "sliding_attention", defaults["sliding_rope"]),
            full_rope=_read_rope(ropes, "full_attention", defaults["full_rope"]),
            num_experts=text["num_experts"],
            top_k_experts=text["top_k_experts"],
            expert_size=text["moe_intermediate_size"],
            canvas_length=data.get("canvas_length") or 256,
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
        text |= _write_full_sizes(self.layers, general)
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


def _read_rope(ropes: Mapping[str, Any], kind: str, default: Any) -> Rope:
    return Rope.from_dict(ropes[kind]) if ropes.get(kind) else default


def _read_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """Layer kinds and sizes from either spelling; the last layer is always full, whatever the file says."""
    count = text["num_hidden_layers"]
    check(is_count(count), "num_hidden_layers", count, "a whole number of at least 1")
    kinds = list(
        text.get("layer_types") or ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    )
    check(len(kinds) == count, "layer_types", kinds, f"a list of num_hidden_layers ({count}) entries")
    for kind in kinds:
        check(
            kind in ("sliding_attention", "full_attention"), "layer_types", kind, "sliding_attention or full_attention"
        )
    kinds[-1] = "full_attention"
    differences = text.get("per_layer_config")
    layers = []
    for index, kind in enumerate(kinds):
        sizes = {"head_dim": text["head_dim"], "num_key_value_heads": text["num_key_value_heads"]}
        if differences is None and kind == "full_attention":
            sizes["head_dim"] = text.get("global_head_dim", 512)
            sizes["num_key_value_heads"] = text.get("num_global_key_value_heads") or text["num_key_value_heads"]
        for key, value in dict((differences or {}).get(str(index), (differences or {}).get(index, {}))).items():
            check(key in sizes, f"per_layer_config.{index}.{key}", value, "head_dim or num_key_value_heads")
            sizes[key] = value
        layers.append(LayerConfig(kind=kind, head_dim=sizes["head_dim"], kv_heads=sizes["num_key_value_heads"]))
    return tuple(layers)


def _write_full_sizes(layers: tuple[LayerConfig, ...], general: LayerConfig) -> dict[str, Any]:
    """The published spelling where it can say it, `per_layer_config` where layers of one kind differ."""
    full = {(layer.head_dim, layer.kv_heads) for layer in layers if not layer.sliding}
    if len(full) == 1 and all(
        (x.head_dim, x.kv_heads) == (general.head_dim, general.kv_heads) for x in layers if x.sliding
    ):
        head_dim, kv_heads = next(iter(full))
        return {"global_head_dim": head_dim, "num_global_key_value_heads": kv_heads}
    return {
        "per_layer_config": {
            str(i): {"head_dim": x.head_dim, "num_key_value_heads": x.kv_heads} for i, x in enumerate(layers)
        }
    }
