"""The layers, and the two ways in which config.json gives the sizes of full layers.

    published     "global_head_dim": 512, "num_global_key_value_heads": 2       for all full layers
    transformers  "per_layer_config": {"5": {"head_dim": 512, ...}, ...}        differences only, layer by layer

Invariant: both spellings of the same layers give the same value. With neither, a full layer's head has 512 features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blockpress.config.checks import is_count, is_number, require
from blockpress.config.families import GLOBAL_HEAD_DIM, PATTERN

LayerKind = Literal["sliding_attention", "full_attention"]
KINDS: tuple[LayerKind, ...] = ("sliding_attention", "full_attention")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    `proportional` rotates only the first `int(partial * head_dim // 2)` pairs, with frequencies spread over the whole
    head; `default` rotates the first `partial` of the head with frequencies of that part.
    """

    theta: float
    kind: Literal["default", "proportional"] = "default"
    partial: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        require(is_number(self.theta) and self.theta > 0, "rope_theta", self.theta, "a number above 0")
        require(self.kind in ("default", "proportional"), "rope_type", self.kind, "'default' or 'proportional'")
        require(
            is_number(self.partial) and 0 <= self.partial <= 1,
            "partial_rotary_factor",
            self.partial,
            "a number from 0 to 1",
        )
        require(
            self.kind == "proportional" or self.partial == 1,
            "partial_rotary_factor",
            self.partial,
            "1 where rope_type is 'default'",
        )
        require(is_number(self.factor) and self.factor > 0, "factor", self.factor, "a number above 0")
        require(
            self.kind == "proportional" or self.factor == 1, "factor", self.factor, "1 where rope_type is 'default'"
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rope:
        """Read one entry of `rope_parameters`; an unknown key is refused, since it would change the angles."""
        known = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
        for key in data:
            require(
                key in known, f"rope_parameters.{key}", data[key], f"left out: only {', '.join(sorted(known))} count"
            )
        return cls(
            theta=data.get("rope_theta", 10_000.0),
            kind=data.get("rope_type", "default"),
            partial=data.get("partial_rotary_factor", 1.0),
            factor=data.get("factor", 1.0),
        )

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind == "proportional":
            out["partial_rotary_factor"] = self.partial
            if self.factor != 1:
                out["factor"] = self.factor
        return out


SLIDING_ROPE = Rope(theta=10_000.0)
FULL_ROPE = Rope(theta=1_000_000.0, kind="proportional", partial=0.25)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer's attention: its kind, the size of a head and the number of key/value heads."""

    kind: LayerKind
    head_dim: int
    kv_heads: int

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "layer_types", self.kind, " or ".join(KINDS))

    @property
    def sliding(self) -> bool:
        return self.kind == "sliding_attention"


def read_ropes(text: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The rotary embeddings of sliding and of full layers; the reference's where the file has none."""
    given = text.get("rope_parameters")
    require(given is None or isinstance(given, Mapping), "rope_parameters", given, "an object for each kind of layer")
    for key, value in (given or {}).items():
        require(value is None or isinstance(value, Mapping), f"rope_parameters.{key}", value, "an object")
        require(key in KINDS, f"rope_parameters.{key}", value, f"inside an object for {' or '.join(KINDS)}")
    read = {kind: Rope.from_dict(value) for kind, value in (given or {}).items() if value is not None}
    return read.get(KINDS[0], SLIDING_ROPE), read.get(KINDS[1], FULL_ROPE)


def read_layers(text: Mapping[str, Any], keys_are_values: bool = True) -> tuple[LayerConfig, ...]:
    """Layer kinds and sizes from either spelling; the last layer is always full, whatever the file says.

    `num_global_key_value_heads` applies only where the full layers' keys are their values (`attention_k_eq_v`): in a
    Gemma 4 without that, full layers have the general number, and the reference ignores the field.
    """
    count = text["num_hidden_layers"]
    require(is_count(count), "num_hidden_layers", count, "a whole number of at least 1")
    kinds = text.get("layer_types")
    if kinds is None:
        kinds = [KINDS[(i + 1) % PATTERN == 0] for i in range(count)]
    require(isinstance(kinds, Sequence) and len(kinds) == count, "layer_types", kinds, f"a list of {count} entries")
    for kind in kinds:
        require(kind in KINDS, "layer_types", kind, " or ".join(KINDS))
    sizes = _sizes(text, [*kinds[:-1], "full_attention"], keys_are_values)
    return tuple(LayerConfig(kind=kind, head_dim=dim, kv_heads=heads) for kind, dim, heads in sizes)


def _sizes(text: Mapping[str, Any], kinds: Sequence[Any], keys_are_values: bool) -> list[tuple[Any, Any, Any]]:
    """Kind, head size and key/value heads of every layer."""
    differences = text.get("per_layer_config")
    require(differences is None or isinstance(differences, Mapping), "per_layer_config", differences, "an object")
    for key, value in (differences or {}).items():
        known = str(key).isdecimal() and int(key) < len(kinds)
        require(known, f"per_layer_config.{key}", value, f"keyed by a layer from 0 to {len(kinds) - 1}")
        require(isinstance(value, Mapping), f"per_layer_config.{key}", value, "an object")
    # From 11 layers on `transformers` writes "05" for 5.
    by_layer = {int(key): value for key, value in (differences or {}).items()}
    global_heads = text.get("num_global_key_value_heads")
    valid = global_heads is None or is_count(global_heads)
    require(valid, "num_global_key_value_heads", global_heads, "a whole number of at least 1")
    sizes = []
    for index, kind in enumerate(kinds):
        size = {"head_dim": text["head_dim"], "num_key_value_heads": text["num_key_value_heads"]}
        if differences is None and kind == "full_attention":
            size["head_dim"] = text.get("global_head_dim", GLOBAL_HEAD_DIM)
            if keys_are_values and global_heads is not None:
                size["num_key_value_heads"] = global_heads
        for key, value in by_layer.get(index, {}).items():
            require(key in size, f"per_layer_config.{index}.{key}", value, "head_dim or num_key_value_heads")
            size[key] = value
        sizes.append((kind, size["head_dim"], size["num_key_value_heads"]))
    return sizes


def write_full_sizes(
    layers: tuple[LayerConfig, ...], general: LayerConfig, keys_are_values: bool = True
) -> dict[str, Any]:
    """The published spelling where it suffices, `per_layer_config` where layers of one kind differ."""
    full = {(layer.head_dim, layer.kv_heads) for layer in layers if not layer.sliding}
    alike = all((x.head_dim, x.kv_heads) == (general.head_dim, general.kv_heads) for x in layers if x.sliding)
    head_dim, kv_heads = next(iter(full), (0, 0))
    if len(full) == 1 and alike and (keys_are_values or kv_heads == general.kv_heads):
        return {"global_head_dim": head_dim, "num_global_key_value_heads": kv_heads}
    return {
        "per_layer_config": {
            str(i): {"head_dim": x.head_dim, "num_key_value_heads": x.kv_heads} for i, x in enumerate(layers)
        }
    }
