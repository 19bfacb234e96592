"""Page ids and how many there are: against a pool that is a set, and against the bytes that were given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blockpress import costs
from blockpress.config import PRESETS, LayerConfig
from blockpress.engine.block_pool import BlockPool, FreeRuns
from blockpress.engine.options import EngineOptions
from blockpress.engine.sizing import page_length, plan_pages, window_pages
from blockpress.errors import RequestError

COUNT = "a whole number of at least 1"


@pytest.mark.parametrize(
    ("field", "value", "need"),
    [
        ("max_running", 0, "a whole number from 1 to 65536"),
        ("max_running", 2**31, "a whole number from 1 to 65536"),
        ("max_waiting", 1.0, COUNT),
        ("chunk", True, COUNT),
        ("prefill_tokens", -1, COUNT),
        ("memory", 0, "a number of bytes above 0, or None"),
        ("reuse_prefixes", 1, "True or False"),
        ("soft_embedding", "fast", "'exact' or 'sparse'"),
    ],
)
def test_options_are_refused_by_name(field: str, value: Any, need: str):
    with pytest.raises(RequestError) as caught:
        EngineOptions(**{field: value})
    assert (caught.value.message, caught.value.hint) == (
        f"engine option {field} is {value!r}",
        f"{field} must be {need}",
    )


@given(
    st.sampled_from(["diffusiongemma-26B-A4B", "gemma4-26B-A4B", "sudoku-nano", "tiny"]),
    st.builds(EngineOptions, max_running=st.integers(1, 40), chunk=st.integers(1, 900)),
    st.floats(0, 1),
)
def test_a_plan_holds_one_request_and_no_more_bytes_than_given(preset: str, options: EngineOptions, share: float):
    config, dtype = PRESETS[preset](), "bfloat16"
    sizes = {kind: each * page_length(config) for kind, each in costs.context_bytes(config, dtype).items()}
    given_bytes = int(share * 100 * sum(sizes.values())) + 1
    whole = -(-config.context_length // page_length(config))
    moving = min(whole, window_pages(config, max(options.chunk, config.canvas_length)))
    if given_bytes < sizes["full_attention"] + min(whole, moving + 1) * sizes["sliding_attention"]:
        with pytest.raises(RequestError, match="memory"):
            plan_pages(config, dtype, options, given_bytes)
        return
    counts = plan_pages(config, dtype, options, given_bytes)
    assert sum(sizes[kind] * count for kind, count in counts.items()) <= given_bytes
    assert moving <= counts["sliding_attention"] <= options.max_running * (moving + 1)
    assert 1 <= counts["full_attention"] <= options.max_running * whole
    # Beyond what one request needs, sliding pages take no more than half.
    assert counts["sliding_attention"] * sizes["sliding_attention"] <= max(
        given_bytes / 2, (moving + 1) * sizes["sliding_attention"]
    )


@given(st.sampled_from(["diffusiongemma-26B-A4B", "sudoku-nano", "tiny"]), st.integers(1, 900))
def test_the_hint_names_the_least_memory(preset: str, chunk: int):
    config = PRESETS[preset]()
    with pytest.raises(RequestError, match="engine option memory is 7") as caught:
        plan_pages(config, "float32", EngineOptions(memory=7, chunk=chunk), 7)
    least = int(caught.value.hint.split()[5])
    assert plan_pages(config, "float32", EngineOptions(chunk=chunk), least)["full_attention"] == 1
    with pytest.raises(RequestError, match="memory"):
        plan_pages(config, "float32", EngineOptions(chunk=chunk), least - 1)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_a_single_kind_of_layer_gets_all_pages(kind: Any):
    config = replace(PRESETS["tiny"](), layers=(LayerConfig(kind=kind, head_dim=8, kv_heads=2),))
    page = costs.context_bytes(config, "float32")[kind] * page_length(config)
    assert plan_pages(config, "float32", EngineOptions(chunk=12), 20 * page + 1) == {kind: 20}
    most = 32 * {"sliding_attention": 4, "full_attention": 22}[kind]
    assert plan_pages(config, "float32", EngineOptions(chunk=12), 10_000 * page) == {kind: most}


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 30))))
def test_free_runs_are_a_set_of_ids(total: int, moves: list[tuple[int, int]]):
    """Against a set: what is taken was free, is one run, and goes on from where it was asked to."""
    runs, free = FreeRuns(total), set(range(total))
    for most, other in moves:
        if most and free:
            follows = other + 1 in free and other not in free
            taken = runs.take(most, other if follows else None)
            assert (
                1 <= len(taken) <= most and taken == list(range(taken[0], taken[0] + len(taken))) and free >= {*taken}
            )
            assert not follows or taken[0] == other + 1
            free -= {*taken}
        elif other in range(total) and other not in free:
            runs.put(other)
            free.add(other)
        assert sorted(runs.ids()) == sorted(free) and runs.count == len(free)


def test_growing_requests_stay_contiguous():
    """Pages of four requests, taken in turn: each one's follow one another in memory.

    16 pages    a a a a | c c c c | b b b b | d d d d
    """
    pool = BlockPool(16)
    tables: list[list[int]] = [[], [], [], []]
    for _ in range(4):
        for table in tables:
            pages = pool.allocate(1, table[-1] if table else None)
            assert pages is not None
            table += pages
    assert tables == [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7], [12, 13, 14, 15]]
    assert pool.allocate(1) is None


def filled(total: int) -> BlockPool:
    """A pool all of whose pages are reusable, the first released first; page n goes by the digest of one byte n."""
    pool = BlockPool(total)
    pages = pool.allocate(total)
    assert pages == list(range(total))
    for page in pages:
        pool.publish(page, bytes([page]))
        pool.release(page)
    assert (pool.reusable, pool.available) == (total, total)
    return pool


def test_eviction_is_least_recently_released_first():
    pool = filled(6)
    pool.retain(0)
    pool.release(0)  # in use again since, so 1 is the oldest now
    assert pool.allocate(2) == [1, 2]
    assert [pool.find(bytes([page])) for page in range(6)] == [0, None, None, 3, 4, 5]
    assert pool.evicted == 2
    pool.check()


def test_the_adjacent_page_is_evicted_if_old_enough():
    """Behind page 1, of 0 to 7: 2 is of the older half, and taken; behind page 5, 6 is not, and the oldest is."""
    pool = filled(8)
    pool.retain(1), pool.retain(5)
    assert pool.allocate(1, after=1) == [2]
    assert pool.allocate(1, after=5) == [0]
    pool.check()


def test_held_pages_are_never_evicted():
    pool = filled(3)
    pool.retain(1)
    assert pool.allocate(3) is None
    assert sorted(pool.allocate(2) or []) == [0, 2]
    assert pool.find(b"\1") == 1
    pool.release(1)
    assert pool.allocate(1) == [1]


def test_a_duplicate_page_is_not_indexed():
    pool = BlockPool(2)
    pool.allocate(2)
    pool.publish(0, b"x"), pool.publish(1, b"x")
    assert pool.find(b"x") == 0
    pool.release(1)
    assert (pool.available, pool.reusable) == (1, 0)
    pool.release(0)
    assert (pool.available, pool.reusable) == (2, 1)
    pool.check()


def test_withdrawn_pages_are_not_found():
    pool = filled(2)
    pool.retain(1)
    pool.withdraw(b"\0"), pool.withdraw(b"\1"), pool.withdraw(b"other")
    assert pool.find(b"\0") is None and pool.find(b"\1") is None
    assert (pool.available, pool.reusable, pool.holders(1)) == (1, 0, 1)
    pool.release(1)
    assert pool.reusable == 0
    pool.check()


@given(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1))
def test_allocation_is_all_or_nothing(total: int, counts: list[int]):
    pool, held = BlockPool(total), 0
    for count in counts:
        pages = pool.allocate(count)
        assert (pages is None) == (held + count > total)
        held += 0 if pages is None else len(set(pages))
        assert pool.available == total - held
    assume(held)
    pool.check()


def test_old_pages_are_evicted_for_a_contiguous_run():
    """0 and 3 are free, the others reusable: 1 and its old neighbour 2 are given up to join them.

    0 . | 1 + | 2 + | 3 . | 4 + ...        two pages: 0 and 1, not 0 and 3
    """
    pool = filled(8)
    pool.withdraw(b"\0"), pool.withdraw(b"\3")
    assert pool.allocate(2) == [0, 1]
    assert [pool.find(bytes([page])) for page in range(1, 8)] == [None, None, None, 4, 5, 6, 7]
    pool.check()
