"""What a checkpoint is, from its config or header alone: its family, and the format of its weights.

This is the only module that names a format, and it is tolerant: it describes what it does not know instead of refusing
it, so that `ls` and `show` can describe a checkpoint that nothing here can run.

Weights that are not packed are named by their stored type, which need not be the type that the config asks to run in.

Invariant: no weight is read, and `identify` raises only for a file that cannot be read or parsed at all.

Run it:  blockpress ls
Source: `compressed_tensors` 0.20 `QuantizationConfig`, ModelOpt's `hf_quant_config`, the GGUF specification of ggml.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpress.checkpoints.files import CONFIG, HF_QUANT_CONFIG, read_object
from blockpress.checkpoints.index import open_safetensors

if TYPE_CHECKING:
    from blockpress.checkpoints.gguf.header import Header

FAMILIES = ("diffusion_gemma", "gemma4", "gemma4_text", "diffusion-gemma")
"""What blockpress runs: values of `model_type`, and of a GGUF file's `general.architecture`."""

_PLAIN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

# `general.file_type` of a GGUF file (llama.cpp's llama_ftype): the mix that most of its tensors follow.
_GGUF_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint's family (`model_type` or architecture) and format, such as "bf16", "nvfp4" or "Q4_K_M".

    `method` is what packed the weights ("compressed-tensors", "modelopt", "gguf"), None where they are not packed.
    """

    family: str
    format: str
    method: str | None = None

    @property
    def runs(self) -> bool:
        """Whether the family is one that blockpress runs."""
        return self.family in FAMILIES


def identify(path: Path) -> CheckpointInfo:
    """The kind of a checkpoint's directory or of a GGUF file that is not open yet.

    Raises:
        DamagedFile: config.json is not JSON, or the file is no GGUF. CheckpointError: it cannot be read.
    """
    if path.is_file():
        from blockpress.checkpoints.gguf.header import read_header

        return gguf_kind(read_header(path))
    file = path / HF_QUANT_CONFIG
    return config_kind(
        read_object(path / CONFIG), lambda: read_object(file) if file.is_file() else None, lambda: _stored_type(path)
    )


def config_kind(
    config: Mapping[str, Any],
    read_hf_quant_config: Callable[[], Mapping[str, Any] | None],
    read_main_type: Callable[[], str | None],
) -> CheckpointInfo:
    """The kind of a directory by its config.json.

    Args:
        read_hf_quant_config: returns ModelOpt's file, called where config.json does not say that weights are packed.
        read_main_type: returns the type of most tensors, as `main_type` names it, called where neither does.
    """
    family, quantised = str(config.get("model_type")), _quantised(config)
    if quantised is None and (hf_quant_config := read_hf_quant_config()) is not None:
        config = {**config, "quantization_config": hf_quant_config}
        quantised = _quantised(config)
    if quantised is not None:
        return CheckpointInfo(family=family, format=format_name(config), method=_method(quantised))
    return CheckpointInfo(family=family, format=read_main_type() or format_name(config))


def gguf_kind(header: Header) -> CheckpointInfo:
    """The kind of a GGUF file by its header."""
    metadata = header.metadata
    number = metadata.get("general.file_type")
    known = _GGUF_TYPES.get(number) if isinstance(number, int) else None
    name = known or ("unnamed mix" if number is None else f"type {number!s:.40}")
    return CheckpointInfo(family=str(metadata.get("general.architecture")), format=name, method="gguf")


def main_type(codes: Iterable[str]) -> str | None:
    """The most frequent type, given safetensors' codes of types; None for no codes.

    >>> main_type(["F32", "BF16", "BF16"]), main_type(["F8_E4M3"]), main_type([])
    ('bf16', 'f8_e4m3', None)
    """
    most = Counter(codes).most_common(1)
    name = most[0][0] if most else ""
    return {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}.get(name, name.lower()) or None


def format_name(config: Mapping[str, Any]) -> str:
    """The format that a `config.json` says its weights are in.

    >>> format_name({"dtype": "bfloat16"})
    'bf16'
    >>> groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}}
    >>> format_name({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}})
    'int4'
    >>> format_name({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}})
    'nvfp4'
    >>> format_name({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq 4 bits'
    """
    quantised = _quantised(config)
    if quantised is None:
        dtype = config.get("dtype") or config.get("torch_dtype") or _text(config).get("dtype") or "float32"
        return _PLAIN.get(str(dtype), str(dtype))
    groups = quantised.get("config_groups")
    named = {_group_name(group) for group in groups.values()} if isinstance(groups, Mapping) else set()
    if named - {""}:
        return " + ".join(sorted(named - {""}))
    if algorithm := quantised.get("quant_algo"):
        return str(algorithm).lower().replace("_", " ")
    bits = quantised.get("bits", quantised.get("num_bits"))
    return _method(quantised) if bits is None else f"{_method(quantised)} {bits} bits"


def _stored_type(directory: Path) -> str | None:
    """The type of most tensors of the first safetensors file; None without one."""
    file = next(iter(sorted(directory.glob("*.safetensors"))), None)
    if file is None:
        return None
    with open_safetensors(file, "numpy") as shard:
        return main_type(shard.get_slice(name).get_dtype() for name in shard.offset_keys())


def _group_name(group: Any) -> str:
    """A group of `config_groups` by the type of its weights; "" where it has none."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return ""
    bits, kind, size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if kind == "float" and bits == 4:
        return "mxfp4" if size == 32 else "nvfp4"
    if kind == "float" and bits == 8:
        return "mxfp8" if size == 32 else "fp8"
    return f"{kind or 'int'}{bits}"


def _quantised(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A config's section on packed weights; ModelOpt's own file has it one level down, without the method's name."""
    section = config.get("quantization_config") or _text(config).get("quantization_config")
    inner = section.get("quantization") if isinstance(section, Mapping) and "quant_method" not in section else None
    section = {"quant_method": "modelopt", **inner} if isinstance(inner, Mapping) else section
    return section if isinstance(section, Mapping) else None


def _method(quantised: Mapping[str, Any]) -> str:
    return str(quantised.get("quant_method") or "unnamed method")


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else {}
