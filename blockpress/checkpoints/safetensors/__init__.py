"""Checkpoints of safetensors: names mapped to modules, packed formats, loading, saving and writing piece by piece.

Invariant: what each tensor of the network is read from is decided on the headers, before the first weight is read.
Run it:  python -m pytest tests/checkpoints
"""
