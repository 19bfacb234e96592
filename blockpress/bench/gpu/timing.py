"""Times on a GPU between events, after a warm-up, repeated; the median, and the minimum, which others disturb less.

Invariant: what is timed has run before, so that nothing is compiled or allocated meanwhile.
Run it:  make bench-gpu PART=ceilings
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from blockpress.config import PRESETS
from blockpress.costs import DEVICES, expert_parameters

DEVICE = DEVICES["h200"]
"""The device whose limits the floors are computed with."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds."""

    median: float
    least: float


def timed(work: Callable[[], object], *, warmups: int = 3, repeats: int = 20) -> Timing:
    """Time single runs."""
    for _ in range(warmups):
        work()
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in pairs]
    return Timing(median=statistics.median(times), least=min(times))


def captured(work: Callable[[], object], *, repeats: int = 10) -> Timing:
    """Time replays of one captured graph, where launch cost is negligible."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    taken = timed(graph.replay, repeats=repeats)
    del graph
    return taken


def layer_floor_ms(tokens: int, touched: float, size: float, math: str) -> float:
    """Milliseconds of the floor of one layer's experts: their bytes or their operations, whichever takes longer.

    >>> round(layer_floor_ms(256, 128, 2, "bfloat16"), 3), round(layer_floor_ms(8192, 128, 2, "bfloat16"), 3)
    (0.354, 0.987)
    """
    config = PRESETS["diffusiongemma-26B-A4B"]()
    expert = expert_parameters(config)
    bytes_, flops = touched * expert * size, 2 * tokens * config.top_k_experts * expert
    return 1000 * max(bytes_ / DEVICE.bandwidth, flops / DEVICE.rate(math))
