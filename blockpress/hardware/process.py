"""The peak of a run's memory, above what was in use when it started.

On Linux the kernel keeps the peak of a process and can reset it; elsewhere memory is sampled after every forward, which
misses what is allocated and freed within one.

Invariant: never below 0, and weights that were loaded before are not counted.
Run it:  python -m pytest tests/test_hardware.py tests/bench/test_drive.py
"""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING

from blockpress.hardware import system

if TYPE_CHECKING:
    import torch


def taken(device: torch.device) -> int:
    """Bytes in use now, by the process or, on a GPU, by torch."""
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


class Peak:
    """The peak from now on, of the process or, on a GPU, of torch there.

    `before`: the baseline, `taken` at some earlier moment; None: what is in use now.
    """

    def __init__(self, device: torch.device, before: int | None = None) -> None:
        import torch

        self._device = device
        self._kernel = device.type == "cpu" and _reset()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._most = taken(device)
        self._before = self._most if before is None else before

    def see(self) -> None:
        """Sample the memory now."""
        self._most = max(self._most, self._now("VmHWM" if self._kernel else "VmRSS"))

    def value(self) -> int:
        """Bytes of the peak so far."""
        self.see()
        return max(0, self._most - self._before)

    def _now(self, field: str) -> int:
        import torch

        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status(field)


def _reset() -> bool:
    try:
        (system.ROOT / "proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status; where there is none, the peak since the process started."""
    account = system.read_text("proc/self/status")
    if account:
        match = re.search(rf"^{field}:\s+(\d+) kB", account, flags=re.MULTILINE)
        return int(match[1]) * 1024 if match else 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024  # macOS counts bytes, others KiB
