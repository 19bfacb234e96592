"""From a name to a loaded model.

Invariant: every error that names and headers can show is raised before the first weight is read.
Run it:  python -c "import blockpress; print(blockpress.load('sudoku-nano').config)"
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from blockpress.checkpoints import Checkpoint, load_network, open_checkpoint
from blockpress.engine import EngineOptions
from blockpress.errors import RequestError
from blockpress.lm.model import LM
from blockpress.ops.computing import computing


@computing()
def load(
    name: str | Path | Checkpoint,
    *,
    dtype: str | torch.dtype | None = None,
    compute_dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    max_running: int = 32,
) -> LM:
    """Load a model: a shipped name such as "sudoku-nano", the directory of a checkpoint, a GGUF file, the name of a
    model that `blockpress pull` downloaded from the hub, such as "owner/name" or "owner/name@revision", or a checkpoint
    that is already open (`checkpoints.open_checkpoint`).

    Quantized weights stay packed in memory. Nothing is downloaded.

    Args:
        dtype: of the weights in memory, a torch dtype or its name ("float32", "bfloat16"); None: as in the checkpoint's
            config.json. It does not apply to packed weights.
        compute_dtype: of activations and products: `dtype`, which rounds where the reference does, or "float32", for
            which weights are widened a tile at a time when they are used; None or "auto": what is fast here. "int8":
            on a CPU the layers' products use 8-bit integers, which rounds weights and activations (ADR 0022).
        device: where the network runs, such as "cpu" or "cuda".
        memory: bytes for the KV cache, which keeps prefixes from call to call and evicts the least recently used; None:
            half of what is free on the device at the first call.
        max_running: most prompts answered at once; further ones wait in a queue.

    Raises:
        CheckpointError, ConfigError: what is wrong with the files, and what to do.
        RequestError: an unknown type or device, a compute_dtype that cannot hold the weights, or int8 where it is not
            supported; an invalid limit of the engine.
    """
    if not isinstance(name, str | Path | Checkpoint):
        raise RequestError(f"name is {name!r:.60}", hint="give a model's name, a checkpoint's directory or a GGUF file")
    options = EngineOptions(memory=memory, max_running=max_running, max_waiting=sys.maxsize)
    checkpoint = name.checked() if isinstance(name, Checkpoint) else open_checkpoint(name)
    return LM(
        path=checkpoint.path,
        network=load_network(checkpoint, dtype=dtype, compute_dtype=compute_dtype, device=device),
        generation=checkpoint.generation,
        tokenizer=checkpoint.tokenizer(),
        options=options,
        # For the vision tower. A GGUF file has none; its header holds the whole vocabulary and need not be kept.
        checkpoint=checkpoint if checkpoint.gguf is None else None,
    )
