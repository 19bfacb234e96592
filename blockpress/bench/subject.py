"""What is measured: a network, its source, and the formats of its weights.

    MODEL             a checkpoint: its own weights and sampling
    --preset NAME     a shape with random weights: as fast as a real one, but it writes noise
    --config FILE     the shape of a config.json, likewise

Two shapes exist only here, for comparison with other programs: `bench-262k` and `bench-4k`, eight layers of 512
features with 16 experts, over the published vocabulary and over a small one. `bench-wide` has the experts of a larger
model, so that a single token costs mostly the reading of experts.

Invariant: the same seed gives the same weights. A subject says whether its weights are random.
Run it:  blockpress bench --preset bench-4k --steps 4
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from blockpress import costs
from blockpress.checkpoints.build import choose_device, choose_types, hold, without_memory
from blockpress.config import PRESETS, LayerConfig, ModelConfig
from blockpress.errors import ConfigError, ModelNotFound
from blockpress.lm import LM, load
from blockpress.model import Network
from blockpress.model.layers import packed_weights
from blockpress.ops.weight import Packed


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A network to measure. `lm` is the loaded model around it; None where the weights are random."""

    name: str
    network: Network
    lm: LM | None = None

    @property
    def random(self) -> bool:
        return self.lm is None

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def types(self) -> dict[str, str]:
        """The names of the storage dtype and of the dtype of products."""
        types = {"dtype": self.network.storage_dtype, "compute_dtype": self.network.product_dtype}
        return {name: str(kind).removeprefix("torch.") for name, kind in types.items()}

    @property
    def in_types(self) -> str:
        """The same in words, once if they are equal."""
        stored, computed = self.types.values()
        return stored if stored == computed else f"{stored}, computed in {computed}"


def bench_262k() -> ModelConfig:
    """Eight layers of 512 features, 16 experts (top 4), the published vocabulary."""
    sliding = LayerConfig(kind="sliding_attention", head_dim=64, kv_heads=4)
    full = LayerConfig(kind="full_attention", head_dim=128, kv_heads=2)
    return ModelConfig(
        vocab_size=262_144,
        hidden_size=512,
        intermediate_size=1024,
        num_heads=8,
        layers=tuple(full if i % 4 == 3 else sliding for i in range(8)),
        sliding_window=1024,
        num_experts=16,
        top_k_experts=4,
        expert_size=256,
        canvas_length=256,
        context_length=8192,
        image_id=4095,
        dtype="bfloat16",
    )


def bench_4k() -> ModelConfig:
    """The same with a vocabulary of 4,096."""
    return replace(bench_262k(), vocab_size=4096)


def bench_wide() -> ModelConfig:
    """64 experts of 1,408 features a layer, 1.2 billion parameters: 2.3 GB in bfloat16, of which a token reads 0.2."""
    return replace(
        bench_4k(), hidden_size=1024, intermediate_size=2048, num_experts=64, top_k_experts=4, expert_size=704
    )


SHAPES: Mapping[str, Callable[[], ModelConfig]] = {
    **PRESETS,
    "bench-262k": bench_262k,
    "bench-4k": bench_4k,
    "bench-wide": bench_wide,
}


def shape_named(preset: str) -> ModelConfig:
    """Raises ModelNotFound: no such preset."""
    if preset not in SHAPES:
        raise ModelNotFound(f"there is no preset {preset!r}", hint=f"presets: {', '.join(sorted(SHAPES))}")
    return SHAPES[preset]()


def shape_in(file: str | Path) -> ModelConfig:
    """The shape in a config.json. Raises ConfigError: it cannot be read or is not one."""
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", hint="give the path of a config.json") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds no object", hint="give the path of a config.json")
    return ModelConfig.from_dict(data)


def loaded(model: str, *, dtype: str | None = None, compute_dtype: str | None = None, device: str = "cpu") -> Subject:
    """A checkpoint, as `blockpress.load` loads it. Raises BlockpressError."""
    lm = load(model, dtype=dtype, compute_dtype=compute_dtype, device=device)
    return Subject(name=model, network=lm.network, lm=lm)


def randomised(
    name: str,
    config: ModelConfig,
    *,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Subject:
    """A network of that shape with random weights: matrices of variance 1 / inputs, norms and scales of 1.

    Raises:
        RequestError: unknown dtypes, or no such device.
    """
    torch_device = choose_device(device)
    types = choose_types(dtype, compute_dtype, config, torch_device)
    network = without_memory(lambda: Network(config)).to(types.storage).to_empty(device=torch_device)
    generator = torch.Generator(torch_device).manual_seed(seed)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.ndim > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
            else:
                tensor.fill_(1.0)
    hold(network, types)
    return Subject(name=name, network=network.eval().requires_grad_(False))


def weight_bytes(network: Network) -> dict[str, int]:
    """Bytes of the experts, of the embedding, and of the rest, as stored."""
    sizes = {"experts": 0, "embedding": 0, "dense": 0}
    for name, module in network.named_modules():
        for weight in _weights(module):
            part = "experts" if ".experts" in f".{name}" else "embedding" if "embed_tokens" in name else "dense"
            sizes[part] += weight.nbytes
    return sizes


def stored_formats(network: Network) -> costs.WeightFormats:
    """The mean bytes a weight, and the dtype of products, of each part of a network."""
    stored, counted = weight_bytes(network), costs.parameters(network.config)
    math, products = (str(kind).removeprefix("torch.") for kind in (network.dtype, network.product_dtype))
    experts, embedding = counted.get("experts", 0), counted["embedding"]
    dense = sum(counted.values()) - experts - embedding

    def width(part: str, count: int, math: str) -> costs.Width:
        return costs.Width(size=stored[part] / count if count else 0.0, math=math)

    return costs.WeightFormats(
        experts=width("experts", experts, products),
        dense=width("dense", dense, products),
        embedding=width("embedding", embedding, math),
        rest=costs.Width(size=network.dtype.itemsize, math=math),
    )


def _weights(module: nn.Module) -> list[torch.Tensor | Packed]:
    return [*module.parameters(recurse=False), *packed_weights(module).values()]
