"""Random experts, routings and packed weights for the checks and timings of the experts' kernels.

Weights are drawn as codes of their format, on the device, with values of standard deviation about 1/sqrt(columns).

    uniform   every expert is equally likely
    skewed    expert 1 is every token's first choice, and half of the experts are never chosen
    one       all choices fall on as few experts as there are choices

Invariant: a function of (device, seed, shapes) alone.
Run it:  python -m pytest tests/ops/kernels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockpress.ops.packed import E4M3, Codes, Float4, Nibbles
from blockpress.ops.weight import Packed

KINDS = ("bfloat16", "e4m3", "int4 row", "int4 g32", "int4 g64", "nvfp4", "mxfp4")
ROUTINGS = ("uniform", "skewed", "one")
BYTES = {"bfloat16": 2.0, "e4m3": 1.0, "int4 row": 0.5, "int4 g32": 0.5625, "int4 g64": 0.53125, "nvfp4": 0.5625,
         "mxfp4": 0.53125}  # fmt: skip
"""Bytes a weight, the scales of groups included."""


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """Sizes of a layer's experts."""

    experts: int
    hidden: int
    size: int
    top_k: int


PUBLISHED = ExpertShape(experts=128, hidden=2816, size=704, top_k=8)


def weight(kind: str, shape: tuple[int, int, int], device: torch.device, seed: int) -> Tensor | Packed:
    """A random weight [experts, rows, columns] in a format."""
    generator = torch.Generator(device=device).manual_seed(seed)
    experts, rows, columns = shape
    std = columns**-0.5

    def codes(high: int, *sizes: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, sizes, dtype=torch.uint8, device=device, generator=generator)

    def scales(size: float, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (size * (0.75 + 0.5 * torch.rand(sizes, device=device, generator=generator))).to(dtype)

    if kind == "bfloat16":
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
        for expert in drawn:  # one by one: normal values are drawn in float32
            expert.copy_(torch.randn(rows, columns, device=device, generator=generator) * std)
        return drawn
    if kind == "e4m3":
        bytes_ = codes(0x78, *shape) | codes(2, *shape) << 7  # magnitudes to 240
        return Codes(codes=bytes_.view(E4M3), scale=scales(std / 60, experts, rows, 1), group=columns)
    packed = codes(256, experts, rows, columns // 2)
    if kind.startswith("int4"):
        group = columns if kind == "int4 row" else int(kind.removeprefix("int4 g"))
        sizes = (experts, rows, columns // group)
        return Nibbles(packed=packed, scale=scales(std / 4.6, *sizes, dtype=torch.bfloat16), group=group)
    if kind == "nvfp4":
        inner, outer = codes(0x80 - 8, experts, rows, columns // 16, low=0x60), scales(std / 300, experts, rows)
        return Float4(packed=packed, scale=inner, kind="e4m3", group=16, global_scale=outer)
    assert kind == "mxfp4", kind
    return Float4(packed=packed, scale=codes(125, experts, rows, columns // 32, low=121), kind="e8m0", group=32)


def routing(how: str, tokens: int, shape: ExpertShape, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Routing weights [tokens, k] in float32, and chosen experts [tokens, k]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    odds = torch.rand(tokens, shape.experts, device=device, generator=generator)
    if how != "uniform":
        odds[:, 1] += 2
        odds[:, (shape.top_k if how == "one" else max(shape.top_k, shape.experts // 2)) :] -= 2
    weights, chosen = odds.topk(shape.top_k, dim=-1)
    weights = weights - odds.amin() + 0.1
    return (weights / weights.sum(-1, keepdim=True)).float(), chosen


def hidden_rows(tokens: int, columns: int, device: torch.device, seed: int, dtype: torch.dtype) -> Tensor:
    """Normally distributed activations [tokens, columns]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(tokens, columns, device=device, generator=generator).to(dtype)
