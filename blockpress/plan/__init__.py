"""What a model will need on this machine, before it is loaded.

Invariant: headers and configurations are read, weights are not.
Run it:  python -m pytest tests/checkpoints/test_memory.py
"""
