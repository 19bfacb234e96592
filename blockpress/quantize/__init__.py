"""Quantisation of checkpoints: the recipe, the encoders, conversion piece by piece; and synthetic checkpoints.

Invariant: memory does not grow with the checkpoint, and other engines read what is written to the same values.
Run it:  python -m pytest tests/quantize
"""
