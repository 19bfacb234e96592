"""A checkpoint's configuration: `config.json` and `generation_config.json` as frozen values.

Invariant: a configuration that exists is valid; every field is checked at construction. No torch here, so that memory
and speed can be planned without it.
Run it:  python -c "from blockpress.config import PRESETS; print(PRESETS['diffusiongemma-26B-A4B']())"
"""

from blockpress.config.edits import LogitEdits
from blockpress.config.families import FAMILIES, Family
from blockpress.config.layers import LayerConfig, LayerKind, Rope
from blockpress.config.model import FAMILY, ModelConfig
from blockpress.config.presets import PRESETS, diffusiongemma_26b_a4b, gemma4_26b_a4b, sudoku_nano, tiny
from blockpress.config.sampling import AutoregressiveSampling, GenerationConfig, Sampling

__all__ = [
    "FAMILIES",
    "FAMILY",
    "PRESETS",
    "AutoregressiveSampling",
    "Family",
    "GenerationConfig",
    "LayerConfig",
    "LayerKind",
    "LogitEdits",
    "ModelConfig",
    "Rope",
    "Sampling",
    "diffusiongemma_26b_a4b",
    "gemma4_26b_a4b",
    "sudoku_nano",
    "tiny",
]
