"""From a name to a model that answers.

Invariant: what can be said from names and headers is said before the first weight is read.

Run it:  python -c "import blockpress; print(blockpress.load('sudoku-nano').config)"
"""

from __future__ import annotations

from pathlib import Path

import torch

from blockpress.errors import RequestError
from blockpress.lm.model import LM
from blockpress.weights import open_checkpoint


def load(name: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> LM:
    """Load a model: a shipped name such as "sudoku-nano", the directory of a checkpoint, a GGUF file, or the name of a
    model that `blockpress pull` fetched from the hub, such as "owner/name" or "owner/name@revision".

    Weights in fewer bits stay packed in memory. Nothing is fetched.

    Args:
        dtype: of the weights in memory, a torch dtype or its name ("float32", "bfloat16"); None: what the checkpoint's
            config.json names. Where weights are packed it is the type of the others, and of what is computed.
        device: where the network runs, such as "cpu" or "cuda".

    Raises:
        CheckpointError, ConfigError: what is wrong with the files, and what to do.
    """
    if not isinstance(name, str | Path):
        raise RequestError(f"name is {name!r:.60}", hint="give a model's name, a checkpoint's directory or a GGUF file")
    checkpoint = open_checkpoint(name)
    return LM(
        path=checkpoint.path,
        network=checkpoint.network(dtype=dtype, device=device),
        generation=checkpoint.generation,
        tokenizer=checkpoint.tokenizer(),
    )
