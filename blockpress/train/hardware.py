"""The machine in words, for logs and model cards."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def machine() -> str:
    """This machine in words: processor, cores, accelerator."""
    model = "an unnamed processor"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    accelerator = f" and one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {model}{accelerator}"
