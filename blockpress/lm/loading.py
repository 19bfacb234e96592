"""From a name to a model that answers.

Invariant: what can be said from names and headers is said before the first weight is read.

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


def load(
    name: str | Path | Checkpoint,
    *,
    dtype: str | torch.dtype | None = None,
    compute_dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    max_running: int = 32,
) -> LM:
    """Load a model: a shipped name such as "sudoku-nano", the directory of a checkpoint, a GGUF file, or the name of a
    model that `blockpress pull` fetched from the hub, such as "owner/name" or "owner/name@revision"; or a checkpoint
    that is open already (`checkpoints.open_checkpoint`).

    Weights in fewer bits stay packed in memory. Nothing is fetched.

    Args:
        dtype: of the weights in memory, a torch dtype or its name ("float32", "bfloat16"); None: what the checkpoint's
            config.json names. Where weights are packed it is the type of the others.
        compute_dtype: of activations and products: `dtype`, which rounds where the reference does, or "float32", for
            which weights are widened a tile at a time where they are used; None or "auto": what is fast here. "int8":
            on a processor the layers' products are made of integers, which rounds weights and activations (ADR 0022).
        device: where the network runs, such as "cpu" or "cuda".
        memory: bytes for the KV cache, which keeps what prompts begin with from call to call and gives up the oldest
            first; None: half of what is free on the device when the first call comes.
        max_running: most prompts that are answered at once; where there are more, the others wait their turn.

    Raises:
        CheckpointError, ConfigError: what is wrong with the files, and what to do.
        RequestError: a type or a device that there is not, a compute_dtype that does not hold the weights, or int8
            where integers are not multiplied; a limit of the engine that is none.
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
        # For the tower, of which a GGUF file has none; its header holds the whole vocabulary, and may go.
        checkpoint=checkpoint if checkpoint.gguf is None else None,
    )
