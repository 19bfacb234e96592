"""One finding of `blockpress doctor`.

Invariant: a finding that is not ok has a hint that says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DRIFT = 1e-4  # relative; float32 orders of summation differ by about 1e-6


@dataclass(frozen=True)
class DoctorCheck:
    """One finding. `hint` says what to do where it is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str = ""
