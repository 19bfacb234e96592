"""When a canvas settles: unchanged for long enough, and surer than the threshold, not merely as sure."""

from __future__ import annotations

import pytest
import torch

from blockpress.diffusion import StableAndConfident


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
def test_stability_counts_unchanged_steps(stability: int):
    unchanged = torch.arange(6)
    settled = StableAndConfident(stability, 0.5)(unchanged, torch.zeros(6, 4))
    assert settled.tolist() == [count >= stability for count in range(6)]


def test_confidence_is_strict():
    entropy = torch.tensor([[0.25, 0.25], [0.5, 0.25], [0.75, 0.25], [0.0, 1.0], [0.75, 0.5]])
    settled = StableAndConfident(1, 0.5)(torch.ones(5, dtype=torch.long), entropy)
    assert settled.tolist() == [True, True, False, False, False]


def test_a_confidence_of_zero_never_settles():
    assert not StableAndConfident(0, 0.0)(torch.tensor([9]), torch.zeros(1, 4)).item()


def test_settling_needs_stability_and_confidence():
    unchanged, entropy = torch.tensor([0, 1, 0, 1]), torch.tensor([[0.0], [0.0], [9.0], [9.0]])
    assert StableAndConfident(1, 0.1)(unchanged, entropy).tolist() == [False, True, False, False]
