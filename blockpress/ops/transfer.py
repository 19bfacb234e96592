"""The two ways between processor and device: numbers there without waiting, answers back with one wait.

    send     pinned copy, queued on the device's stream; the processor goes on at once
    fetch    queued copy into pinned memory, an event, and the wait for it: where a step waits for the device

A plain `.to(device)`, `torch.tensor(..., device=...)` or `.tolist()` would wait for all that is queued, each time.

Invariant: what was sent may be used at once by whatever is queued on the same stream after it.
Run it:  python -m pytest tests/engine/test_runner.py
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the processor on the device."""
    device = torch.device(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """A tensor of the device on the processor, there when this returns."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    there.copy_(tensor, non_blocking=True)
    with torch.cuda.device(tensor.device):  # whose stream the copy is in, whichever GPU is the current one
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    return there
