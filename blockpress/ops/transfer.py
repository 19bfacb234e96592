"""Copies between host and device: inputs go up without a wait, results come back with one.

    to_device    pinned copy, queued on the device's stream; the host continues at once
    to_host      queued copy into pinned memory, an event, and the wait for it: where a step waits for the device

A plain `.to(device)`, `torch.tensor(..., device=...)` or `.tolist()` would wait for all queued work, each time.

Invariant: work that is queued on the same stream afterwards may use what was sent.
Run it:  python -m pytest tests/engine/test_runner.py
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor, copied to the device without a wait."""
    device = torch.device(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """A device tensor, copied to the host; the copy is complete on return."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    there.copy_(tensor, non_blocking=True)
    with torch.cuda.device(tensor.device):  # the copy is on this device's stream, whichever GPU is current
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    return there
