"""Rotary embedding against the rotation of complex numbers."""

from __future__ import annotations

import pytest
import torch

from blockpress.config import Rope
from blockpress.ops.rope import inverse_frequencies, rotary_tables, rotate

DEFAULT = Rope(theta=1e4)
PROPORTIONAL = Rope(theta=1e6, kind="proportional", partial=0.25)


def turned(x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """(x_i + j x_{i + d/2}) e^(j * position * frequency_i), in float64."""
    dim = x.shape[-1]
    turning = int(rope.partial * dim // 2)
    frequencies = torch.tensor([rope.theta ** (-2 * i / dim) if i < turning else 0.0 for i in range(dim // 2)])
    angles = positions[:, None, :, None].double() * frequencies.double() / rope.factor
    number = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double())
    product = number * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((product.real, product.imag), dim=-1)


@pytest.mark.parametrize("dim", [2, 8, 10, 64])
@pytest.mark.parametrize("rope", [DEFAULT, PROPORTIONAL, Rope(theta=1e4, kind="proportional", partial=0.5, factor=8.0)])
def test_pairs_turn_as_complex_numbers(rope: Rope, dim: int):
    x = torch.randn(2, 3, 7, dim, generator=torch.Generator().manual_seed(dim))
    positions = torch.tensor([[0, 1, 2, 3, 50, 51, 300], [9, 8, 7, 6, 5, 4, 1023]])
    cos, sin = rotary_tables(positions, inverse_frequencies(rope, dim), torch.float32)
    # An angle of 1,000 radians is known to 6e-5 in float32.
    torch.testing.assert_close(rotate(x, cos, sin).double(), turned(x, positions, rope), rtol=0, atol=5e-4)


@pytest.mark.parametrize("rope", [DEFAULT, PROPORTIONAL])
def test_a_product_depends_only_on_the_distance(rope: Rope):
    query, key = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def product(at: int, to: int) -> float:
        tables = [rotary_tables(torch.tensor([[p]]), inverse_frequencies(rope, 32), torch.float32) for p in (at, to)]
        return float((rotate(query, *tables[0]) * rotate(key, *tables[1])).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def test_position_zero_is_the_identity():
    x = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(torch.tensor([[0]]), inverse_frequencies(DEFAULT, 8), torch.float32)
    assert torch.equal(rotate(x, cos, sin), x)


def test_the_published_full_layer_turns_64_of_its_256_pairs():
    frequencies = inverse_frequencies(PROPORTIONAL, 512)
    assert frequencies.shape == (256,)
    assert (frequencies > 0).sum() == 64
    assert frequencies[63].item() == pytest.approx(1e6 ** (-126 / 512), rel=1e-6)


def test_tables_have_the_given_type():
    cos, sin = rotary_tables(torch.tensor([[3]]), inverse_frequencies(DEFAULT, 8), torch.bfloat16)
    wide, _ = rotary_tables(torch.tensor([[3]]), inverse_frequencies(DEFAULT, 8), torch.float32)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert torch.equal(cos, wide.bfloat16())
