"""What this machine is and what it is fast at.

    system.py    the processor and the cards: name, cores, flags, the ISA level that our C++ is built for, and the
                 control groups that limit a container
    memory.py    free memory, container limits included
    process.py   the memory that this process uses, and its peak
    disk.py      files, written whole or not at all, and where caches lie
    speed.py     how fast products are in each type, and from that the type to compute in

Invariant: only this room reads what processor, memory and cards there are, so that builds, choices and reports agree.
torch is imported inside functions: `blockpress --help` imports none.

Run it:  blockpress doctor
"""

from __future__ import annotations

from blockpress.hardware.disk import append_line, cache_folder, flush, replacing, unwritable, whole_file
from blockpress.hardware.memory import free_memory, main_memory
from blockpress.hardware.process import Peak, taken
from blockpress.hardware.speed import Rates, compute_dtype, compute_name, float32_way, measure_rates, rates, remeasure
from blockpress.hardware.system import (
    Card,
    Isa,
    Processor,
    cards,
    cores,
    cpu_quota,
    isa,
    machine,
    multiprocessors,
    processor,
)

__all__ = [
    "Card",
    "Isa",
    "Peak",
    "Processor",
    "Rates",
    "append_line",
    "cache_folder",
    "cards",
    "compute_dtype",
    "compute_name",
    "cores",
    "cpu_quota",
    "float32_way",
    "flush",
    "free_memory",
    "isa",
    "machine",
    "main_memory",
    "measure_rates",
    "multiprocessors",
    "processor",
    "rates",
    "remeasure",
    "replacing",
    "taken",
    "unwritable",
    "whole_file",
]
