"""What a network costs, from its config alone: parameters, memory, and the least time that a forward can take.

    memory.py     parameters of each part, bytes of context, peaks of working memory
    roofline.py   operations and bytes of one forward, and the floor of its time on a device
    devices.py    the rates of three graphics cards; `bench/ceilings.py` measures this machine

Invariant: no torch in this room.

Run it:  python -c "from blockpress import costs, config as c; print(costs.parameters(c.PRESETS['tiny']()))"
"""

from __future__ import annotations

from blockpress.costs.devices import DEVICES, Device
from blockpress.costs.memory import (
    CHUNK,
    DTYPE_BYTES,
    FUSED,
    PLAIN_PAGE,
    PRODUCTS,
    TABLED,
    activation_dtype,
    active_parameters,
    context_bytes,
    engine_peak,
    expert_parameters,
    integer_weights,
    paged_bytes,
    parameters,
)
from blockpress.costs.roofline import (
    WIDTHS,
    BatchShape,
    Cost,
    WeightFormats,
    Width,
    arithmetic_seconds,
    byte_seconds,
    distinct,
    floor_seconds,
    forward_cost,
    throughput,
)

__all__ = [
    "CHUNK",
    "DEVICES",
    "DTYPE_BYTES",
    "FUSED",
    "PLAIN_PAGE",
    "PRODUCTS",
    "TABLED",
    "WIDTHS",
    "BatchShape",
    "Cost",
    "Device",
    "WeightFormats",
    "Width",
    "activation_dtype",
    "active_parameters",
    "arithmetic_seconds",
    "byte_seconds",
    "context_bytes",
    "distinct",
    "engine_peak",
    "expert_parameters",
    "floor_seconds",
    "forward_cost",
    "integer_weights",
    "paged_bytes",
    "parameters",
    "throughput",
]
