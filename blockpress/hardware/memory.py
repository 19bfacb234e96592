"""How much memory is free.

Invariant: memory beyond a container's limit is not free, whatever the machine has left.

Run it:  python -c "from blockpress.hardware import free_memory; print(free_memory())"
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from blockpress.hardware.system import cards, read_text


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

    Cached files do not count as used, as in MemAvailable: the kernel drops them when memory is needed.
    """
    for line in read_text("proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            base, limit, used, prefix = Path("sys/fs/cgroup"), "memory.max", "memory.current", ""
        elif "memory" in kinds.split(","):
            base, prefix = Path("sys/fs/cgroup/memory"), "total_"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's: then the limit is at the root.
        group = base / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(base))):
            texts = [read_text(folder / name).strip() for name in (limit, used)]
            if all(text.isdigit() for text in texts):
                stat = dict(row.split() for row in read_text(folder / "memory.stat").splitlines())
                cached = sum(int(stat.get(f"{prefix}{kind}", 0)) for kind in ("inactive_file", "active_file"))
                yield int(texts[0]), max(0, int(texts[1]) - cached)
