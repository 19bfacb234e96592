"""The peak of the memory that a run takes, above what was there when it began.

On Linux the kernel keeps the peak of a process and lets it be reset; where that is not to be had, the memory is looked
at after every forward, which misses what comes and goes within one.

Invariant: never below 0, and the weights that were loaded before are not counted.
Run it:  python -m pytest tests/bench/test_drive.py
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def taken(device: torch.device) -> int:
    """Bytes that the process, or torch on a GPU, has in memory now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


class Peak:
    """Memory from now on, of the process or, on a GPU, of torch there.

    `before`: what counts as nothing, `taken` at some earlier moment; None: what is taken now.
    """

    def __init__(self, device: torch.device, before: int | None = None) -> None:
        self._device = device
        self._kernel = device.type == "cpu" and _reset()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._most = taken(device)
        self._before = self._most if before is None else before

    def see(self) -> None:
        """Look once more."""
        self._most = max(self._most, self._now("VmHWM" if self._kernel else "VmRSS"))

    def value(self) -> int:
        """Bytes of the peak so far."""
        self.see()
        return max(0, self._most - self._before)

    def _now(self, field: str) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status(field)


def _reset() -> bool:
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Bytes of a field of the process's own account; elsewhere than on Linux the peak since the process began."""
    if _STATUS.is_file():
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), flags=re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
