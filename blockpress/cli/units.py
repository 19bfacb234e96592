"""Counts, sizes and times as people read them.

Invariant: a figure's unit is the largest in which it is at least 1.

Run it:  python -m pytest blockpress/cli/units.py
"""

from __future__ import annotations


def format_count(count: int) -> str:
    """A large count in millions or billions.

    >>> format_count(987), format_count(2_400_000), format_count(25_250_000_000)
    ('987', '2.40 M', '25.25 B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def format_bytes(count: int) -> str:
    """Bytes in binary units.

    >>> format_bytes(1), format_bytes(600), format_bytes(200 * 1024), format_bytes(50 << 30)
    ('1 byte', '600 bytes', '200.0 KiB', '50.0 GiB')
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} byte{'s' * (count != 1)}"


def format_age(seconds: float) -> str:
    """A time in the past, in the largest unit that it fills.

    >>> format_age(3), format_age(90), format_age(7200), format_age(86_400 * 40)
    ('just now', '1 minute ago', '2 hours ago', '40 days ago')
    """
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
