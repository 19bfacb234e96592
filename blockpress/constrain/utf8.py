"""Code points as the bytes of UTF-8.

Invariant: exactly the well-formed sequences: shortest forms, no surrogates.
Run it:  python -m pytest blockpress/constrain/utf8.py tests/constrain/test_automaton.py
"""

from __future__ import annotations

from collections.abc import Iterator


def utf8_sequences(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges of bytes, one for each byte of a character, that together give just the code points low to high.

    >>> [[(hex(a), hex(b)) for a, b in each] for each in utf8_sequences(0x7E, 0x81)]
    [[('0x7e', '0x7f')], [('0xc2', '0xc2'), ('0x80', '0x81')]]
    """
    if low > high:
        return
    for border in (0x80, 0x800, 0xD800, 0xE000, 0x10000):  # lengths change here; UTF-8 has no surrogates
        if low < border <= high:
            yield from utf8_sequences(low, border - 1)
            yield from utf8_sequences(border, high)
            return
    if 0xD800 <= low < 0xE000:
        return
    for bits in (6, 12, 18):  # all continuation bytes below a differing one must be whole ranges
        mask = (1 << bits) - 1
        if low & ~mask != high & ~mask:
            if low & mask:
                yield from utf8_sequences(low, low | mask)
                yield from utf8_sequences((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from utf8_sequences(low, (high & ~mask) - 1)
                yield from utf8_sequences(high & ~mask, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))
