"""GGUF files of the architecture `diffusion-gemma`: one file that holds weights, configuration and tokenizer.

Invariant: the `gguf` package is imported only for a block type that `ops.blocks` does not unpack.

Run it:  python -m pytest tests/checkpoints -k gguf
"""
