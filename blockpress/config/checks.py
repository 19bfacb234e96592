"""Checks of a field's value, and the error that names the field, the value and what it must be."""

from __future__ import annotations

import math

from blockpress.errors import ConfigError


def require(ok: bool, name: str, value: object, need: str) -> None:
    if not ok:
        raise ConfigError(f"config field {name} is {value!r}", hint=f"{name} must be {need}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
