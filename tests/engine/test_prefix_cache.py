"""What may be taken over: digests tell contexts apart, and the longest prefix is that of the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpress.engine import prefix_cache
from blockpress.engine.block_tables import BlockTables
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request
from blockpress.engine.sizing import DROPPED
from tests.engine.simulator import KINDS, PAGE, ask, prints, small

SUN, MOON = HashedImageSpan(2, 3, b"sun"), HashedImageSpan(2, 3, b"moon")
TEXT = list(range(10, 30))


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (ask(TEXT), 5),
        (ask([*TEXT[:9], 3, *TEXT[10:]]), 2),
        (ask([3, *TEXT[1:]]), 0),
        (ask(TEXT[:11]), 2),
        (ask(TEXT, "autoregressive"), 5),
        (ask([*TEXT[4:8], *TEXT[:16]]), 0),
        (ask(TEXT, pictures=(SUN,)), 0),
        (ask(TEXT, pictures=(HashedImageSpan(7, 3, b"sun"),)), 1),
        (ask(TEXT, pictures=(HashedImageSpan(8, 3, b"sun"),)), 2),
    ],
    ids=["same", "token", "first", "shorter", "mode", "shifted", "picture", "reaches in", "behind"],
)
def test_digests_agree_as_far_as_contexts_do(other: Request, equal: int):
    ours, theirs = ask(TEXT), other
    mine = prefix_cache.extend_digests(ours, 5, PAGE)
    its = prefix_cache.extend_digests(theirs, len(theirs.context) // PAGE, PAGE)
    assert [a == b for a, b in zip(mine, its, strict=False)] == [number < equal for number in range(len(its))]


@pytest.mark.parametrize(
    ("one", "other"),
    [(SUN, MOON), (SUN, HashedImageSpan(1, 3, b"sun")), (SUN, HashedImageSpan(2, 4, b"sun"))],
    ids=["shows", "start", "length"],
)
def test_different_pictures_have_different_digests(one: HashedImageSpan, other: HashedImageSpan):
    a, b = (prefix_cache.extend_digests(ask(TEXT, pictures=(picture,)), 5, PAGE) for picture in (one, other))
    assert not {*a} & {*b}


@given(st.data())
def test_equal_digests_are_equal_contexts(data: st.DataObject):
    """Against prints, which hash all that a token's keys and values depend on: equal exactly where these are."""

    def drawn() -> Request:
        context = data.draw(st.lists(st.integers(0, 1), min_size=PAGE, max_size=3 * PAGE))
        start = data.draw(st.integers(0, len(context) - 1))
        length = data.draw(st.integers(0, len(context) - start))
        shown = (HashedImageSpan(start, length, data.draw(st.sampled_from([b"a", b"b"]))),) if length else ()
        return ask(context, pictures=shown)

    one, other = drawn(), drawn()
    pages = min(len(one.context), len(other.context)) // PAGE
    digests = [prefix_cache.extend_digests(request, pages, PAGE) for request in (one, other)]
    for number in range(pages):
        last = (number + 1) * PAGE - 1
        assert (digests[0][number] == digests[1][number]) == (prints(one)[last] == prints(other)[last])


def test_digests_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    made = []
    plain = prefix_cache.page_digest
    monkeypatch.setattr(prefix_cache, "page_digest", lambda *all_: made.append(1) or plain(*all_))
    request = ask(TEXT)
    (
        prefix_cache.extend_digests(request, 2, PAGE),
        prefix_cache.extend_digests(request, 1, PAGE),
        prefix_cache.extend_digests(request, 3, PAGE),
    )
    assert len(made) == len(request.digests) == 3


def knows(full: str, sliding: str) -> Callable[[int], tuple[bool, bool]]:
    return lambda number: (full[number] == "+", sliding[number] == "+")


@pytest.mark.parametrize(
    ("full", "sliding", "window", "found"),
    [
        ("+++++", "+++++", 6, 5),
        ("+++++", "-----", 1, 5),  # a window that looks back at nothing
        ("+++++", "---++", 6, 5),  # from 20 on it looks back to 15, in page 3
        ("+++++", "----+", 6, 0),
        ("+++++", "-++-+", 6, 3),  # from 12 on to 7, in page 1
        ("++-++", "+++++", 6, 2),
        ("-++++", "+++++", 6, 0),
        ("+++++", "+++++", 99, 5),
        ("+++++", "-++++", 99, 0),
        ("+++++", "+++++", None, 5),
    ],
)
def test_the_longest_cached_prefix_is_found(full: str, sliding: str, window: int | None, found: int):
    assert prefix_cache.longest_prefix(ask(TEXT), PAGE, knows(full, sliding), window) == found


@pytest.mark.parametrize(
    ("length", "speaks", "found"),
    [
        (8, "diffusion", 2),
        (8, "autoregressive", 1),
        (9, "autoregressive", 2),
        (4, "autoregressive", 0),
        (3, "diffusion", 0),
    ],
)
def test_tokens_whose_logits_are_wanted_are_computed(length: int, speaks: str, found: int):
    assert prefix_cache.longest_prefix(ask(TEXT[:length], speaks), PAGE, knows("+" * 5, "+" * 5), 6) == found


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=10, max_size=10),
    st.integers(1, 30),
    st.integers(0, 30),
    st.integers(1, 12),
    st.sampled_from(["diffusion", "autoregressive"]),
)
def test_the_longest_cached_prefix_follows_the_definition(
    length: int, known: list[tuple[bool, bool]], window: int, start: int, wide: int, speaks: str
):
    picture = HashedImageSpan(start, wide, b"sun")
    request = ask([5] * length, speaks, (picture,))

    def allowed(pages: int) -> bool:
        stop = pages * PAGE
        tokens = range(max(0, stop - (window - 1)), stop)
        return (
            stop <= length - (speaks == "autoregressive")
            and all(known[number][0] for number in range(pages))
            and all(known[at // PAGE][1] for at in tokens)
            and not picture.start < stop < picture.stop
        )

    want = max(pages for pages in range(11) if pages == 0 or allowed(pages))
    assert prefix_cache.longest_prefix(request, PAGE, known.__getitem__, window) == want


def read(tables: BlockTables, request: Request, part: int = 5) -> None:
    """Read its whole context, a part at a time."""
    tables.adopt(request, tables.match(request))
    while request.num_pending_tokens:
        stop = min(request.num_computed_tokens + part, len(request.context))
        assert tables.extend(request, stop)
        tables.mark_written(request, stop)


def test_a_second_request_reuses_the_prefix_of_the_first():
    """Pages of 4 tokens, a window of 6. The first has read 18 tokens; the second begins with the first 16 of them.

    full      first [0, 1, 2, 3, 4]     second [0, 1, 2, 3]          16 tokens that it need not read
    sliding   first [-, -, -, 3, 4]     second [-, -, 2, 3]          2 was let go by the first, and is reusable
    """
    tables = BlockTables(small(), EngineOptions(), dict.fromkeys(KINDS["both"], 10))
    first, second = ask(TEXT[:18]), ask([*TEXT[:16], 3, 3, 3])
    read(tables, first)
    assert first.tables == {"full_attention": [0, 1, 2, 3, 4], "sliding_attention": [DROPPED] * 3 + [3, 4]}
    assert tables.pools["sliding_attention"].reusable == 3
    assert tables.adopt(second, tables.match(second)) == 16
    assert second.tables == {"full_attention": [0, 1, 2, 3], "sliding_attention": [DROPPED] * 2 + [2, 3]}
    tables.check([first, second])
    assert tables.pools["full_attention"].holders(0) == 2
    assert tables.pools["sliding_attention"].reusable == 2
    tables.release(first), tables.release(second)
    tables.check([])


@pytest.mark.parametrize("reuse", [True, False])
def test_reuse_can_be_switched_off(reuse: bool):
    tables = BlockTables(small(), EngineOptions(reuse_prefixes=reuse), dict.fromkeys(KINDS["both"], 10))
    first, second = ask(TEXT), ask(TEXT)
    read(tables, first)
    tables.release(first)
    assert tables.adopt(second, tables.match(second)) == (20 if reuse else 0)
    assert tables.pools["full_attention"].reusable == 0
    assert bool(first.digests) == reuse


def test_pages_with_nan_are_not_reused():
    tables = BlockTables(small(), EngineOptions(), dict.fromkeys(KINDS["both"], 10))
    first = ask(TEXT)
    read(tables, first)
    tables.release(first, discard=True)
    assert not any(tables.match(ask(TEXT)).values())
    assert [(pool.available, pool.reusable) for pool in tables.pools.values()] == [(10, 0)] * 2
    tables.check([])


def test_the_end_of_a_context_is_evicted_before_its_beginning():
    tables = BlockTables(small(), EngineOptions(), {"full_attention": 5})
    first = ask(TEXT)
    read(tables, first)
    tables.release(first)
    assert len(tables.pools["full_attention"].allocate(2) or []) == 2
    assert [len(found) for found in tables.match(ask(TEXT)).values()] == [3]


def test_full_pages_are_contiguous_however_a_prompt_is_chunked():
    """Three contexts read in turn, a page at a time: the full pages of each are in one piece from the first part on."""
    tables = BlockTables(small(), EngineOptions(), dict.fromkeys(KINDS["both"], 15))
    requests = [ask(TEXT), ask(TEXT[::-1]), ask([3] * 20)]
    for request in requests:
        tables.adopt(request, tables.match(request))
    for stop in range(PAGE, len(TEXT) + 1, PAGE):
        for request in requests:
            assert tables.extend(request, stop)
            tables.mark_written(request, stop)
            assert len(request.tables["sliding_attention"]) == stop // PAGE
    starts = [request.tables["full_attention"][0] for request in requests]
    assert [request.tables["full_attention"] for request in requests] == [[*range(at, at + 5)] for at in starts]
