"""Acceptance against the definition in plain numbers, and what must hold for any entropies."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpress.diffusion import EntropyBound

# Multiples of 1/256 add up exactly in float32, so that the plain sum and the tensor's are one and the same.
EXACT = st.integers(0, 1024).map(lambda n: n / 256)
CANVAS = st.lists(EXACT, min_size=1, max_size=40)
BOUND = st.integers(0, 4096).map(lambda n: n / 256)
ANY = st.lists(st.floats(0, 12, width=32), min_size=1, max_size=40)


def accepted(entropies: list[list[float]], bound: float) -> list[list[bool]]:
    return EntropyBound(bound)(torch.tensor(entropies, dtype=torch.float32)).tolist()


def plain(entropies: list[float], bound: float) -> list[bool]:
    """The k surest positions with (their sum) - (the largest of them) <= bound, for the greatest such k."""
    order = sorted(range(len(entropies)), key=entropies.__getitem__)
    best = max(k for k in range(1, len(order) + 1) if sum(entropies[i] for i in order[: k - 1]) <= bound)
    return [place in order[:best] for place in range(len(entropies))]


@given(CANVAS, BOUND)
def test_accepted_positions_follow_the_definition(entropies: list[float], bound: float):
    assert accepted([entropies], bound) == [plain(entropies, bound)]


@given(ANY, st.floats(1e-6, 1e-3))
def test_the_surest_position_is_always_accepted(entropies: list[float], bound: float):
    (mask,) = accepted([entropies], bound)
    assert mask[entropies.index(min(entropies))]


@given(ANY, st.floats(1e-6, 50), st.floats(0, 50))
def test_a_larger_bound_accepts_a_superset(entropies: list[float], bound: float, more: float):
    (less,), (greater,) = accepted([entropies], bound), accepted([entropies], bound + more)
    assert all(wide or not narrow for narrow, wide in zip(less, greater, strict=True))


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=40, unique=True), st.floats(1e-6, 50), st.randoms())
def test_permuted_positions_permute_the_mask(entropies: list[float], bound: float, random):  # type: ignore[no-untyped-def]
    order = list(range(len(entropies)))
    random.shuffle(order)
    (mask,), (moved,) = accepted([entropies], bound), accepted([[entropies[i] for i in order]], bound)
    assert moved == [mask[i] for i in order]


@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(EXACT, min_size=n, max_size=n), min_size=2, max_size=5)),
    BOUND,
)
def test_rows_are_independent(rows: list[list[float]], bound: float):
    assert accepted(rows, bound) == [accepted([row], bound)[0] for row in rows]


def test_the_bound_is_inclusive():
    # Sums before each: 0, 1/4, 3/4.
    assert accepted([[0.25, 0.5, 4.0]], 0.75) == [[True, True, True]]
    assert accepted([[0.25, 0.5, 4.0]], 0.7499) == [[True, True, False]]


def test_of_equal_entropies_the_first_positions_win():
    assert accepted([[0.5, 0.5, 0.5, 0.5]], 0.5) == [[True, True, False, False]]
