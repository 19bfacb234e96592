"""GGUF files of the architecture `diffusion-gemma`: one file that holds weights, configuration and tokenizer.

Invariant: the `gguf` package is imported only for a block type that `ops.blocks` does not unpack.

Run it:  python -m pytest tests/checkpoints -k gguf
"""

from __future__ import annotations

from blockpress.checkpoints.gguf.find import find_gguf
from blockpress.checkpoints.gguf.load import Gguf, load_gguf_network, open_gguf, understand

__all__ = ["Gguf", "find_gguf", "load_gguf_network", "open_gguf", "understand"]
