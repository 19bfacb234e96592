"""The stop finder against the plain computation on the whole text."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blockpress.text.stops
from blockpress.errors import RequestError
from blockpress.text.stops import StopFinder

SIGNS = st.text(alphabet="ab", max_size=30)


def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    start, _, stop = min(found, default=(len(text), 0, None))
    return text[:start], stop


@given(SIGNS, st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4), st.data())
def test_stops_do_not_depend_on_how_text_is_split(text: str, stops: list[str], data: st.DataObject):
    finder = StopFinder(stops)
    out, rest = "", text
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        out, rest = out + finder.feed(rest[:count]), rest[count:]
        # What waits can always still become a stop string, so nothing waits longer than it must.
        waiting = text[len(out) : len(text) - len(rest)]
        assert finder.found or any(stop.startswith(waiting) or stop in waiting for stop in stops) or not waiting
    out += finder.finish()
    assert (out, finder.found) == plain(text, stops)
    assert finder.released == len(out)


def test_an_earlier_start_wins_over_an_earlier_end():
    finder = StopFinder(["abcd", "bc"])
    assert [finder.feed(sign) for sign in "xabcd"] == ["x", "", "", "", ""]
    assert finder.found == "abcd"


def test_a_complete_stop_that_waited_counts_at_the_end():
    finder = StopFinder(["abcd", "bc"])
    assert (finder.feed("xabc"), finder.finish(), finder.found) == ("x", "a", "bc")


def test_nothing_comes_after_a_stop():
    finder = StopFinder(["END"])
    assert (finder.feed("1END2"), finder.feed("3"), finder.finish()) == ("1", "", "")


def test_long_stop_strings_cost_no_more_than_short_ones():
    # 400,000 comparisons of up to 50,000 characters each would take minutes.
    finder = StopFinder(["a" * 50_000 + "b"])
    text = "".join(finder.feed("a" * 100) for _ in range(2_000)) + finder.finish()
    assert text == "a" * 200_000


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "stop[0]='' is empty"),
        (["a", ""], "stop[1]='' is empty"),
        (["a", 3], "stop[1]=3 is not a string"),
        ("END", "stop='END' is not a list of strings"),
        (None, "stop=None is not a list of strings"),
    ],
)
def test_a_wrong_stop_string_is_named(stop: object, message: str):
    with pytest.raises(RequestError) as caught:
        StopFinder(stop)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_the_documented_example_holds():
    assert doctest.testmod(blockpress.text.stops).failed == 0
