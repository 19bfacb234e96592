"""Entropy and sampling over the vocabulary against float64 on the whole row, across tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import vocabulary
from blockpress.ops.vocabulary import plain
from tests.conftest import num_examples

SIZES = [2, 5, 64, vocabulary.TILE - 1, vocabulary.TILE, vocabulary.TILE + 1, 3 * vocabulary.TILE - 7]
LARGEST_UNIFORM = 1 - 2.0**-53


def logits(size: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, generator=torch.Generator().manual_seed(seed + size)) * spread


def inverse_cdf(scaled: Tensor, uniform: Tensor) -> tuple[list[int], list[float]]:
    """The token that holds u in the whole row's cumulative sum, and how far u is from that token's ends (a share)."""
    tokens, margins = [], []
    for row, u in zip(scaled.double().flatten(0, 1).numpy(), uniform.flatten().tolist(), strict=True):
        sums = np.cumsum(np.exp(row - row.max()))
        sums = sums / sums[-1]
        tokens.append(int(np.searchsorted(sums, u, side="right")))
        margins.append(float(np.abs(sums - u).min()))
    return tokens, margins


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_entropy_follows_the_definition(size: int, spread: float):
    scaled = logits(size, spread)
    log_p = torch.log_softmax(scaled.double(), dim=-1)
    torch.testing.assert_close(
        vocabulary.entropy(scaled).double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("gap", [6.0, 9.0, 12.0, 15.0, 18.0, 25.0])
def test_many_small_probabilities_beside_a_large_one_all_count(gap: float):
    scaled = torch.zeros(1, 2, 262_144)
    scaled[..., 7] = gap
    log_p = torch.log_softmax(scaled.double(), dim=-1)
    wanted = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(vocabulary.entropy(scaled).double(), wanted, rtol=1e-6, atol=0)


def test_entropy_of_certain_and_uniform_logits():
    one_hot = torch.full((1, 1, 8), -math.inf)
    one_hot[..., 3] = 2.0
    assert vocabulary.entropy(one_hot).item() == 0
    assert vocabulary.entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))


def test_impossible_tokens_add_no_entropy():
    half = torch.tensor([[[0.0, -math.inf, 0.0, -math.inf]]])
    assert vocabulary.entropy(half).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("size", SIZES)
def test_a_sample_is_the_inverse_of_the_cumulative_distribution(size: int):
    for seed in range(20):
        scaled = logits(size, seed=1000 * seed)
        uniform = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        tokens, margins = inverse_cdf(scaled, uniform)
        got = vocabulary.sample(scaled, uniform).flatten().tolist()
        assert [a == b or margin < 1e-6 for a, b, margin in zip(got, tokens, margins, strict=True)] == [True] * 6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, LARGEST_UNIFORM])
def test_an_impossible_token_is_never_drawn(size: int, uniform: float):
    scaled = torch.zeros(1, 1, size)
    possible = {size // 2, (size - 1) // 2}
    scaled[..., [token for token in range(size) if token not in possible]] = -math.inf
    assert vocabulary.sample(scaled, torch.full((1, 1), uniform, dtype=torch.float64)).item() in possible


@settings(max_examples=num_examples(50))
@given(st.integers(2, 9000), st.floats(0, LARGEST_UNIFORM), st.floats(0, 200), st.integers(0, 99))
def test_every_sample_is_a_token_of_the_vocabulary(size: int, u: float, spread: float, seed: int):
    scaled = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(seed)) * spread
    token = vocabulary.sample(scaled, torch.full((1, 1), u, dtype=torch.float64)).item()
    assert 0 <= token < size
    assert (scaled[0, 0, int(token)] - scaled.max()).exp() > 0


def test_where_rounding_leaves_no_sum_above_the_target_the_last_token_that_adds_weight_is_taken():
    # A place in a tile is a difference of sums, and may come out as large as all of the tile.
    through = torch.tensor([[[1.0, 2.0, 2.0, 2.0]]], dtype=torch.float64)
    places = [plain._first_above(through, torch.full((1, 1), x, dtype=torch.float64)).item() for x in (1.0, 2.0, 2.1)]
    assert places == [1, 1, 1]


def test_samples_have_the_frequencies_of_the_softmax():
    scaled = logits(16)[:1, :1]
    uniform = (torch.arange(20_000, dtype=torch.float64)[None] + 0.5) / 20_000
    counts = vocabulary.sample(scaled.expand(1, 20_000, 16), uniform)[0].bincount(minlength=16)
    torch.testing.assert_close(counts / 20_000, torch.softmax(scaled[0, 0], -1), rtol=0, atol=1e-4)


def test_a_sample_does_not_depend_on_other_rows():
    scaled, uniform = logits(5000), torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = [
        vocabulary.sample(scaled[i : i + 1, j : j + 1], uniform[i : i + 1, j : j + 1]) for i in (0, 1) for j in range(3)
    ]
    assert torch.equal(torch.cat(alone).view(2, 3), vocabulary.sample(scaled, uniform))
