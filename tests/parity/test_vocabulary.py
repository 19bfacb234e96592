"""What a step needs from the logits, and where its random numbers come from, against definitions of others.

Entropy against `torch.distributions`; the sample against a plain float64 running sum, whatever the tiles, and against
softmax by chi-square; Philox against the published known-answer vectors and against whole-number arithmetic.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.diffusion import KeyedDraws
from blockpress.diffusion.noise import in_tensors, philox
from blockpress.ops import vocabulary
from tests.conftest import num_examples

pytestmark = pytest.mark.parity

SIZES = [1, 2, 4095, 4096, 4097, 10_000]
LARGEST = 1 - 2.0**-53

# Random123 (Salmon et al. 2011), tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def logits(size: int, spread: float, seed: int, rows: int = 1, columns: int = 5) -> Tensor:
    """Float32 logits [rows, columns, size], about a tenth of them -inf but never all."""
    draw = torch.Generator().manual_seed(seed)
    out = torch.randn(rows, columns, size, generator=draw) * spread
    banned = torch.rand(out.shape, generator=draw) < 0.1
    banned[..., int(torch.randint(size, (), generator=draw))] = False
    return out.masked_fill(banned, -math.inf)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 20.0])
def test_entropy_equals_torch_distributions(size: int, spread: float) -> None:
    """Against torch.distributions, and both against float64; logits up to 75, as softcap and temperature leave them."""
    scaled = logits(size, spread, seed=size)
    ours = vocabulary.entropy(scaled)
    theirs = torch.distributions.Categorical(logits=scaled).entropy()
    log_p = scaled.double().log_softmax(-1)
    exact = -torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)  # theirs errs by 4e-6 where logits are near 80
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=2e-6)
    assert bool((ours >= -1e-6).all())


def test_entropy_of_certain_and_uniform_logits() -> None:
    sure = torch.full((1, 1, 9), -math.inf)
    sure[..., 4] = 3.0
    assert vocabulary.entropy(sure).item() == 0
    assert vocabulary.entropy(torch.zeros(1, 1, 9)).item() == pytest.approx(math.log(9))


def plain_sample(scaled: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One float64 running sum over the whole vocabulary; the token, and how far the target lay from its nearer end.

    The distance is in parts of the whole sum: what lies within rounding of an end may fall on either side of it.
    """
    through = (scaled - scaled.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    target = uniform * through[..., -1]
    token = (through <= target[..., None]).sum(-1)
    apart = (through - target[..., None]).abs().amin(-1) / through[..., -1]
    return token, apart


@given(
    size=st.sampled_from([*SIZES, 3, 7, 8193]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    seed=st.integers(0, 2**20),
    uniform=st.lists(st.floats(0, LARGEST), min_size=5, max_size=5),
)
@example(size=4096, spread=0.0, seed=0, uniform=[0.0, 0.25, 0.5, 0.75, LARGEST])
@example(size=10_000, spread=20.0, seed=1, uniform=[0.0, 5e-324, 0.5, LARGEST, LARGEST])
@settings(max_examples=num_examples(60))
def test_a_sample_is_the_plain_inverse_cdf(size: int, spread: float, seed: int, uniform: list[float]) -> None:
    scaled = logits(size, spread, seed)
    u = torch.tensor([uniform], dtype=torch.float64)
    ours = vocabulary.sample(scaled, u)
    expected, apart = plain_sample(scaled, u)
    assert bool(((ours == expected) | (apart < 1e-12)).all()), (ours, expected, apart)
    assert bool(scaled.gather(-1, ours[..., None]).isfinite().all()), "a token of logit -inf was drawn"


@pytest.mark.parametrize("size", SIZES)
def test_a_banned_token_is_never_drawn(size: int) -> None:
    """With a single token allowed, first, last or anywhere, every uniform number gives it."""
    u = torch.tensor([[0.0, 1e-300, 0.3, 0.999, LARGEST]], dtype=torch.float64)
    for allowed in {0, size // 2, size - 1}:
        scaled = torch.full((1, 5, size), -math.inf)
        scaled[..., allowed] = -7.0
        assert vocabulary.sample(scaled, u).unique().tolist() == [allowed]


@pytest.mark.parametrize(("size", "draws"), [(2, 4_000), (16, 20_000), (4097, 12_000)])
def test_samples_follow_softmax(size: int, draws: int) -> None:
    """Chi-square of keyed samples against softmax, tokens of fewer than five expected draws put together.

    The seed is fixed; a chance below 1e-4 under the right distribution would be a fault in the draws.
    """
    scaled = torch.randn(size, generator=torch.Generator().manual_seed(7)) * 2
    keyed = KeyedDraws([3], [0], length=draws, vocab=size)
    uniform = keyed.uniform(torch.tensor([0]), 1)[0]
    counts = torch.zeros(size, dtype=torch.float64)
    for chunk in uniform.split(500):
        sampled = vocabulary.sample(scaled.expand(1, len(chunk), size), chunk[None])
        counts += torch.bincount(sampled[0], minlength=size).double()
    expected = scaled.double().softmax(-1) * draws
    rare = expected < 5
    if bool(rare.any()):
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-4


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    words = philox((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(int(word) for word in words) == answer
    assert philox_in_whole_numbers(counter, key) == answer


def philox_in_whole_numbers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, in Python's unbounded whole numbers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high, low = divmod(0xD2511F53 * x0, 2**32)
        higher, lower = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = higher ^ x1 ^ k0, lower, high ^ x3 ^ k1, low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


WORD = st.integers(0, 2**32 - 1)


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox_in_int64_is_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    words = in_tensors((c0, c1, c2, c3), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert tuple(int(word) for word in words) == philox_in_whole_numbers(counter, key)


@given(seed=st.integers(-(2**63), 2**64 - 1), canvas=st.integers(0, 2**20), step=st.integers(0, 512))
@settings(max_examples=15)
def test_keyed_draws_are_philox_of_position_step_canvas_and_purpose(seed: int, canvas: int, step: int) -> None:
    """The counter's order is Triton's, the noise scales a word to the vocabulary, the uniform takes 53 bits of two."""
    keyed = KeyedDraws([0, seed], [9, canvas], length=3, vocab=1000)
    row = torch.tensor([1])
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for position in range(3):
        word, *_ = philox_in_whole_numbers((position, step, canvas, 0), key)
        assert int(keyed.noise(row, step)[0, position]) == word * 1000 // 2**32
        first, second, *_ = philox_in_whole_numbers((position, step, canvas, 1), key)
        assert float(keyed.uniform(row, step)[0, position]) == (first * 2**21 + second // 2**11) / 2**53
