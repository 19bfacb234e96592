"""Keyed randomness: Philox against its published vectors and a scalar version, and draws that nothing else disturbs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.diffusion import KeyedDraws
from blockpress.diffusion.noise import in_tensors, philox
from tests.conftest import num_examples

WORD = st.integers(0, 2**32 - 1)


def scalar_philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, on Python's whole numbers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def vector_philox(counter: Sequence[int], key: Sequence[int], version=philox) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    c0, c1, c2, c3, k0, k1 = (torch.tensor([word]) for word in (*counter, *key))
    return tuple(int(word) for word in version((c0, c1, c2, c3), (k0, k1)))


def tensor_philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    return vector_philox(counter, key, in_tensors)


@pytest.mark.parametrize("version", [scalar_philox, vector_philox, tensor_philox])
@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_published_vectors_of_random123(version, counter: str, key: str, wanted: str):  # type: ignore[no-untyped-def]
    numbers = [[int(word, 16) for word in text.split()] for text in (counter, key)]
    assert " ".join(f"{word:08x}" for word in version(*numbers)) == wanted


@given(st.lists(WORD, min_size=4, max_size=4), st.lists(WORD, min_size=2, max_size=2))
def test_philox_equals_the_scalar_version(counter: list[int], key: list[int]):
    assert vector_philox(counter, key) == tensor_philox(counter, key) == scalar_philox(counter, key)


def draws(seeds: Sequence[int], canvases: Sequence[int], length: int = 6, vocab: int = 1000) -> KeyedDraws:
    return KeyedDraws(seeds, canvases, length=length, vocab=vocab)


def numbers(keyed: KeyedDraws, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
    return keyed.noise(torch.tensor(rows), step), keyed.uniform(torch.tensor(rows), step)


@given(st.integers(-(2**70), 2**70), st.integers(0, 5000), st.integers(0, 48), st.integers(1, 300_000))
def test_a_draw_is_the_documented_function_of_its_coordinates(seed: int, canvas: int, step: int, vocab: int):
    noise, uniform = numbers(draws([seed], [canvas], vocab=vocab), [0], step)
    key = seed % 2**32, (seed >> 32) % 2**32
    for position in range(6):
        fill = scalar_philox((position, step, canvas, 0), key)
        pick = scalar_philox((position, step, canvas, 1), key)
        assert noise[0, position].item() == fill[0] * vocab // 2**32 < vocab
        assert uniform[0, position].item() == (pick[0] * 2**21 + pick[1] // 2**11) / 2**53 < 1


@given(
    st.lists(st.tuples(st.integers(-5, 2**65), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(0, 48),
    st.data(),
)
def test_draws_do_not_depend_on_the_batch(rows: list[tuple[int, int]], step: int, data: st.DataObject):
    seeds, canvases = zip(*rows, strict=True)
    asked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    together = numbers(draws(seeds, canvases), asked, step)
    for place, row in enumerate(asked):
        alone = numbers(draws([seeds[row]], [canvases[row]]), [0], step)
        assert all(torch.equal(many[place], one[0]) for many, one in zip(together, alone, strict=True))


@given(st.lists(st.tuples(st.integers(-5, 2**65), st.integers(0, 3), st.integers(1, 48)), min_size=1, max_size=6))
def test_draws_made_together_equal_those_made_one_by_one(rows: list[tuple[int, int, int]]):
    """Made from tensors of words, too."""
    seeds, canvases, steps = (list(x) for x in zip(*rows, strict=True))
    keyed, every, number = draws(seeds, canvases), torch.arange(len(rows)), torch.tensor(steps)
    low, high = (torch.tensor([seed >> shift & 0xFFFFFFFF for seed in seeds]) for shift in (0, 32))
    other = KeyedDraws.from_words(low, high, torch.tensor(canvases), length=6, vocab=1000)
    wanted = keyed.noise(every, 0), keyed.noise(every, number), keyed.uniform(every, number)
    assert all(torch.equal(a, b) for a, b in zip(other.of_step(number), wanted, strict=True))


def test_draws_do_not_depend_on_the_order_of_calls():
    one, other = draws([5], [0]), draws([5], [0])
    forwards = [numbers(one, [0], step) for step in range(5)]
    backwards = [numbers(other, [0], step) for step in reversed(range(5))][::-1]
    assert all(torch.equal(a, b) for x, y in zip(forwards, backwards, strict=True) for a, b in zip(x, y, strict=True))


def test_longer_canvases_and_other_rows_begin_with_the_same_draws():
    assert torch.equal(numbers(draws([5], [1], length=40), [0], 3)[0][:, :6], numbers(draws([5], [1]), [0], 3)[0])


def test_every_coordinate_changes_the_draws():
    def drawn(seed: int = 1, canvas: int = 0, step: int = 1) -> tuple[Tensor, Tensor]:
        return numbers(draws([seed], [canvas], length=32, vocab=2**20), [0], step)

    kinds = [drawn(), drawn(seed=2), drawn(seed=1 + 2**32), drawn(canvas=1), drawn(step=2), drawn(step=0)]
    for which in (0, 1):
        values = torch.stack([kind[which][0].double() for kind in kinds])
        assert len(values.unique()) == values.numel()  # positions differ too
    noise, uniform = drawn()
    assert not torch.equal(noise[0], (uniform[0] * 2**20).long())  # the purposes differ


@pytest.mark.parametrize(
    ("seed", "same"), [(-1, 2**64 - 1), (2**64, 0), (2**64 + 7, 7), (-(2**64) + 3, 3), (2**130 + 11, 11)]
)
def test_seeds_count_modulo_two_to_the_64(seed: int, same: int):
    one, other = numbers(draws([seed], [0]), [0], 1), numbers(draws([same], [0]), [0], 1)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def deviation(counts: Tensor) -> float:
    """Pearson's chi-square of counts that should be equal, in standard deviations from its mean."""
    expected = counts.sum() / len(counts)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1))


@pytest.mark.parametrize("vocab", [2, 16, 1000])
def test_noise_is_uniform_over_the_vocabulary(vocab: int):
    keyed = draws(range(40), [0] * 40, length=256, vocab=vocab)
    tokens = torch.cat([numbers(keyed, range(40), step)[0].flatten() for step in range(10)])
    assert 0 <= tokens.min() < tokens.max() < vocab
    assert abs(deviation(tokens.bincount(minlength=vocab).double())) < 5


def test_uniforms_are_uniform_and_independent_of_their_neighbours():
    keyed = draws(range(40), [0] * 40, length=256)
    cells = torch.stack([(numbers(keyed, range(40), step)[1] * 16).long() for step in range(10)])
    pairs = {
        "single": cells.flatten(),
        "step": cells[1:] * 16 + cells[:-1],
        "seed": cells[:, 1:] * 16 + cells[:, :-1],
        "position": cells[..., 1:] * 16 + cells[..., :-1],
    }
    for name, values in pairs.items():
        assert abs(deviation(values.flatten().bincount().double())) < 5, name


@settings(max_examples=num_examples(30))
@given(st.integers(0, 2**64), st.integers(1, 48))
def test_a_sample_uses_the_uniform_of_its_position(seed: int, step: int):
    keyed = draws([seed], [2], vocab=4)
    sampled = keyed.sample(torch.tensor([0]), step, torch.zeros(1, 6, 4))
    assert torch.equal(sampled, (keyed.uniform(torch.tensor([0]), step) * 4).long())
