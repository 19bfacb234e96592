"""Formats of strings, as regular expressions of texts that have them; not of all such texts.

Invariant: every text of a format has it by the standard that JSON Schema names for it.
Source: JSON Schema 2020-12, validation, 7.3.
Run it:  python -m pytest tests/constrain/test_json_text.py
"""

from __future__ import annotations

from functools import lru_cache

from blockpress.constrain.automaton import Automaton
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import parse_regex

_DATE = (
    r"(?!0000)[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[a-z0-9](?:-?[a-z0-9]){0,15}"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX = r"[0-9a-f]{1,4}"
_WORD = r"[A-Za-z0-9._~-]"
_END = rf"(?:\?[A-Za-z0-9._~=&-]*)?(?:#{_WORD}*)?"
_PATH = rf"{_WORD}*(?:/{_WORD}+)*/?"
_NUMBER = "[0-9]{1,4}"
_POINTER = r"(?:/(?:[A-Za-z0-9_.-]|~[01])*)*"
_MAIL = r"[A-Za-z0-9_+-]{1,32}(?:\.[A-Za-z0-9_+-]{1,16})?"
FORMATS: dict[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P(?:NW|NY(?:NM(?:ND)?)?|NM(?:ND)?|ND|(?:ND)?T(?:NH(?:NM(?:NS)?)?|NM(?:NS)?|NS))".replace(
        "N", _NUMBER
    ),
    "email": rf"{_MAIL}@{_LABEL}(?:\.{_LABEL}){{1,2}}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": rf"(?:{_HEX}:){{7}}{_HEX}|(?:{_HEX}:){{1,6}}(?::{_HEX}){{1}}|::(?:{_HEX})?",
    "json-pointer": _POINTER,
    "regex": r"\^?(?:(?:[A-Za-z0-9_ -]|\\[dswDSW.]|\.|\[(?:a-z|A-Z|0-9|_)+\])[*+?]?)*\$?",
    "relative-json-pointer": rf"(?:0|[1-9][0-9]{{0,3}})(?:#|{_POINTER})",
    "uri": rf"(?:https?|ftp)://{_HOST}(?::[1-9][0-9]{{0,3}})?(?:/{_PATH})?{_END}|urn:[a-z0-9]{{2,16}}:{_WORD}+",
    "uri-template": r"(?:[A-Za-z0-9._~/:-]|\{[A-Za-z0-9_]+\})*",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
FORMATS["uri-reference"] = rf"{FORMATS['uri']}|/?{_PATH}{_END}"
FORMATS |= {
    "idn-email": FORMATS["email"],
    "idn-hostname": FORMATS["hostname"],
    "iri": FORMATS["uri"],
    "iri-reference": FORMATS["uri-reference"],
}
"""Formats that are enforced; an unknown one is an annotation."""


@lru_cache(maxsize=64)
def format_texts(name: str) -> Automaton:
    """The texts of a format, one of `FORMATS`."""
    return compile_expression(parse_regex(FORMATS[name]))
