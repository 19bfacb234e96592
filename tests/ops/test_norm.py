"""RMSNorm against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from blockpress.ops.norm import rms_norm


@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_follows_the_formula(size: float, weighted: bool):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 16, generator=generator) * size
    weight = torch.randn(16, generator=generator) if weighted else None
    wide = x.double()
    wanted = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5
    if weight is not None:
        wanted = wanted * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), wanted, rtol=1e-6, atol=1e-7)


def test_the_weight_is_used_as_stored():
    x = torch.tensor([[3.0, 4.0]])
    assert torch.equal(rms_norm(x, torch.zeros(2), 1e-6), torch.zeros(1, 2))


def test_bfloat16_is_widened_and_cast_back_at_the_end():
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(4, 64, generator=generator).bfloat16(), torch.randn(64, generator=generator).bfloat16()
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    # One rounding, of the float32 result: rounding in between would move some of the 256 values.
    assert torch.equal(got, rms_norm(x.float(), weight.float(), 1e-6).bfloat16())
