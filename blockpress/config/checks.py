"""Checks of a field's value, and the error that names the field, the value and what it must be."""

from __future__ import annotations

import math
from numbers import Integral, Real

from blockpress.errors import ConfigError


def require(ok: bool, name: str, value: object, need: str) -> None:
    if not ok:
        raise ConfigError(f"config field {name} is {value_text(value)}", hint=f"{name} must be {need}")


def value_text(value: object) -> str:
    """A value in a message, which must not be as long as it pleases, or fail as Python does on long integers."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def is_number(value: object) -> bool:
    """Whether it is a finite number, NumPy's included; True and False are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def is_count(value: object, least: float = 1, most: float = math.inf) -> bool:
    """Whether it is a whole number in a range, NumPy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most
