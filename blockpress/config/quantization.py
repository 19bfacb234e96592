"""`quantization_config`: how a checkpoint's weights are packed, as a frozen value that is checked when read.

Settings for activations (dynamic or static scales of inputs and outputs) and for the KV cache are ignored on purpose:
they trade accuracy for the speed of GPUs that multiply in few bits. Here activations and the cache stay in the
network's type, which is closer to the model before quantisation.

    compressed-tensors   groups of targets with `weights` arguments, and names to ignore
    modelopt             `quant_algo` (or groups, or `quant_cfg`); also from `hf_quant_config.json`

Invariant: a method, a format or an argument that changes the meaning of the stored bytes, and that is not read here, is
refused by name.

Run it:  python -m pytest tests/checkpoints/test_packed.py
Source: `compressed_tensors` 0.20, `QuantizationConfig`; NVIDIA ModelOpt's exported `hf_quant_config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from blockpress.config.checks import is_count, require
from blockpress.errors import ConfigError

Strategy = Literal["tensor", "channel", "group", "tensor_group", "block"]
STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "tensor_group", "block")

WHERE = "quantization_config"
_METHODS = ("compressed-tensors", "modelopt")
_FORMATS = (
    "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "dense", "mixed-precision",
)  # fmt: skip
_TAKE_ANOTHER = "take a checkpoint in compressed-tensors' layout or of ModelOpt, a GGUF file, or the bfloat16 one"

# Keys that do not concern the weights' bytes, or are ignored on purpose: see the module's docstring.
_GROUP_ASIDE = {"input_activations", "output_activations"}
_ARGUMENTS_ASIDE = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_TOP_ASIDE = {"global_compression_ratio", "version", "kv_cache_scheme", "quant_method", "run_compressed"}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one group of matrices is packed: `group` columns, or a `block` of rows and columns, share one scale.

    A `targets` entry is a module's name, `re:` and a regular expression that matches its beginning, or `Linear`.
    """

    bits: int
    kind: Literal["int", "float"]
    strategy: Strategy | None = None
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    targets: tuple[str, ...] = ("Linear",)

    def __post_init__(self) -> None:
        require(self.kind in ("int", "float"), f"{WHERE}: type", self.kind, "'int' or 'float'")
        allowed = (4, 8) if self.kind == "float" else tuple(range(2, 9))
        need = f"one of {', '.join(map(str, allowed))} for {self.kind} weights"
        require(is_count(self.bits) and self.bits in allowed, f"{WHERE}: num_bits", self.bits, need)
        known = self.strategy is None or self.strategy in STRATEGIES
        require(known, f"{WHERE}: strategy", self.strategy, f"one of {', '.join(STRATEGIES)} for weights")
        require(
            self.group is None or is_count(self.group), f"{WHERE}: group_size", self.group, "a whole number above 0"
        )
        grouped = self.strategy in ("group", "tensor_group")
        require(not grouped or self.group is not None, f"{WHERE}: group_size", self.group, f"given for {self.strategy}")
        require((self.strategy == "block") == (self.block is not None), f"{WHERE}: block_structure", self.block,
              "[rows, columns] for the strategy block, and for no other")  # fmt: skip
        require(isinstance(self.symmetric, bool), f"{WHERE}: symmetric", self.symmetric, "true or false")
        require(self.symmetric or self.kind == "int", f"{WHERE}: symmetric", self.symmetric, "true for floats")

    def __str__(self) -> str:
        size = f" in groups of {self.group}" if self.group else f" in blocks of {self.block}" if self.block else ""
        return f"{self.bits}-bit {self.kind}{size}"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which matrices are packed, and how. ModelOpt's names use other patterns and are not matched."""

    method: str
    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...] = ()

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer by its published name; None where no group names it.

        A name has precedence over a pattern, a pattern over `Linear`, as in compressed-tensors.
        """
        if self.method == "modelopt" or any(_matches(module, entry) for entry in self.ignore):
            return None
        hits = [(_rank(t), scheme) for scheme in self.schemes for t in scheme.targets if _matches(module, t)]
        return min(hits, key=lambda hit: hit[0])[1] if hits else None

    @classmethod
    def from_dict(cls, data: object) -> Quantization:
        """Read a `quantization_config`, or the content of `hf_quant_config.json`.

        Raises:
            ConfigError: a method, a format or an argument that is not read here, named with its value.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"config field {WHERE} is {data!r}", hint=f"{WHERE} must be an object")
        values: Mapping[str, Any] = data
        if "quantization" in values and "quant_method" not in values:
            values = {"quant_method": "modelopt", **_mapping(values["quantization"], "quantization")}
        method = values.get("quant_method")
        if isinstance(method, str) and method.startswith("modelopt"):
            return _read_modelopt(values)
        need = f"{' or '.join(map(repr, _METHODS))}: {_TAKE_ANOTHER}"
        require(method == "compressed-tensors", f"{WHERE}.quant_method", method, need)
        return _read_compressed(values)


def _read_compressed(data: Mapping[str, Any]) -> Quantization:
    form, status = data.get("format"), data.get("quantization_status")
    require(form in _FORMATS, f"{WHERE}.format", form, f"one of {', '.join(_FORMATS)}: {_TAKE_ANOTHER}")
    # Older versions write "frozen" for packed weights too; floats that come with scales are refused by their tensors.
    done = status in ("compressed", "frozen", None)
    require(done, f"{WHERE}.quantization_status", status, "'compressed': save it compressed")
    for name, why in (
        ("sparsity_config", "sparse weights are not read"),
        ("transform_config", "weights that were rotated (Hadamard transforms) are not read"),
        ("moe_sparsity_config", "layers with fewer experts than the config says are not read"),
    ):
        value = data.get(name)
        empty = not value or value == {"format": "dense"} or (isinstance(value, Mapping) and not any(value.values()))
        require(empty, f"{WHERE}.{name}", value, f"left out: {why}")
    known = {"format", "quantization_status", "config_groups", "ignore", *_TOP_ASIDE}
    known |= {"sparsity_config", "transform_config", "moe_sparsity_config"}
    _refuse_unknown(data, known, "")
    groups = _mapping(data.get("config_groups"), "config_groups")
    schemes = tuple(scheme for name, group in groups.items() for scheme in _read_group(f"config_groups.{name}", group))
    require(bool(schemes), f"{WHERE}.config_groups", groups, "an object with at least one group that packs weights")
    return Quantization(method="compressed-tensors", schemes=schemes, ignore=_names(data.get("ignore"), "ignore"))


def _read_group(name: str, group: object) -> Iterator[Scheme]:
    values = _mapping(group, name, "written out as an object, not a preset's name")
    if values.get("weights") is None:
        return
    form = values.get("format")
    require(form in (*_FORMATS, None), f"{WHERE}.{name}.format", form, f"one of {', '.join(_FORMATS)}: {_TAKE_ANOTHER}")
    _refuse_unknown(values, {"weights", "targets", "format", *_GROUP_ASIDE}, f"{name}.")
    yield _read_arguments(f"{name}.weights", values["weights"], _names(values.get("targets"), f"{name}.targets"))


def _read_arguments(name: str, given: object, targets: tuple[str, ...]) -> Scheme:
    values = _mapping(given, name)
    order = values.get("actorder")
    require(order in (None, False, "weight", "static"), f"{WHERE}.{name}.actorder", order,
          "null or 'weight': columns that are stored in another order (g_idx) are not read")  # fmt: skip
    require(not values.get("dynamic"), f"{WHERE}.{name}.dynamic", values.get("dynamic"), "false for weights")
    known = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder", "dynamic"}
    _refuse_unknown(values, known | _ARGUMENTS_ASIDE, f"{name}.")
    size, block = values.get("group_size"), values.get("block_structure")
    if block is not None:
        whole = isinstance(block, list) and len(block) == 2 and all(map(is_count, block))
        require(whole, f"{WHERE}.{name}.block_structure", block, "two whole numbers above 0")
    strategy = values.get("strategy")
    if strategy is None and size is not None:
        strategy = "channel" if size == -1 else "group"
    return Scheme(
        bits=values.get("num_bits", 8),
        kind=values.get("type", "int"),
        strategy=strategy,
        group=None if size == -1 else size,
        block=None if block is None else (block[0], block[1]),
        symmetric=values.get("symmetric", True),
        targets=targets or ("Linear",),
    )


def _read_modelopt(data: Mapping[str, Any]) -> Quantization:
    """The formats that ModelOpt names, as schemes; which weights have them is read from the tensors."""
    algorithm = data.get("quant_algo")
    layers = data.get("quantized_layers") or {}
    named = [algorithm] if algorithm not in (None, "MIXED_PRECISION") else []
    named += [_mapping(layer, f"quantized_layers.{name}").get("quant_algo")
              for name, layer in _mapping(layers, "quantized_layers").items()]  # fmt: skip
    schemes = {_of_algorithm(name) for name in named}
    if not schemes:
        groups = _mapping(data.get("config_groups") or {}, "config_groups")
        weights = [_mapping(group, f"config_groups.{name}").get("weights") for name, group in groups.items()]
        weights += list(_weight_quantizers(data.get("quant_cfg")))
        schemes = {_of_bits(entry) for entry in weights if entry is not None}
    need = f"the name of an algorithm, such as NVFP4 or FP8: {_TAKE_ANOTHER}"
    require(bool(schemes), f"{WHERE}.quant_algo", algorithm, need)
    return Quantization(method="modelopt", schemes=tuple(sorted(schemes, key=str)))


def _of_algorithm(name: object) -> Scheme:
    plain = name if isinstance(name, str) else ""
    # AWQ and SVDQuant move part of the weights into separate scales and low-rank factors.
    if ("NVFP4" in plain or plain == "W4A4") and not re.search("AWQ|SVD", plain):
        return Scheme(bits=4, kind="float", strategy="tensor_group", group=16)
    if plain in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return Scheme(bits=8, kind="float")
    hint = f"quant_algo must be NVFP4 or FP8: {_TAKE_ANOTHER}"
    raise ConfigError(f"config field {WHERE}.quant_algo is {name!r}", hint=hint)


def _of_bits(entry: object) -> Scheme:
    """`num_bits` is a number, or the bits of exponent and mantissa: 4 or [2, 1], 8 or [4, 3]."""
    values = _mapping(entry, "weights")
    bits = values.get("num_bits")
    if bits == [2, 1] or (bits == 4 and values.get("type") == "float"):
        size = values.get("group_size", 16)
        require(size == 16, f"{WHERE}: group_size", size, "16 for 4-bit floats of ModelOpt")
        return Scheme(bits=4, kind="float", strategy="tensor_group", group=16)
    if bits == [4, 3] or (bits == 8 and values.get("type") == "float"):
        return Scheme(bits=8, kind="float")
    hint = f"num_bits must be a float's 4 or 8: {_TAKE_ANOTHER}"
    raise ConfigError(f"config field {WHERE}: num_bits is {bits!r}", hint=hint)


def _weight_quantizers(tree: object, inside: bool = False) -> Iterator[Mapping[str, Any]]:
    """The entries of a `quant_cfg` that describe weights, at any depth."""
    if isinstance(tree, Mapping):
        inside = inside or "weight_quantizer" in str(tree.get("quantizer_name", ""))
        if inside and "num_bits" in tree and tree.get("enable", True):
            yield tree
            return
        for key, value in tree.items():
            yield from _weight_quantizers(value, inside or "weight_quantizer" in str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _weight_quantizers(value, inside)


def _mapping(value: object, name: str, need: str = "an object") -> Mapping[str, Any]:
    require(isinstance(value, Mapping), f"{WHERE}.{name}", value, need)
    assert isinstance(value, Mapping)
    return value


def _names(value: object, name: str) -> tuple[str, ...]:
    entries = [] if value is None else value
    whole = isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)
    require(whole, f"{WHERE}.{name}", value, "a list of names")
    assert isinstance(entries, list)
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(
                    f"config field {WHERE}.{name} holds {entry!r}: {error}", hint="fetch config.json again"
                ) from error
    return tuple(entries)


def _refuse_unknown(data: Mapping[str, Any], known: set[str], where: str) -> None:
    for key, value in data.items():
        require(key in known or not value, f"{WHERE}.{where}{key}", value, "left out: it is not known what it changes")


def _matches(module: str, entry: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return entry in (module, "Linear")


def _rank(target: str) -> int:
    return 2 if target == "Linear" else 1 if target.startswith("re:") else 0
