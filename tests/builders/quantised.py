"""Writers of quantised checkpoints, and the floats that compressed-tensors (or ModelOpt's rule in float64) makes of them.

Codes and scales are drawn so that every code occurs; integers and 8-bit floats are packed by compressed-tensors itself,
which takes seconds to import: only who writes a checkpoint does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockpress.checkpoints import save_checkpoint
from blockpress.config import PRESETS, GenerationConfig, ModelConfig
from blockpress.model import Network
from tests.builders.files import INDEX, SINGLE
from tests.conftest import make_random_network

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LINEAR = re.compile(
    r"model\.decoder\.(layers\.\d+\.(self_attn|mlp|experts)\..*_proj|self_conditioning\..*_proj)\.weight"
)
EXPERTS = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")


def small_config() -> ModelConfig:
    """The tiny preset with sizes that groups of 32 divide, and no power of two among the experts."""
    return replace(PRESETS["tiny"](), hidden_size=64, intermediate_size=96, expert_size=32, num_experts=3)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to pack: what compressed-tensors calls it and the arguments of its weights; `scales` is their type."""

    compression: str
    arguments: dict[str, Any] = field(default_factory=dict)
    scales: torch.dtype = torch.float32

    @property
    def scheme(self) -> QuantizationScheme:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**self.arguments))

    def config(self) -> dict[str, Any]:
        if self.compression.startswith("modelopt"):
            return {"quant_method": "modelopt", "quant_algo": self.arguments["algo"], "ignore": ["lm_head"]}
        from compressed_tensors.quantization import QuantizationArgs

        weights = json.loads(QuantizationArgs(**self.arguments).model_dump_json())
        group = {"targets": ["Linear"], "weights": weights, "format": self.compression}
        return {
            "quant_method": "compressed-tensors",
            "format": self.compression,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*router.*"],
            "quantization_status": "compressed",
        }


def arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, **more}


FP4 = arguments(4, "float", "tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
FORMS: dict[str, Form] = {
    "fp8 channel": Form(compression="float-quantized", arguments=arguments(8, "float", "channel")),
    "fp8 channel bf16": Form(
        compression="float-quantized", arguments=arguments(8, "float", "channel"), scales=torch.bfloat16
    ),
    "fp8 tensor": Form(compression="float-quantized", arguments=arguments(8, "float", "tensor")),
    "fp8 block": Form(
        compression="float-quantized", arguments=arguments(8, "float", "block", block_structure=[20, 24])
    ),
    "mxfp8": Form(
        compression="mxfp8-quantized", arguments=arguments(8, "float", "group", group_size=32, scale_dtype=torch.uint8)
    ),
    "int8 channel": Form(compression="int-quantized", arguments=arguments(8, "int", "channel")),
    "int8 group asymmetric": Form(
        compression="naive-quantized", arguments=arguments(8, "int", "group", group_size=16, symmetric=False)
    ),
    "int8 packed": Form(compression="pack-quantized", arguments=arguments(8, "int", "channel")),
    "int4 group": Form(
        compression="pack-quantized", arguments=arguments(4, "int", "group", group_size=32), scales=torch.bfloat16
    ),
    "int4 group float16": Form(
        compression="pack-quantized", arguments=arguments(4, "int", "group", group_size=16), scales=torch.float16
    ),
    "int4 group asymmetric": Form(
        compression="pack-quantized", arguments=arguments(4, "int", "group", group_size=16, symmetric=False)
    ),
    "int4 channel": Form(compression="pack-quantized", arguments=arguments(4, "int", "channel")),
    "int4 channel asymmetric": Form(
        compression="pack-quantized", arguments=arguments(4, "int", "channel", symmetric=False)
    ),
    "int3 group asymmetric": Form(
        compression="pack-quantized", arguments=arguments(3, "int", "group", group_size=32, symmetric=False)
    ),
    "nvfp4": Form(compression="nvfp4-pack-quantized", arguments=FP4),
    "mxfp4": Form(
        compression="mxfp4-pack-quantized",
        arguments=arguments(4, "float", "group", group_size=32, scale_dtype=torch.uint8),
    ),
    "modelopt nvfp4": Form(compression="modelopt nvfp4", arguments={"algo": "NVFP4"}),
    "modelopt fp8": Form(compression="modelopt fp8", arguments={"algo": "FP8"}),
}


def pack(form: Form, weight: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight in that form, and the values that its own tools restore from them."""
    if form.compression == "modelopt nvfp4":
        return modelopt_nvfp4(weight, draw)
    if form.compression == "modelopt fp8":
        scale = weight.abs().max() / 448
        parts = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        return parts | {"input_scale": torch.tensor(0.1)}, parts["weight"].float() * scale
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(form.compression)
    if "fp4" in form.compression:
        parts = four_bit_floats(form, weight, draw)
    else:
        parts = compressor.compress(scaled(form, weight), form.scheme)
    return dict(parts), compressor.decompress(dict(parts), form.scheme)["weight"]


def scaled(form: Form, weight: Tensor) -> dict[str, Tensor]:
    """A weight with scales (and zero points) for compressed-tensors to quantise it with."""
    from compressed_tensors.quantization.utils import calculate_qparams

    args = form.scheme.weights
    assert args is not None
    match args.strategy:
        case "tensor":
            low, high = weight.amin(), weight.amax()
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group":
            low, high = (getattr(weight.unflatten(1, (-1, args.group_size)), f)(-1) for f in ("amin", "amax"))
        case _:
            low, high = blocks(weight, *(args.block_structure or []))
    scale, zero = calculate_qparams(low, high, args)
    zeros = {} if args.symmetric else {"weight_zero_point": zero}
    return {"weight": weight.to(form.scales), "weight_scale": scale.to(form.scales), **zeros}


def blocks(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    cells = [[weight[r : r + height, c : c + width] for c in range(0, columns, width)] for r in range(0, rows, height)]
    return torch.tensor([[x.min() for x in row] for row in cells]), torch.tensor(
        [[x.max() for x in row] for row in cells]
    )


def four_bit_floats(form: Form, weight: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Every code at random, under scales that give values of the weight's size."""
    rows, columns = weight.shape
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=draw)
    if form.compression.startswith("mxfp4"):
        exponents = 127 - 5 + torch.randint(-1, 2, (rows, columns // 32), generator=draw)
        return {"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}
    inner = (torch.rand(rows, columns // 16, generator=draw) * 400 + 40).to(torch.float8_e4m3fn)
    outer = 448 * 6 / weight.abs().max() * (0.5 + torch.rand(1, generator=draw))
    return {"weight_packed": packed, "weight_scale": inner, "weight_global_scale": outer}


def modelopt_nvfp4(weight: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """ModelOpt's tensors, and their values by its rule in float64: e2m1 * weight_scale * weight_scale_2."""
    parts = four_bit_floats(FORMS["nvfp4"], weight, draw)
    packed, inner, outer = parts["weight_packed"], parts["weight_scale"], (1 / parts["weight_global_scale"])[0]
    signed = torch.tensor(E2M1 + [-x for x in E2M1], dtype=torch.float64)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    values = signed[codes.long()] * inner.double().repeat_interleave(16, dim=1) * outer.double()
    named = {"weight": packed, "weight_scale": inner, "weight_scale_2": outer, "input_scale": torch.tensor(0.03)}
    return named, values


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint on disk, and what its weights are by our names, in the type that their own tools restore."""

    folder: Path
    config: ModelConfig
    values: dict[str, Tensor]

    def reference(self, dtype: torch.dtype = torch.float32) -> Network:
        """A network of plain floats with those weights."""
        network = Network(self.config).to(dtype)
        network.load_state_dict({name: value.to(dtype) for name, value in self.values.items()})
        return network.eval().requires_grad_(False)


def write(
    folder: Path,
    form: Form,
    *,
    packs: Callable[[str], Any] = LINEAR.fullmatch,
    others: dict[str, Form] | None = None,
    shard_bytes: int = 10**9,
    seed: int = 1,
    config: ModelConfig | None = None,
) -> Written:
    """Write a small network with the matrices that `packs` names in that form, or in that of `others` by the name's end."""
    config = config or small_config()
    save_checkpoint(folder, make_random_network(config, seed), generation=GenerationConfig())
    plain, out, values = load_file(folder / SINGLE), {}, {}
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in plain.items():
        restored = []
        for base, matrix in matrices(name, tensor):
            chosen = next((f for end, f in (others or {}).items() if base.endswith(end)), form)
            parts, value = pack(chosen, matrix, draw) if packs(base + ".weight") else ({"weight": matrix}, matrix)
            out |= {f"{base}.{part}": t.contiguous() for part, t in parts.items()}
            restored.append(value)
        if not restored:
            out[name] = tensor
        values[ours(name)] = joined(name, tensor, restored)
    (folder / SINGLE).unlink()
    write_tensors(folder, out, shard_bytes)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"quantization_config": form.config()}))
    return Written(folder=folder, config=config, values=values)


def matrices(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a stored tensor that may be packed, by name without `.weight`; a stack's one by one."""
    if found := EXPERTS.fullmatch(name):
        for expert, stacked in enumerate(tensor):
            halves = (
                zip(("gate", "up"), stacked.chunk(2), strict=True) if found[2] == "gate_up" else [("down", stacked)]
            )
            for which, matrix in halves:
                yield f"{found[1]}.{expert}.{which}_proj", matrix.contiguous()
    elif tensor.ndim == 2:
        yield name.removesuffix(".weight"), tensor


def joined(name: str, tensor: Tensor, restored: list[Tensor]) -> Tensor:
    if not EXPERTS.fullmatch(name):
        return restored[0] if restored else tensor
    return torch.stack(
        [torch.cat(group) for group in zip(*[iter(restored)] * (len(restored) // len(tensor)), strict=True)]
    )


def ours(name: str) -> str:
    if "encoder" in name:
        return name.removeprefix("model.encoder.language_model.").replace("layer_scalar", "causal_scalar")
    return name.removeprefix("model.decoder.")


def write_tensors(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """One file, or shards that part the tensors of a matrix, as they come."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
