"""Kernels on a GPU: whether they are correct, and how far each is from the roofline.

    check.py      correctness: every kernel against its plain version, on new random inputs
    report.py     a figure, its floor and its share of it: a line of JSON as soon as it is known, a table at the end
    timing.py     events, warmups, medians and minima
    ceilings.py   what this device reaches: a copy, products of the model's shapes
    experts.py, vocabulary.py, attention.py      one kernel after another
    steps.py      the whole network, random weights, batch by batch
    baseline.py   the same config in `transformers`

A part is a module here with `checks() -> list[Check]`, or `bench(report) -> None`, or both.

Invariant: of blockpress only `config`, `costs`, `ops`, `model` and `engine` are imported, and of other packages only
torch, Triton and (in `baseline`) transformers: a bare GPU machine has no more.

Run it:  make check-gpu; make bench-gpu PART=experts
"""

from __future__ import annotations

from blockpress.bench.gpu import standin

standin.install()

PARTS = ("ceilings", "experts", "vocabulary", "attention", "steps", "baseline")
