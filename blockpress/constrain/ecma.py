r"""Patterns of JSON schemas: ECMA-262's syntax as Python's, for what both of them match or for what either does.

    \d     narrow [0-9], wide \d          `.`    narrow without line ends, wide without "\n"
    $      narrow \Z,    wide also before a last "\n"        \p{L}, \cJ, (?<name>...): written out
    \b     narrow where ASCII and Unicode have a boundary, wide where either has

A validator in Python takes a pattern as Python's, one in JavaScript as ECMA's. What an answer must match, it must match
for both: narrow. What it must not match, it must not for either: wide.

Invariant: narrow matches a part of what either takes a pattern for, wide all of it.
Source: ECMA-262, 22.2.1; JSON Schema 2020-12, core, 6.4.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from blockpress.constrain.automaton import (
    ANY_CHAR,
    Automaton,
    Expression,
    Repeat,
    _NothingMatches,
    difference,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import every_character, matching, parse_regex
from blockpress.errors import RequestError

_COUNTS = re.compile(r"\{([0-9]*),([0-9]+)\}")
_ASCII = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t-\r"}
_BOUNDARIES = {
    ("b", False): r"(?:\b(?a:\b))",
    ("b", True): r"(?:\b|(?a:\b))",
    ("B", False): r"(?:\B(?a:\B))",
    ("B", True): r"(?!\b(?a:\b))",  # the empty text has one in ECMA-262, and in Python from 3.14 on
}
_BOTH = {"d": r"\d", "w": r"\w", "s": r"\s\ufeff"}


@lru_cache(maxsize=512)
def translate(pattern: str, *, wide: bool = False, most: int | None = None) -> str:
    r"""A pattern in Python's syntax. most: how often something is repeated at most where it may be more often.

    >>> translate(r"^\d+\/(?<n>.)$")
    '^[0-9]+\\/([^\\n\\r\\u2028\\u2029])\\Z'
    """
    return _Translation(pattern, wide, most).text()


@lru_cache(maxsize=512)
def pattern_texts(pattern: str, *, wide: bool = False, most: int | None = None) -> Automaton:
    """The texts in which a pattern is found, or with `most` those of them with no more of any repetition.

    Raises:
        RequestError: it is no pattern, or cannot be enforced. _NothingMatches: there is none.
    """
    return compile_expression(parse_regex(translate(pattern, wide=wide, most=most), search=True))


@lru_cache(maxsize=512)
def texts_without(pattern: str) -> Automaton:
    """The texts in which a pattern is not found. Raises as `pattern_texts`."""
    everything: Expression = Repeat(ANY_CHAR, 0, None)
    try:
        return difference(compile_expression(everything), pattern_texts(pattern, wide=True))
    except _NothingMatches:
        if pattern_is_found(pattern, ""):
            raise
        return compile_expression(everything)


def pattern_is_found(pattern: str, text: str) -> bool | None:
    """Whether a pattern is found in a text; None where Python's and ECMA's answers differ.

    Raises:
        RequestError: it is no pattern.
    """
    try:
        narrow, wide = (bool(re.search(translate(pattern, wide=wide), text)) for wide in (False, True))
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError(f"pattern {pattern!r:.200} is no regular expression: {error}", hint="correct it") from None
    return narrow if narrow == wide else None


class _Translation:
    """One pass over a pattern. wide: which way it errs now; what must not stand around turns it round."""

    def __init__(self, pattern: str, wide: bool, most: int | None) -> None:
        self._pattern, self._wide, self._most, self._at = pattern, wide, most, 0

    def text(self) -> str:
        parts: list[str] = []
        groups: list[bool] = []  # of each open group: what `wide` was
        while self._at < len(self._pattern):
            char, rest = self._pattern[self._at], self._pattern[self._at :]
            if char == "\\":
                parts.append(self._escape(in_set=False))
                continue
            if char == "[":
                parts.append(self._set())
                continue
            self._at += 1
            if char == "(":
                groups.append(self._wide)
                self._wide ^= rest.startswith(("(?!", "(?<!"))
                if named := re.match(r"\(\?<([^=!>]+)>", rest):
                    self._at += named.end() - 1
                    char = f"(?P<{named[1]}>" if f"\\k<{named[1]}>" in self._pattern else "("
            elif (counts := _COUNTS.match(rest)) and self._most is not None and not self._wide:
                low, high = int(counts[1] or 0), int(counts[2])
                char = f"{{{low},{min(high, max(low, self._most))}}}"
                self._at += counts.end() - 1
            elif char == ")" and groups:
                self._wide = groups.pop()
            elif char == ".":
                char = "." if self._wide else r"[^\n\r\u2028\u2029]"
            elif char == "$" and not self._wide:
                char = r"\Z"
            parts.append(char)
        return "".join(parts)

    def _set(self) -> str:
        negated = self._pattern.startswith("[^", self._at)
        self._at += 1 + negated
        before, self._wide = self._wide, self._wide ^ negated
        parts = ["[^" if negated else "["]
        while self._at < len(self._pattern):
            char = self._pattern[self._at]
            if char == "\\":
                parts.append(self._escape(in_set=True))
                continue
            self._at += 1
            if char == "]" and len(parts) > 1:
                parts.append(char)
                break
            parts.append("\\" + char if char in "[]&~|" else char)
        self._wide = before
        return "".join(parts)

    def _escape(self, *, in_set: bool) -> str:
        rest = self._pattern[self._at :]
        kind = rest[1:2]
        if known := re.match(r"\\c([A-Za-z])", rest):
            text = f"\\x{ord(known[1]) % 32:02x}"
        elif known := re.match(r"\\[uU]d[89abAB][0-9a-fA-F]{2}\\[uU]d[c-fC-F][0-9a-fA-F]{2}", rest):
            pair = bytes.fromhex(known[0][2:6] + known[0][8:12]).decode("utf-16-be")
            text = f"\\U{ord(pair):08x}"
        elif known := re.match(r"\\u\{([0-9a-fA-F]{1,6})\}", rest):
            text = f"\\U{int(known[1], 16):08x}"
        elif known := re.match(r"\\([pP])\{\^?([^}]*)\}", rest):
            inside = _property(known[2])
            text = inside if (known[1] == "p") != ("{^" in known[0]) else _complement(inside)
            text = text if in_set else f"[{text}]"
        elif not in_set and (known := re.match(r"\\k<([^>]+)>", rest)):
            text = f"(?P={known[1]})"
        elif known := re.match(r"\\0(?![0-9])", rest):
            text = r"\x00"
        elif kind and kind in "bB" and not in_set:
            known, text = re.match(r"..", rest), _BOUNDARIES[kind, self._wide]
        elif kind and kind in "dws":
            known, text = re.match(r"..", rest, re.DOTALL), (_BOTH if self._wide else _ASCII)[kind]
            text = text if in_set else f"[{text}]"
        elif kind and kind in "DWS":
            known, inside = re.match(r"..", rest, re.DOTALL), (_ASCII if self._wide else _BOTH)[kind.lower()]
            text = _complement(inside) if in_set else f"[^{inside}]"
        else:
            known, text = re.match(r"\\.?", rest, re.DOTALL), rest[:2]
        assert known is not None
        self._at += known.end()
        return text


@lru_cache(maxsize=64)
def _property(name: str) -> str:
    """The inside of a set of characters: those of a general category of Unicode.

    Raises:
        RequestError: it is none.
    """
    wanted = name.split("=")[-1]
    short = {"Letter": "L", "Lowercase_Letter": "Ll", "Uppercase_Letter": "Lu", "Mark": "M", "Number": "N"}
    short |= {"Decimal_Number": "Nd", "Punctuation": "P", "Symbol": "S", "Separator": "Z", "Other": "C", "digit": "Nd"}
    wanted = short.get(wanted, wanted)
    known = re.fullmatch("[A-Z][a-z]?", wanted) and [*re.finditer(f"(?:{wanted:.<2})+", _categories())]
    if not known:
        raise RequestError(f"pattern has \\p{{{name}}}", hint="use a general category of Unicode, such as \\p{L}")
    return _ranges((run.start() // 2, run.end() // 2 - 1) for run in known)


@lru_cache(maxsize=1)
def _categories() -> str:
    """The two letters of each character's general category, the first of them a capital."""
    return "".join(map(unicodedata.category, every_character()))


@lru_cache(maxsize=64)
def _complement(inside: str) -> str:
    return _ranges(matching(f"[^{inside}]"))


def _ranges(ranges: Iterable[tuple[int, int]]) -> str:
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)
