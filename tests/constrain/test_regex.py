"""Regular expressions: the automaton allows exactly the texts that `re` matches as a whole, or the pattern is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.automaton import Automaton, _NothingMatches
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import parse_regex
from blockpress.errors import RequestError

ATOMS = [
    "a",
    "b",
    "ä",
    "日",
    "\\d",
    "\\w",
    "\\s",
    "\\D",
    "\\W",
    "\\S",
    ".",
    "[ab]",
    "[^a]",
    "[à-ï]",
    "\\.",
    "\\n",
    "[^\\W\\d]",
]
TEXT = st.text(st.sampled_from("abcAB01 .\n_-äÄßſK日😀é"), max_size=6)


def compiled(pattern: str) -> Automaton | None:
    """None: nothing matches."""
    try:
        return compile_expression(parse_regex(pattern))
    except _NothingMatches:
        return None


def patterns() -> st.SearchStrategy[str]:
    def longer(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}?", "*?"])).map(
                lambda pair: f"(?:{pair[0]}){pair[1]}"
            ),
            inner.map(lambda part: f"(?i:{part})"),
            inner.map(lambda part: f"(?s:{part})"),
            inner.map(lambda part: f"({part})"),
        )

    return st.recursive(st.sampled_from(ATOMS), longer, max_leaves=5)


@given(pattern=patterns(), texts=st.lists(TEXT, min_size=1, max_size=8))
def test_a_text_is_allowed_exactly_if_re_matches_it_as_a_whole(pattern: str, texts: list[str]) -> None:
    automaton = compiled(pattern)
    for text in texts:
        assert (automaton is not None and automaton.matches(text)) == bool(re.fullmatch(pattern, text))


@given(data=st.data(), pattern=patterns())
def test_every_text_that_matches_is_allowed(data: st.DataObject, pattern: str) -> None:
    text = data.draw(st.from_regex(pattern, fullmatch=True).filter(lambda t: not re.search("[\ud800-\udfff]", t)))
    automaton = compiled(pattern)
    assert automaton is not None and automaton.matches(text)


@settings(max_examples=20)
@given(first=patterns(), second=patterns(), texts=st.lists(TEXT, min_size=1, max_size=8))
def test_look_ahead_restricts_what_follows(first: str, second: str, texts: list[str]) -> None:
    for sign in "=!":
        pattern = f"a?(?{sign}{first}){second}"
        automaton = compiled(pattern)
        for text in texts:
            assert (automaton is not None and automaton.matches(text)) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    "pattern", ["^ab?$", "^a|b$", "a$", "^", "$", "^(?:a|b)+$", "(^a|b$)", "a|^b", "b.", "(?=.*b)a"]
)
@given(texts=st.lists(TEXT, min_size=1, max_size=8))
def test_a_search_allows_texts_in_which_the_pattern_is_found(pattern: str, texts: list[str]) -> None:
    automaton = compile_expression(parse_regex(pattern, search=True))
    for text in texts:
        if not text.endswith("\n"):  # $ also stands before a last newline; such texts are left out
            assert automaton.matches(text) == bool(re.search(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a)\1", "a back reference"),
        (r"(a)?(?(1)b|c)", "a conditional group"),
        (r"(?>a)b", "an atomic group"),
        (r"a++", "a possessive repetition"),
        (r"(?<=a)b", "a look-behind"),
        (r"\ba", r"\b"),
        (r"a\Bb", r"\B"),
        (r"(?:(?=a).)*", "a look-ahead inside a repetition"),
        (r"a^b", "an anchor inside the text"),
        (r"(?m)a\n^b", "^ for lines"),
        (r"(?:a$)*b", "$"),
    ],
)
def test_what_an_automaton_cannot_express_is_refused_by_name(pattern: str, named: str) -> None:
    with pytest.raises(RequestError, match=re.escape(named)):
        compile_expression(parse_regex(pattern))


@pytest.mark.parametrize("pattern", ["[", "(", "a{2,1}", "*a", "\\", "(?z)", 5, None, b"a"])
def test_what_is_no_pattern_is_refused_by_its_value(pattern: object) -> None:
    with pytest.raises(RequestError, match="regex"):
        parse_regex(pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["(.{1,300}){1,300}", "(a|b)*a(a|b){16}"])
def test_a_pattern_that_explodes_is_refused_within_the_limits(pattern: str) -> None:
    with pytest.raises(RequestError, match=r"states|seconds"):
        compile_expression(parse_regex(pattern))
