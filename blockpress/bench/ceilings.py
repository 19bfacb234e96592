"""This machine's roofline, measured now: operations a second at the model's shapes, and bytes read a second.

Why: a share of the roofline is meaningful only against ceilings measured at the same time on the same busy machine.

    products    [tokens, in] x [in, out] of a canvas with the network's larger matrices, in the network's dtype and in
                float32; the fastest of several implementations and repeats
    reading     the sum over as many bytes as the weights take: where they fit a cache, so does this

Invariant: a ceiling is the best figure measured, never a mean.
Run it:  blockpress bench --preset tiny --steps 2
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from blockpress import costs
from blockpress.bench.subject import weight_bytes
from blockpress.hardware import free_memory, machine
from blockpress.model import Network
from blockpress.ops.integers import quantize_rows, quantized
from blockpress.ops.linear import linear

SECONDS = 0.25
MIN_BYTES, MAX_BYTES = 16 << 20, 1 << 30
"""Bounds on the bytes read at once: fewer measure the processor's caches, more add nothing."""

OUTPUTS = 8192
"""Most columns of a measured product: a whole vocabulary would take seconds."""


@torch.inference_mode()
def measure_device(network: Network, *, seconds: float | None = None) -> costs.Device:
    """This machine as a `costs.Device` (bytes and operations a second), for products and weights of `network`'s size.

    Args:
        seconds: for how long each kind of product, and the reading, is repeated; None: `SECONDS`.
    """
    seconds = SECONDS if seconds is None else seconds
    kinds = (network.dtype, network.product_dtype, torch.float32)
    names = {str(kind).removeprefix("torch."): kind for kind in kinds}
    rates = {name: max(_rates(network, dtype, seconds)) for name, dtype in names.items()}
    return costs.Device(
        name=machine(network.device),
        bandwidth=_reading(network, seconds),
        rates=rates,
        memory=free_memory().get(str(network.device), 0),
    )


def best_of(measured: Sequence[costs.Device]) -> costs.Device:
    """The best of each figure, over several measurements of one machine."""
    rates = {math: max(device.rates[math] for device in measured) for math in measured[0].rates}
    return replace(measured[0], bandwidth=max(device.bandwidth for device in measured), rates=rates)


def repeated(action: Callable[[], object], seconds: float, device: torch.device) -> float:
    """The shortest time of `action` in seconds, repeated for `seconds`, at least three times."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, count = min(best, time.perf_counter() - started), count + 1
    return best


def _rates(network: Network, dtype: torch.dtype, seconds: float) -> Iterator[float]:
    """Operations a second of each shape and implementation."""
    config, device = network.config, network.device
    layer = max(config.layers, key=lambda layer: layer.head_dim)
    outputs = {
        config.num_heads * layer.head_dim,
        config.intermediate_size,
        min(config.num_experts * config.expert_size, OUTPUTS),
        min(config.vocab_size, OUTPUTS),
    }
    rows = max(config.canvas_length, 64)
    for wide in sorted(outputs - {0}):
        x = torch.randn(rows, config.hidden_size, device=device)
        weight = torch.randn(wide, config.hidden_size, device=device)
        for product in _products(x, weight, dtype):
            yield 2.0 * x.numel() * wide / repeated(product, seconds / len(outputs), device)


def _products(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], ...]:
    """Torch's product in that dtype, and ours."""
    if dtype == torch.int8:
        (codes, _), held = quantize_rows(x), quantized(weight)
        ours = lambda: linear(x, held)  # noqa: E731
        return (ours, lambda: torch._int_mm(codes, held.codes.T)) if hasattr(torch, "_int_mm") else (ours,)
    x, weight = x.to(dtype), weight.to(dtype)
    return lambda: F.linear(x, weight), lambda: linear(x, weight)


@torch.inference_mode()
def _reading(network: Network, seconds: float) -> float:
    """Bytes read a second."""
    size = min(
        max(sum(weight_bytes(network).values()), MIN_BYTES),
        MAX_BYTES,
        free_memory().get(str(network.device), MAX_BYTES) // 4,
    )
    values = torch.ones(size // 4, device=network.device)
    columns = 4096
    matrix = values[: len(values) // columns * columns].view(-1, columns)
    vector = torch.ones(columns, device=network.device)
    ways: list[tuple[Tensor, Callable[[], Tensor]]] = [(values, values.sum), (matrix, lambda: torch.mv(matrix, vector))]
    return max(read.nbytes / repeated(way, seconds / 2, network.device) for read, way in ways)
