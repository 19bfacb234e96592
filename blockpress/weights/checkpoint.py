"""A checkpoint as one thing, whether it is a directory of files or one GGUF file.

Why: who loads a model, shows it or asks for its sampler should not care how it is kept.

Invariant: what a checkpoint says about itself is read, and checked, when it is opened; weights are read by `network`.

Run it:  python -c "from blockpress.weights import open_checkpoint; print(open_checkpoint('sudoku-nano').config)"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from blockpress.config import GenerationConfig, ModelConfig
from blockpress.model import Network
from blockpress.text import Tokenizer
from blockpress.weights.build import Progress
from blockpress.weights.find import resolve
from blockpress.weights.gguf import Gguf, load_gguf_network, open_gguf
from blockpress.weights.load import load_config, load_generation, load_network


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was found under a name. `path` is a directory, or a GGUF file."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    gguf: Gguf | None = None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where the checkpoint has none. Raises CheckpointError: one that cannot be read."""
        return Tokenizer.find(self.path) if self.gguf is None else self.gguf.tokenizer()

    def network(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> Network:
        """The weights, as `load_network` reads them."""
        read = load_network if self.gguf is None else load_gguf_network
        return read(self.path, dtype=dtype, compute_dtype=compute_dtype, device=device, progress=progress)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """The checkpoint that goes by that name on this machine: nothing is fetched, and no weight is read.

    Raises:
        ModelNotFound, CheckpointError: nothing there, or files that cannot be used.
        ConfigError: a config that this package does not run.
    """
    path = resolve(name)
    if path.is_file():
        gguf = open_gguf(path)
        return Checkpoint(path=path, config=gguf.config, generation=gguf.generation, gguf=gguf)
    config = load_config(path)
    return Checkpoint(path=path, config=config, generation=load_generation(path, config))
