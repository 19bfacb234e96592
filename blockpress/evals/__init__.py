"""Quality, measured: how far two models are apart, and what the shipped ones solve.

Invariant: every figure says of how many answers it is, and under which seed.
Run it:  python -m pytest tests/evals
"""
