"""What a run leaves on the disk: its state, from which it goes on, and the lines of its log.

Invariant: a file holds the whole of the newest state that was saved, whatever happened to a save after it.
Run it:  python -m pytest tests/train/test_trainer.py tests/test_disk.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockpress.errors import TrainingError
from blockpress.hardware import whole_file

STATE = "trainer.pt"


@dataclass(frozen=True)
class TrainReport:
    """One line of the log: means since the last report. Losses in nats a token; rate as a share of the full rate."""

    step: int
    steps: int
    canvas_loss: float
    causal_loss: float
    accuracy: float
    gradient_norm: float
    rate: float
    draws: int
    draws_per_second: float
    seconds: float

    def to_json(self) -> str:
        return json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in vars(self).items()})


def save_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write a run's state, of tensors and plain values.

    Raises:
        TrainingError: it cannot be written; an older state is unchanged.
    """
    with whole_file(file, need=_bytes(state), kind=TrainingError) as made:
        try:
            torch.save(state, made)
        except RuntimeError as error:  # torch's writer says of a full disk that a position was unexpected
            raise OSError(f"torch's writer fails: {error}") from error


def _bytes(value: Any) -> int:
    """Bytes of the tensors in nested mappings and lists: about what the file takes."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(_bytes(item) for item in items)
