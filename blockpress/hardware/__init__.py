"""What this machine is and does well.

    system.py    the processor and its cards: name, cores, flags, and the ISA level that our C++ is built for
    memory.py    free memory, the limits of containers counted
    speed.py     how fast products are in each type, and from that the type to compute in

Invariant: only this room asks what the processor is, so that builds, choices and reports agree about it. torch is
imported inside functions: `blockpress --help` has none.

Run it:  blockpress doctor
"""

from __future__ import annotations

from blockpress.hardware.memory import free_memory, main_memory
from blockpress.hardware.speed import Rates, cache_folder, compute_dtype, float32_way, measure, rates, remeasure
from blockpress.hardware.system import Isa, Processor, isa, machine, processor

__all__ = [
    "Isa",
    "Processor",
    "Rates",
    "cache_folder",
    "compute_dtype",
    "float32_way",
    "free_memory",
    "isa",
    "machine",
    "main_memory",
    "measure",
    "processor",
    "rates",
    "remeasure",
]
