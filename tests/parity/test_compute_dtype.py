"""Weights in bfloat16, computed in float32: nearer to the oracle's float32 run than the oracle's own bfloat16 run is."""

from __future__ import annotations

import pytest
import torch

from blockpress.checkpoints.build import Types, hold

from .checkpoints import CASES, OPS, compared
from .conftest import Report
from .oracle import distance, kinds, network_like, our_figures, their_figures, to_bfloat16
from .test_bfloat16 import by_token, geometric_mean, group

pytestmark = pytest.mark.parity

CLOSER = 0.001


@pytest.mark.parametrize("name", ["canvas longer than the window", "the published pattern, twice", "sudoku-nano"])
def test_bfloat16_weights_computed_in_float32_are_nearer_than_bfloat16(name: str, report: Report) -> None:
    """In every group of figures our distance is at most a thousandth of the oracle's bfloat16 run's.

    Both compute from the same bfloat16 values. What is left of ours is the order of float32 sums: a share of 2^-16 of
    what a bfloat16 rounding is, more where layers raise it, and more again for a token that it sends to another expert.
    """
    c = compared(name, 0, rounded=True)
    low = to_bfloat16(c.theirs)
    network = network_like(low, CASES[name].config, OPS["grouped"])
    hold(network, Types(storage=torch.bfloat16, compute=torch.float32))
    assert (network.dtype, network.storage_dtype) == (torch.float32, torch.bfloat16)
    theirs = [their_figures(low, row, "eager", told) for row, told in zip(c.rows, c.signals, strict=True)]
    ours = our_figures(network, c.rows, c.signals)
    apart: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for kind in kinds(c.eager[0]):
        mine, others = apart.setdefault(group(kind), ([], []))
        for figures, told, truth in zip(ours, theirs, c.eager, strict=True):
            mine.append(by_token(figures[kind], truth[kind]))
            others.append(by_token(told[kind], truth[kind]))
            assert distance(figures[kind], truth[kind]) <= distance(told[kind], truth[kind])
    for kind, (mine, others) in apart.items():
        ratio = geometric_mean(mine) / geometric_mean(others)
        report(f"bfloat16 computed in float32, our distance over theirs, {kind}", ratio, CLOSER)
        assert ratio <= CLOSER, f"{kind}: {ratio}"
