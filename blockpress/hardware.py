"""What this machine does well: the type in which it computes what is stored in another.

Invariant: the answer is the stored type or a wider one, so that no stored value is rounded.

Run it:  python -m pytest tests/weights/test_types.py
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from blockpress.errors import RequestError

VARIABLE = "BLOCKPRESS_COMPUTE_DTYPE"


def compute_dtype(storage: torch.dtype, device: torch.device) -> torch.dtype:
    """The fast type for weights that are stored in `storage`: that type itself, or float32.

    BLOCKPRESS_COMPUTE_DTYPE takes the place of this choice wherever it can hold what is stored.

    Raises:
        RequestError: BLOCKPRESS_COMPUTE_DTYPE is no type.
    """
    said = os.environ.get(VARIABLE) or "auto"
    if said not in ("auto", "float32", "bfloat16", "float16"):
        raise RequestError(f"{VARIABLE} is {said!r}", hint="give float32, bfloat16, float16 or auto")
    if storage == torch.float32 or said == str(storage).removeprefix("torch."):
        return storage
    if said == "float32":
        return torch.float32
    if device.type != "cpu" or (storage == torch.bfloat16 and _multiplies_bfloat16()):
        return storage
    return torch.float32


@cache
def _multiplies_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16"})
