"""Files on disk: a checkpoint's directory becomes a network, and a network a checkpoint that `transformers` loads too.

Invariant: loading and saving are all or nothing. A tensor that is missing, unexpected, of another shape or in a
truncated file is an error that names it, before the first weight is read; a save replaces a checkpoint only when whole.

Run it:  python -m pytest tests/checkpoints
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockpress.checkpoints.checkpoint import Checkpoint, find_checkpoint, load_config, load_generation, open_checkpoint
from blockpress.checkpoints.locate import resolve, shipped

if TYPE_CHECKING:
    from blockpress.checkpoints.build import Progress
    from blockpress.checkpoints.safetensors.load import load_network
    from blockpress.checkpoints.safetensors.save import save_checkpoint
    from blockpress.checkpoints.safetensors.vision import (
        load_picture_settings,
        load_vision,
        minimal_vision,
        vision_tensors,
    )

__all__ = [
    "Checkpoint",
    "Progress",
    "find_checkpoint",
    "load_config",
    "load_generation",
    "load_network",
    "load_picture_settings",
    "load_vision",
    "minimal_vision",
    "open_checkpoint",
    "resolve",
    "save_checkpoint",
    "shipped",
    "vision_tensors",
]

_WITH_TORCH = {
    "Progress": "build",
    "load_network": "safetensors.load",
    "load_picture_settings": "safetensors.vision",
    "load_vision": "safetensors.vision",
    "minimal_vision": "safetensors.vision",
    "save_checkpoint": "safetensors.save",
    "vision_tensors": "safetensors.vision",
}
"""Imported when first used, as importing torch takes a second that `show` and `ls` do not need."""


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
