"""The JSON texts of numbers with limits, as expressions: decimal digits compared with the bounds from the left.

Texts are written in one way where JSON allows several (no exponent next to bounds), so that text and value determine
each other.

Invariant: every text of an expression parses to a value within the limits, exactly and as a float.
Run it:  python -m pytest tests/constrain/test_json_text.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from blockpress.constrain.automaton import (
    EMPTY_TEXT,
    NOTHING,
    Automaton,
    Chars,
    Concat,
    Expression,
    Graph,
    Repeat,
    Union,
    _NothingMatches,
    intersection,
    literal,
    optional,
)
from blockpress.constrain.compiler import compile_expression

DIGIT = Chars(((48, 57),))
MOST_DIGITS = 18
"""Most digits of a whole number, and most in front of a point if others follow it: half as many."""
FRACTION = 6
"""Digits after the point next to bounds, unless a bound has more: so few that a float tells any two numbers apart."""
EXACT_DIGITS = 15
"""Decimal digits that a float tells apart: next to bounds, those before and after the point together."""
MOST_MULTIPLE = 4096
"""The largest factor whose multiples are told by an automaton; of others `LISTED` are listed."""
LISTED = 400

Bound = tuple[Decimal, bool]
"""A number, and whether it is excluded itself."""


@lru_cache(maxsize=32)
def number_texts(low: Bound | None, high: Bound | None, factors: tuple[Fraction, ...], *, whole: bool) -> Expression:
    """Numbers between bounds that every factor divides, as one automaton: kept, since schemas ask for few kinds again
    and again."""
    if factors:
        numbers = json_multiple(low, high, factors, whole=whole)
    elif whole:
        numbers = json_integer(whole_bound(low, up=True), whole_bound(high, up=False), None)
    else:
        numbers = json_number(low, high)
    try:
        return compile_expression(numbers)
    except _NothingMatches:
        return NOTHING


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


def is_multiple(value: float, factor: Fraction) -> bool | None:
    """Whether a factor divides a number; None if exact arithmetic and that of floats do not agree."""
    exact = (Fraction(repr(value)) / factor).denominator == 1
    quotient = value % int(factor) == 0 if factor.denominator == 1 else (value / float(factor)).is_integer()
    return exact if exact == quotient else None


def json_multiple(low: Bound | None, high: Bound | None, factors: Sequence[Fraction], *, whole: bool) -> Expression:
    """Numbers between bounds that every factor divides, exactly and by a division of floats.

    Of fractions those are left out that a float cannot hold: of multiples of 0.01 there are 0.25, 0.5 and 0.75.
    """
    step = factors[0]
    for other in (*factors[1:], *([Fraction(1)] if whole else [])):
        step = _common_multiple(step, other)
    whole_step, places = step, _binary_places(step)
    if places is not None:
        step = _common_multiple(step, Fraction(1, 2**places))
    exact = all(abs(Fraction(float(factor)) - factor) / factor <= Fraction(1, 2**54) for factor in factors)
    scaled = step * 10 ** (places or 0)
    if places is None or places > FRACTION or not exact or scaled > MOST_MULTIPLE >> 2 * places:
        return Union(tuple(literal(text) for text in _listed_multiples(low, high, whole_step, factors)))
    if not places or step.denominator == 1:
        return json_integer(whole_bound(low, up=True), whole_bound(high, up=False), int(step))
    try:
        between = compile_expression(json_number(low or (Decimal(-(10**9)), False), high))
        return intersection(between, _decimal_multiples(int(scaled), places))
    except _NothingMatches:
        return NOTHING


def whole_bound(bound: Bound | None, *, up: bool) -> int | None:
    """The whole number next to a bound, inside it."""
    if bound is None:
        return None
    near = int(bound[0].to_integral_value("ROUND_CEILING" if up else "ROUND_FLOOR"))
    return near + (1 if up else -1) * (bound[1] and bound[0] == near)


def _common_multiple(one: Fraction, other: Fraction) -> Fraction:
    scale = math.lcm(one.denominator, other.denominator)
    return Fraction(math.lcm(int(one * scale), int(other * scale)), scale)


def _binary_places(step: Fraction) -> int | None:
    """How many decimal places multiples of a step have; None if endlessly many."""
    for places in range(19):
        if 10**places % step.denominator == 0:
            return places
    return None


def _decimal_multiples(scaled: int, places: int) -> Automaton:
    """Decimals of which `scaled` divides what remains when the point is moved right by some places."""
    edges: list[tuple[int, Expression, int]] = [(0, EMPTY_TEXT, 2), (0, literal("-"), 2)]
    for column in range(places + 2):  # column 0: before the point; after it the number of digits since, and one
        for rest in range(scaled):
            node = 2 + column * scaled + rest
            following = 2 + min(column + 1, places + 1) * scaled if column else 2
            if column <= places:
                edges += [(node, literal(str(digit)), following + (rest * 10 + digit) % scaled) for digit in range(10)]
            if column == 0:
                edges.append((node, literal("."), 2 + scaled + rest))
            if column != 1 and rest * 10 ** (places - max(column - 1, 0)) % scaled == 0:
                edges.append((node, EMPTY_TEXT, 1))
    return compile_expression(Graph(tuple(edges)))


def _listed_multiples(
    low: Bound | None, high: Bound | None, step: Fraction, factors: Sequence[Fraction]
) -> Iterator[str]:
    """The multiples nearest to the bounds, or to 0."""
    first = math.ceil(Fraction(low[0]) / step) if low else None
    last = math.floor(Fraction(high[0]) / step) if high else None
    if first is None:
        first = -(LISTED // 2) if last is None else last - LISTED
    last = first + LISTED if last is None else min(last, first + LISTED)
    for count in range(first, last + 1):
        value = count * step
        text = str(int(value)) if value.denominator == 1 else format(Decimal(repr(float(value))), "f")
        number = int(value) if value.denominator == 1 else float(text)
        inside = all(
            sign * Fraction(bound[0]) < sign * value or (value == Fraction(bound[0]) and not bound[1])
            for bound, sign in ((low, 1), (high, -1))
            if bound is not None
        )
        written = inside and len(text) <= MOST_DIGITS + 1 and Fraction(text) == value
        if written and all(is_multiple(number, factor) for factor in factors):
            yield text
