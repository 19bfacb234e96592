"""What this device reaches: the bandwidth of a copy, and the rate of products at the model's shapes.

Ceilings are those of the roofline (`costs.DEVICES`): where a figure here is far from its ceiling, the floors of the
other parts are equally far from what is possible here. Products run on random values and rotate over weights, so that
none is in a cache; zeros would run faster than real values.

Invariant: bytes are counted as read plus written, operations as two per multiply-add.
Run it:  make bench-gpu PART=ceilings
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockpress.bench.gpu.report import GpuReport
from blockpress.bench.gpu.timing import DEVICE, captured, timed

SHAPES = {
    "q sliding": (4096, 2816),
    "o sliding": (2816, 4096),
    "q full": (8192, 2816),
    "MLP gate": (2112, 2816),
    "MLP down": (2816, 2112),
    "router": (128, 2816),
    "head": (262144, 2816),
}
"""Rows and columns of the weights that 256 rows of activations are multiplied by."""

COPIED = 1 << 32
ROTATED = 1 << 29
"""Bytes of weights in rotation: several times the largest cache."""


def bench(report: GpuReport) -> None:
    """A copy; a large product in bfloat16 and fp8; the model's products at 256 rows."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    least = timed(lambda: target.copy_(source)).least
    report.add("copy of 4 GiB", 2 * COPIED / least / 1e9, "TB/s", DEVICE.bandwidth / 1e12)
    del source, target
    for math, size in (("bfloat16", 2), ("fp8", 1)):
        _products(report, f"{math} 8192x8192x8192", math, 8192, 8192, 8192, size)
        for name, (rows, columns) in SHAPES.items():
            _products(report, f"{math} {name} M=256", math, 256, rows, columns, size)


def _products(report: GpuReport, name: str, math: str, tokens: int, rows: int, columns: int, size: int) -> None:
    """One shape: the time of a product, against the longer of its two floors."""
    count = max(1, min(64, ROTATED // (rows * columns * size)))
    try:
        work, weights = _product(math, tokens, rows, columns, count)
        milliseconds = captured(lambda: [work(weight) for weight in weights]).least / count
    except Exception as reason:  # a product that this torch or this device does not have
        report.note(f"{name}: {type(reason).__name__}: {reason}")
        return
    flops, bytes_ = 2 * tokens * rows * columns, size * (rows + tokens) * columns + 2 * tokens * rows
    report.add(name, 1000 * milliseconds, "us", 1e6 * max(flops / DEVICE.rate(math), bytes_ / DEVICE.bandwidth))
    report.add(f"{name} rate", flops / milliseconds / 1e9, "TFLOP/s", DEVICE.rate(math) / 1e12)


def _product(
    math: str, tokens: int, rows: int, columns: int, count: int
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    if math == "bfloat16":
        return lambda weight: torch.nn.functional.linear(x, weight), weights
    one, codes = torch.ones((), device="cuda"), x.to(torch.float8_e4m3fn)

    def work(weight: Tensor) -> Tensor:
        return torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return work, [weight.to(torch.float8_e4m3fn) for weight in weights]
