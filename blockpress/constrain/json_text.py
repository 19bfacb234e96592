"""The JSON texts of strings and numbers with limits, as expressions.

    string      what the decoded text must be, an automaton --escaped--> what stands in the JSON text
    number      decimal digits compared with the bounds from the left

Texts are written in one way where JSON allows several (no escapes but the necessary ones, no exponent next to bounds),
so that text and value determine each other.

Invariant: every text of an expression parses to a value within the limits.
Run it:  python -m pytest tests/constrain/test_json_text.py
"""

from __future__ import annotations

import json
from decimal import Decimal
from functools import lru_cache
from typing import Any

from blockpress.constrain.automaton import (
    ANY_CHAR,
    EMPTY_TEXT,
    Automaton,
    Bytes,
    Chars,
    Concat,
    Expression,
    Graph,
    Repeat,
    Union,
    _NothingMatches,
    byte_ranges,
    intersection,
    literal,
    optional,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import NOTHING, parse_regex

DIGIT = Chars(((48, 57),))
MOST_DIGITS = 18
"""Most digits of a whole number, and most in front of a point if others follow it: half as many."""
FRACTION = 6
"""Digits after the point next to bounds, unless a bound has more: so few that a float tells any two numbers apart."""
EXACT_DIGITS = 15
"""Decimal digits that a float tells apart: next to bounds, those before and after the point together."""
_ESCAPES = {byte: json.dumps(chr(byte))[1:-1] for byte in (*range(32), 34, 92)}


def json_string(decoded: Automaton) -> Expression:
    """The JSON strings whose decoded text an automaton allows, quotes included."""
    return Concat((literal('"'), _escaped(decoded), literal('"')))


@lru_cache(maxsize=256)
def _escaped(decoded: Automaton) -> Expression:
    edges: list[tuple[int, Expression, int]] = [(0, EMPTY_TEXT, 2)]
    for state, row in enumerate(byte_ranges(decoded)):
        if decoded.accepting[state]:
            edges.append((state + 2, EMPTY_TEXT, 1))
        for low, high, target in row:
            edges += [(state + 2, literal(text), target + 2) for byte, text in _ESCAPES.items() if low <= byte <= high]
            plain = [(low, min(high, 33)), (max(low, 35), min(high, 91)), (max(low, 93), high)]
            edges += [(state + 2, Bytes(max(a, 32), b), target + 2) for a, b in plain if max(a, 32) <= b]
    return Graph(tuple(edges))


@lru_cache(maxsize=256)
def text_of(lengths: tuple[int, int | None], patterns: tuple[str, ...], formats: tuple[str, ...]) -> Automaton:
    """The texts of so many characters in which every pattern is found and which have every format.

    Raises:
        RequestError: a pattern or format that cannot be enforced. _NothingMatches: no text is left.
    """
    if lengths[1] is not None and lengths[0] > lengths[1]:
        raise _NothingMatches
    result = compile_expression(Repeat(ANY_CHAR, *lengths))
    for pattern in patterns:
        result = intersection(result, compile_expression(parse_regex(pattern, search=True)))
    for name in formats:
        result = intersection(result, compile_expression(parse_regex(FORMATS[name])))
    return result


_DATE = (
    r"\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
)
_DATE = r"(?!0000)" + _DATE
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_HEX = r"[0-9a-f]{1,4}"
FORMATS: dict[str, str] = {
    "date": rf"(?a:{_DATE})",
    "time": rf"(?a:{_TIME})",
    "date-time": rf"(?a:{_DATE}T{_TIME})",
    "duration": r"P(?:NW|NY(?:NM)?(?:ND)?|NM(?:ND)?|ND|(?:ND)?T(?:NH(?:NM)?(?:NS)?|NM(?:NS)?|NS))".replace(
        "N", "[0-9]{1,4}"
    ),
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(?:\.[A-Za-z0-9_+-]{{1,16}}){{0,2}}@{_LABEL}(?:\.{_LABEL}){{1,2}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "ipv4": rf"(?a:{_BYTE}(?:\.{_BYTE}){{3}})",
    "ipv6": rf"(?:{_HEX}:){{7}}{_HEX}|(?:{_HEX}:){{1,6}}(?::{_HEX}){{1}}|::(?:{_HEX})?",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": rf"(?:https?|ftp)://{_LABEL}(?:\.{_LABEL}){{0,3}}(?::[1-9]\d{{0,3}})?(?:/[A-Za-z0-9._~-]{{0,32}}){{0,6}}(?:\?[A-Za-z0-9._~=&-]{{0,64}})?(?:#[A-Za-z0-9._~-]{{0,32}})?",
}
FORMATS["uri"] = FORMATS["uri"].replace(r"\d", "[0-9]")
"""Formats that are enforced: regular expressions of texts that have them, not of all such texts."""


def json_integer(low: int | None, high: int | None, multiple: int | None) -> Expression:
    """Whole numbers from `low` to `high` that `multiple` divides."""
    most = 10**MOST_DIGITS - 1
    low, high = max(-most, -most if low is None else low), min(most, most if high is None else high)
    parts = [_naturals(max(low, 0), high)] if high >= 0 else []
    if low < 0 and low <= high:
        parts.append(Concat((literal("-"), _naturals(max(1, -high), -low))))
    result: Expression = Union(tuple(parts))
    if multiple is None or multiple == 1:
        return result
    try:
        return intersection(compile_expression(result), _multiples(multiple))
    except _NothingMatches:
        return NOTHING


def _naturals(low: int, high: int) -> Expression:
    """The decimal texts of low to high, without leading zeros."""
    parts = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (digits - 1) if digits > 1 else 0), min(high, 10**digits - 1)
        if first <= last:
            parts.append(_between(str(first), str(last)))
    return Union(tuple(parts))


def _between(low: str, high: str) -> Expression:
    """Digit texts of one length from low to high."""
    if not low.strip("0") and not high.strip("9"):
        return Repeat(DIGIT, len(low), len(low))
    a, b, rest = int(low[0]), int(high[0]), len(low) - 1
    if a == b:
        return Concat((literal(low[0]), _between(low[1:], high[1:])))
    parts = [
        Concat((literal(low[0]), _between(low[1:], "9" * rest))),
        Concat((literal(high[0]), _between("0" * rest, high[1:]))),
    ]
    if b - a > 1:
        parts.append(Concat((Chars(((49 + a, 47 + b),)), Repeat(DIGIT, rest, rest))))
    return Union(tuple(parts))


def _multiples(multiple: int) -> Automaton:
    edges: list[tuple[int, Expression, int]] = [(0, EMPTY_TEXT, 2), (0, literal("-"), 2)]
    for rest in range(multiple):
        edges += [(rest + 2, literal(str(digit)), (rest * 10 + digit) % multiple + 2) for digit in range(10)]
    return compile_expression(Graph((*edges, (2, EMPTY_TEXT, 1))))


Bound = tuple[Decimal, bool]
"""A number, and whether it is excluded itself."""


def json_number(low: Bound | None, high: Bound | None) -> Expression:
    """Decimal numbers between two bounds; without bounds also with an exponent."""
    if low is None and high is None:
        whole = Concat((optional(literal("-")), _naturals(0, 10**MOST_DIGITS - 1)))
        fraction = Concat((literal("."), Repeat(DIGIT, 1, MOST_DIGITS)))
        exponent = Concat((Chars(((69, 69), (101, 101))), optional(Chars(((43, 43), (45, 45)))), Repeat(DIGIT, 1, 2)))
        return Concat((whole, optional(fraction), optional(exponent)))
    most = Decimal(10**MOST_DIGITS - 1)
    low = (-most, False) if low and low[0] < -most else low
    high = (most, False) if high and high[0] > most else high
    positive = _magnitudes(low if low and low[0] >= 0 else None, high) if high is None or high[0] >= 0 else NOTHING
    mirrored_low = None if high is None or high[0] > 0 else (-high[0], high[1])
    mirrored_high = None if low is None else (-low[0], low[1])
    negative: Expression = NOTHING
    if low is None or low[0] < 0:
        negative = Concat((literal("-"), _magnitudes(mirrored_low or (Decimal(0), True), mirrored_high)))
    return Union((positive, negative))


def _magnitudes(low: Bound | None, high: Bound | None) -> Expression:
    """Decimals of at least 0 within bounds of at least 0."""
    digits, places = _digits_and_places(low, high)
    digits = max(digits, min(MOST_DIGITS // 2, EXACT_DIGITS - places))
    places = max(places, min(FRACTION, EXACT_DIGITS - digits))
    most = 10**digits - 1
    fraction = optional(Concat((literal("."), Repeat(DIGIT, 1, places)))) if places else EMPTY_TEXT
    least, excluded = (Decimal(0), False) if low is None else low
    largest, open_end = (Decimal(most), False) if high is None else high
    first, last = int(least), int(largest)
    parts: list[Expression] = []
    if last - first > 1:
        parts.append(Concat((_naturals(first + 1, last - 1), fraction)))
    low_digits, high_digits = (_fraction_digits(value, places) for value in (least, largest))
    if first == last:
        parts.append(Concat((literal(str(first)), _fractions(low_digits, excluded, high_digits, open_end, places))))
    elif first < last:
        nines = "9" * places
        parts.append(Concat((literal(str(first)), _fractions(low_digits, excluded, nines, False, places))))
        parts.append(Concat((literal(str(last)), _fractions("0" * places, False, high_digits, open_end, places))))
    return Union(tuple(parts))


def _digits_and_places(*bounds: Bound | None) -> tuple[int, int]:
    """The most digits before and after the point of some bounds."""
    values = [Decimal(0), *(bound[0] for bound in bounds if bound is not None)]
    return max(len(str(abs(int(value)))) for value in values), max(map(_places, values))


def has_exact_digits(low: Bound | None, high: Bound | None) -> bool:
    """Whether a float tells apart any two numbers that are as fine as these bounds."""
    digits, places = _digits_and_places(low, high)
    return not places or digits + places <= EXACT_DIGITS


def _places(value: Decimal) -> int:
    exponent = value.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _fraction_digits(value: Decimal, places: int) -> str:
    return str(int((value - int(value)).scaleb(places))).zfill(places)


def _fractions(low: str, above: bool, high: str, below: bool, places: int) -> Expression:
    """Fractions, point included or nothing at all, from low to high; above, below: without these themselves."""
    first, last = int(low or "0") + above, int(high or "0") - below
    if first > last:
        return NOTHING
    parts: list[Expression] = [] if first > 0 else [EMPTY_TEXT]
    for digits in range(1, places + 1):
        unit = 10 ** (places - digits)
        start, stop = -(-first // unit), last // unit
        if start <= stop:
            parts.append(Concat((literal("."), _between(str(start).zfill(digits), str(stop).zfill(digits)))))
    return Union(tuple(parts))


def json_literal(value: Any) -> Expression:
    """One value, as `json.dumps` writes it."""
    return literal(json.dumps(value, ensure_ascii=False))
