"""The temperatures against the closed formula of the reference model, section 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpress.diffusion import Schedule


@given(st.integers(1, 64), st.floats(0.05, 2), st.floats(0, 2))
def test_temperatures_follow_the_formula(steps: int, t_min: float, spread: float):
    schedule = Schedule(steps=steps, t_min=t_min, t_max=t_min + spread)
    for step, remaining in zip(range(1, steps + 1), range(steps, 0, -1), strict=True):
        temperature = schedule.temperature(step)
        share = np.float32(remaining) / np.float32(steps)
        wanted = np.float32(t_min) + np.float32(t_min + spread - t_min) * share
        assert temperature.dtype == torch.float32
        assert temperature.item() == pytest.approx(float(wanted), rel=2e-7)


def test_temperatures_start_at_t_max_and_end_one_step_above_t_min():
    schedule = Schedule(steps=48, t_min=0.4, t_max=0.8)
    temperatures = [schedule.temperature(step).item() for step in range(1, 49)]
    assert temperatures[0] == pytest.approx(0.8)
    assert temperatures[-1] == pytest.approx(0.4 + 0.4 / 48)
    assert temperatures == sorted(temperatures, reverse=True)


def test_a_single_step_is_taken_at_t_max():
    assert Schedule(steps=1, t_min=0.1, t_max=0.9).temperature(1).item() == pytest.approx(0.9)
