"""Files on disk: a checkpoint's directory becomes a network, and a network a checkpoint that `transformers` loads too.

Invariant: nothing is read half and nothing is written half. A tensor that is missing, left over, of another shape or
in a file cut short is an error that names it, before the first weight is read; a save takes its place only when whole.

Run it:  python -m pytest tests/weights
"""

from __future__ import annotations

from blockpress.weights.build import Progress
from blockpress.weights.checkpoint import Checkpoint, find_checkpoint, load_config, load_generation, open_checkpoint
from blockpress.weights.find import resolve, shipped
from blockpress.weights.load import load_network
from blockpress.weights.save import save_checkpoint
from blockpress.weights.vision import load_picture_settings, load_vision, minimal_vision, vision_tensors

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
