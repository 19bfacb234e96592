"""Checkpoints of safetensors: names mapped to modules, packed formats, loading, saving and streaming writes.

Invariant: which stored tensors fill each tensor of the network is decided on the headers, before any weight is read.
Run it:  python -m pytest tests/checkpoints
"""
