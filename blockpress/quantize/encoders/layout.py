"""The interface of a quantisation format, and the `quantization_config` that describes it to every reader.

A weight [out, in] becomes a few named tensors in the layout of compressed-tensors, like the published quantised
checkpoints. A format is a frozen value; it works on tiles of rows that stay in a core's cache.

Invariant: `Encoded.values` are, bit for bit, what compressed-tensors restores from `Encoded.tensors`.

Run it:  python -m pytest tests/quantize
Source: `compressed_tensors` 0.20, `QuantizationConfig` and the compressors of `float-quantized`, `int-quantized`,
`pack-quantized` and `nvfp4-pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

TILE = 1 << 18
"""Values that are encoded at once: 1 MiB of float32."""

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A quantised weight: its tensors by the last part of their names, and the values that a reader restores."""

    tensors: dict[str, Tensor]
    values: Float[Tensor, "out in"]


@runtime_checkable
class Format(Protocol):
    """A way to quantise a weight [out, in]."""

    @property
    def name(self) -> str:
        """Our name: fp8, int8, int4, nvfp4."""
        ...

    @property
    def compression(self) -> str:
        """compressed-tensors' name."""
        ...

    @property
    def scheme(self) -> dict[str, Any]:
        """`weights` of its config group and, where readers should quantise activations too, `input_activations`."""
        ...

    def supports(self, columns: int) -> bool:
        """Whether rows of `columns` columns can be stored."""
        ...

    def layout(self, rows: int, columns: int, scales: torch.dtype) -> Shapes:
        """Dtype and shape of every tensor that a weight [rows, columns] is stored as; `scales` is their dtype."""
        ...

    def encode(self, weight: Float[Tensor, "out in"], amax: float | None = None) -> Encoded:
        """Quantise the weight. `amax`: the largest magnitude of it and its fused layers; None: its own."""
        ...

    def draw(self, rows: int, columns: int, std: float, rng: np.random.Generator) -> dict[str, Tensor]:
        """Tensors of a random weight, normal with mean 0 and standard deviation `std`, drawn as codes."""
        ...


def scale_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype of the scales of a weight stored in `weight`: bfloat16 for bfloat16, else float32 (float16 is too
    narrow for them)."""
    return torch.bfloat16 if weight == torch.bfloat16 else torch.float32


def row_tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows with at most `TILE` values each, but at least one row."""
    step = max(1, TILE // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def safe(scale: Tensor) -> Tensor:
    """`scale` with 0 replaced by 1: the codes of a row of zeros are zeros under any scale."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantization_config(form: Format, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a `config.json` whose linear layers are in that format, except those in `ignore`.

    Args:
        ignore: names of modules as in the checkpoint; one that begins with `re:` is a regular expression.
    """
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, **form.scheme}
    return {
        "config_groups": {"group_0": group | {"format": form.compression}},
        "format": form.compression,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """One `QuantizationArgs`: symmetric, and static unless `more` overrides that."""
    static = {"dynamic": False, "group_size": None, "block_structure": None, "actorder": None}
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy} | static | more


def quantiles(count: int) -> Float32[np.ndarray, " count"]:
    """The means of `count` equally likely parts of the standard normal distribution, scaled to unit variance.

    >>> bool(abs(quantiles(256).std() - 1) < 1e-6 and abs(quantiles(256).mean()) < 1e-6)
    True
    """
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = torch.special.ndtri(middles).numpy()
    return np.asarray(values / values.std(), dtype=np.float32)
