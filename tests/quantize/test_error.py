"""The error's figures against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpress.quantize.encoders import ErrorSum


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 299))
def test_figures_follow_the_definitions_in_any_tiles(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(300, 7, generator=generator)
    restored = original + 0.1 * torch.randn(300, 7, generator=generator)
    errors, rest = ErrorSum(), ErrorSum()
    errors.add(original[:cut], restored[:cut])
    rest.add(original[cut:], restored[cut:])
    errors.join(rest)
    found, x, y = errors.result(), original.double().flatten(), restored.double().flatten()
    assert found.values == 2100
    assert found.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    assert found.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), rel=1e-6)
    assert found.largest == pytest.approx(float((x - y).abs().max()), rel=1e-6)


def test_equal_weights_have_no_error_and_zeros_have_full_error() -> None:
    ones, zeros = torch.ones(4, 4), torch.zeros(4, 4)
    for original, restored, relative, cosine in (
        (ones, ones, 0, 1),
        (zeros, zeros, 0, 1),
        (ones, zeros, 1, 0),
        (zeros, ones, math.inf, 0),
    ):
        errors = ErrorSum()
        errors.add(original, restored)
        assert (errors.result().relative, errors.result().cosine) == (relative, cosine)
