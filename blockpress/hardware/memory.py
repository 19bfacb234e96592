"""How much memory is free.

Invariant: memory beyond a container's limit is not free, whatever the machine has left.

Run it:  python -c "from blockpress.hardware import free_memory; print(free_memory())"
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from blockpress.hardware.system import cards, cgroups, read_text


def free_memory() -> dict[str, int]:
    """Bytes that are free now, by device: "cpu", and "cuda:N" of each GPU."""
    return {"cpu": main_memory()[0], **{card.device: card.free for card in cards()}}


def main_memory() -> tuple[int, int]:
    """Bytes of main memory that are free for this process now, and the total, both within a container's limit."""
    lines = dict(line.split(":", 1) for line in read_text("proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" in lines:
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    else:  # free memory would need another library; the total is the next best
        free = total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, used in _limits():
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of the memory cgroups (version 2 or 1) of this process, and of their parents.

    Above `memory.high` a group is slowed down until it is below, so it is a limit, too. Cached files do not count as
    used, as in MemAvailable: the kernel drops them when memory is needed.
    """
    for folder, version in cgroups("memory"):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        used = read_text(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")).strip()
        rows = (row.split() for row in read_text(folder / "memory.stat").splitlines())
        stat = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
        cached = sum(stat.get("total_" * (version == 1) + kind, 0) for kind in ("inactive_file", "active_file"))
        limits = [int(text) for text in (read_text(folder / name).strip() for name in names) if text.isdigit()]
        if limits and used.isdigit():
            # Of version 1, this holds the limits of parents that are not mounted here.
            yield min(*limits, stat.get("hierarchical_memory_limit", limits[0])), max(0, int(used) - cached)
