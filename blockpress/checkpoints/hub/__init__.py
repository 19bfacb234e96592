"""Models of the Hugging Face hub: what is fetched, where it is kept, what is said when that fails.

Invariant: only `download` speaks to the network, and only where somebody asked for it.
Run it:  python -m pytest tests/checkpoints/test_hub.py
"""
