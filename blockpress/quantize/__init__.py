"""Smaller checkpoints: what becomes what (`recipe`), encoders, and conversion piece by piece; and synthetic ones.

Invariant: memory does not grow with the checkpoint, and what is written is read by others to the same values.
Run it:  python -m pytest tests/quantize
"""
