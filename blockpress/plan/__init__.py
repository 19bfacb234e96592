"""What a model will need here, said before it is loaded.

Invariant: headers and configurations are read, no weight is.
Run it:  python -m pytest tests/checkpoints/test_memory.py
"""
