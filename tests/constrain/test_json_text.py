"""JSON texts of strings and numbers: each parses to a value within the limits, and all such values can be written."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.automaton import _NothingMatches
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.formats import FORMATS
from blockpress.constrain.json_numbers import Bound, json_integer, json_number
from blockpress.constrain.json_text import json_string, text_of
from tests.conftest import num_examples
from tests.constrain.walks import random_text

WHOLE = st.one_of(st.none(), st.integers(-1200, 1200))
DECIMALS = st.decimals(-30, 30, places=2, allow_nan=False)
BOUNDS = st.one_of(st.none(), st.tuples(DECIMALS, st.booleans()))


@settings(max_examples=num_examples(40))
@given(
    low=WHOLE, high=WHOLE, multiple=st.one_of(st.none(), st.integers(1, 12)), values=st.lists(st.integers(-1500, 1500))
)
def test_whole_numbers_within_bounds_and_no_others(
    low: int | None, high: int | None, multiple: int | None, values: list[int]
) -> None:
    def fits(value: int) -> bool:
        return (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (not multiple or value % multiple == 0)
        )

    try:
        automaton = compile_expression(json_integer(low, high, multiple))
    except _NothingMatches:
        assert low is not None and high is not None and not any(map(fits, range(low, high + 1)))
        return
    for value in [*values, *(each + step for each in (low, high) if each is not None for step in (-1, 0, 1))]:
        assert automaton.matches(str(value)) == fits(value)
    assert fits(json.loads(random_text(automaton, random.Random(0))))
    assert not any(automaton.matches(text) for text in ("-0", "007", "+1", "1.0", "", "-"))


@settings(max_examples=num_examples(40))
@given(low=BOUNDS, high=BOUNDS, values=st.lists(DECIMALS, max_size=20), seed=st.integers(0, 99))
def test_decimals_within_bounds_and_no_others(
    low: Bound | None, high: Bound | None, values: list[Decimal], seed: int
) -> None:
    def fits(value: Decimal | float) -> bool:
        kind = type(value)
        above = low is None or (value > kind(low[0]) if low[1] else value >= kind(low[0]))
        return above and (high is None or (value < kind(high[0]) if high[1] else value <= kind(high[0])))

    try:
        automaton = compile_expression(json_number(low, high))
    except _NothingMatches:
        assert not any(map(fits, values))
        return
    for value in [*values, *(bound[0] for bound in (low, high) if bound is not None)]:
        if value or not value.is_signed():
            assert automaton.matches(format(value, "f")) == fits(value)
    text = random_text(automaton, random.Random(seed))
    assert fits(Decimal(text)) and fits(float(json.loads(text)))


WRITTEN = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\b\t\n\f\r")


@settings(max_examples=num_examples(40))
@given(text=st.text(WRITTEN, max_size=8), low=st.integers(0, 4), more=st.one_of(st.none(), st.integers(0, 4)))
def test_strings_of_a_length_as_json_writes_them(text: str, low: int, more: int | None) -> None:
    high = None if more is None else low + more
    automaton = compile_expression(json_string(text_of((low, high))))
    fits = len(text) >= low and (high is None or len(text) <= high)
    assert automaton.matches(json.dumps(text, ensure_ascii=False)) == fits
    assert low <= len(json.loads(random_text(automaton, random.Random(len(text)))))


def test_a_pattern_is_searched_in_the_decoded_text() -> None:
    automaton = compile_expression(json_string(text_of((0, 6), ('a"\\\\',))))
    assert automaton.matches(json.dumps('xa"\\y'))
    assert not automaton.matches(json.dumps('a\\"'))
    assert not automaton.matches(json.dumps('xxxxa"\\'))


def raises(reader: Callable[[str], object], text: str) -> bool:
    try:
        reader(text)
    except (ValueError, ZeroDivisionError):
        return True
    return False


READERS: dict[str, Callable[[str], object]] = {
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "date-time": datetime.fromisoformat,
    "ipv4": IPv4Address,
    "ipv6": IPv6Address,
    "uuid": UUID,
    "uri": lambda text: urlsplit(text).port,
    "uri-reference": lambda text: urlsplit(text).port,
    "iri": lambda text: urlsplit(text).port,
    "iri-reference": lambda text: urlsplit(text).port,
    "uri-template": lambda text: text.index("{") < text.index("}") or 1 / 0 if "{" in text else None,
    "json-pointer": lambda text: text == "" or text.index("/") == 0 or 1 / 0,
    "relative-json-pointer": lambda text: int(text[0]),
    "regex": re.compile,
    "idn-email": lambda text: text.index("@", 1),
    "idn-hostname": lambda text: len(text) <= 253 or 1 / 0,
    "email": lambda text: text.index("@", 1),
    "hostname": lambda text: len(text) <= 253 or 1 / 0,
    "duration": lambda text: text.index("P"),
}


MAY_BE_EMPTY = {"uri-reference", "iri-reference", "uri-template", "json-pointer", "regex"}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_text_of_a_format_has_it(name: str) -> None:
    automaton = compile_expression(text_of((0, None), (), (name,)))
    for seed in range(20):
        text = random_text(automaton, random.Random(seed))
        assert (text or name in MAY_BE_EMPTY) and not raises(READERS[name], text)


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("date", ["2024-01-31", "1999-12-01"], ["2024-02-30", "2024-13-01", "24-01-01", "0000-01-01"]),
        ("time", ["23:59:59Z", "00:00:00.5+02:00"], ["24:00:00Z", "12:00:00", "12:00Z"]),
        ("duration", ["P1D", "PT5M", "P1Y2M", "P3W"], ["P", "PT", "P1H", "P1M1Y", "P1Y2D", "PT1H2S"]),
        ("json-pointer", ["", "/a~1b/0"], ["a", "/~2"]),
        ("relative-json-pointer", ["0", "1/a", "2#"], ["01", "-1", "/a"]),
        ("regex", ["^[a-z]+$", r"\d*"], ["(", "*", "[z-a]"]),
        ("uri-reference", ["a/b", "/x?y#z", "https://a.b"], ["a b", "1:2"]),
        ("uri-template", ["/a/{b}"], ["/{", "}"]),
        ("ipv4", ["255.0.0.1"], ["256.0.0.1", "01.0.0.1", "1.1.1"]),
        ("ipv6", ["::", "::1", "1:2:3:4:5:6:7:8"], ["1:2", "12345::", ":::"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        ("email", ["a.b@example.org"], ["a@", "@b", "a b@c.d"]),
        ("uri", ["https://a.b/c?d=e#f"], ["a.b", "https://"]),
        ("hostname", ["a-b.example"], ["-a", "a..b"]),
    ],
)
def test_a_format_allows_usual_texts_and_no_wrong_ones(name: str, allowed: list[str], refused: list[str]) -> None:
    automaton = compile_expression(text_of((0, None), (), (name,)))
    assert [text for text in (*allowed, *refused) if automaton.matches(text)] == allowed
