"""Counts, sizes and times as people read them.

Invariant: a figure's unit is the largest in which it is at least 1.

Run it:  python -m pytest blockpress/cli/units.py
"""

from __future__ import annotations


def format_count(count: int) -> str:
    """A large count in words.

    >>> many(987), many(2_400_000), many(25_250_000_000)
    ('987', '2.40 M', '25.25 B')
    """
    for unit, one in (("B", 10**9), ("M", 10**6)):
        if count >= one:
            return f"{count / one:.2f} {unit}"
    return f"{count:,}"


def format_bytes(count: int) -> str:
    """Bytes in binary units, as memory and file managers have them.

    >>> size(1), size(600), size(200 * 1024), size(50 << 30)
    ('1 byte', '600 bytes', '200.0 KiB', '50.0 GiB')
    """
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count} byte{'s' * (count != 1)}"


def format_age(seconds: float) -> str:
    """A stretch of time, in the largest unit that it fills.

    >>> ago(3), ago(90), ago(7200), ago(86_400 * 40)
    ('just now', '1 minute ago', '2 hours ago', '40 days ago')
    """
    for unit, one in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= one:
            count = int(seconds // one)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
