"""A chain's sums and best way are those of all its ways, counted one by one, in C++ and in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpress.ops import compiled
from blockpress.ops.chain import ChainGraph, chain

NATIVE = [pytest.param(True, marks=pytest.mark.skipif(compiled.library("chain") is None, reason="no C++")), False]
STATES, LABELS = 4, 3


@st.composite
def graphs(draw: st.DrawFn) -> ChainGraph:
    moves = draw(
        st.lists(st.tuples(*[st.integers(0, n - 1) for n in (STATES, LABELS, STATES)]), unique=True, max_size=14)
    )
    source, label, target = np.array(moves, np.int32).reshape(-1, 3).T
    return ChainGraph(*(np.ascontiguousarray(each) for each in (source, label, target)), STATES, LABELS)


@pytest.mark.parametrize("native", NATIVE)
@given(
    graph=graphs(),
    positions=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.5, 30.0, 900.0, 1e6, 1e12]),
    missing=st.sampled_from([0.0, 0.3]),
)
def test_sums_and_the_best_way_are_those_of_all_ways(
    native: bool, graph: ChainGraph, positions: int, seed: int, spread: float, missing: float
) -> None:
    draw = np.random.default_rng(seed)
    weight, best, end = (draw.normal(size=size) * spread for size in ((positions, LABELS), (positions, LABELS), STATES))
    for values in (weight, best, end):
        values[draw.random(values.shape) < missing] = -np.inf
    got = chain(graph, 1, end, weight, best, native=native)

    moves = list(zip(graph.source.tolist(), graph.label.tolist(), graph.target.tolist(), strict=True))
    sums, highest = np.full((positions, LABELS), -np.inf), -np.inf
    for way in itertools.product(moves, repeat=positions):
        if way[0][0] != 1 or any(a[2] != b[0] for a, b in itertools.pairwise(way)):
            continue
        total = sum(weight[i, label] for i, (_, label, _) in enumerate(way)) + end[way[-1][2]]
        highest = max(highest, sum(best[i, label] for i, (_, label, _) in enumerate(way)) + end[way[-1][2]])
        for i, (_, label, _) in enumerate(way):
            sums[i, label] = np.logaddexp(
                sums[i, label], total - weight[i, label] if weight[i, label] > -np.inf else -np.inf
            )
    if highest > -np.inf:
        states = got.through.tolist()
        assert states[0] == 1
        score = sum(best[i, label] for i, label in enumerate(got.path)) + end[states[positions]]
        assert score == pytest.approx(highest, rel=1e-12, abs=1e-9)
        assert all((states[i], label, states[i + 1]) in set(moves) for i, label in enumerate(got.path.tolist()))
    shared = got.bias + np.where(np.isneginf(weight), 0, weight)
    expected = sums + np.where(np.isneginf(weight), 0, weight)
    for i in range(positions):
        # Labels that no way of any mass takes may have a bias of their own: it is added to a mass of 0.
        alive = ~np.isneginf(expected[i])
        if not alive.any():
            continue
        np.testing.assert_allclose(
            shared[i, alive] - shared[i, alive].max(),
            expected[i, alive] - expected[i, alive].max(),
            rtol=1e-9,
            atol=1e-9 + 1e-14 * spread,
        )


@pytest.mark.parametrize("native", NATIVE)
def test_a_long_chain_keeps_ways_that_are_far_below_others_until_they_end(native: bool) -> None:
    """Way a is e^-1000 as likely as b at every position, and b cannot end."""
    graph = ChainGraph(*(np.array(each, np.int32) for each in ([0, 1, 0, 2], [0, 0, 1, 1], [1, 1, 2, 2])), 3, 2)
    weight = np.tile([-1000.0, 0.0], (300, 1))
    got = chain(graph, 0, np.array([-np.inf, 0.0, -np.inf]), weight, weight, native=native)
    assert got.path.tolist() == [0] * 300
    assert np.isfinite(got.bias[:, 0]).all() and np.isneginf(got.bias[:, 1]).all()
    nowhere = chain(graph, 0, np.full(3, -np.inf), weight, weight, native=native)
    assert np.isneginf(nowhere.bias).all()


@pytest.mark.skipif(compiled.library("chain") is None, reason="no C++")
def test_both_versions_agree_on_large_graphs() -> None:
    draw = np.random.default_rng(1)
    moves = np.unique(draw.integers(0, [60, 9, 60], (900, 3)), axis=0).astype(np.int32)
    graph = ChainGraph(*(np.ascontiguousarray(each) for each in moves.T), 60, 9)
    weight = draw.normal(size=(80, 9)) * 20
    end = np.where(draw.random(60) < 0.3, 0.0, -np.inf)
    a, b = (chain(graph, 3, end, weight, weight, native=native) for native in (True, False))
    assert a.path.tolist() == b.path.tolist() and a.through.tolist() == b.through.tolist()
    np.testing.assert_allclose(a.bias - a.bias.max(1, keepdims=True), b.bias - b.bias.max(1, keepdims=True), atol=1e-9)
