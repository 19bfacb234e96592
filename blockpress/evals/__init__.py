"""Quality: how far two models are apart, and what the shipped ones solve.

Invariant: every figure states the number of answers and the seed.
Run it:  python -m pytest tests/evals
"""
