"""Regular expressions: the automaton allows exactly the texts that `re` matches as a whole, or the pattern is refused."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.automaton import Automaton, _NothingMatches
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.nondeterministic import MAX_WORK, Work
from blockpress.constrain.regex import parse_regex
from blockpress.errors import RequestError
from tests.conftest import num_examples
from tests.constrain.regex_cases import CASES
from tests.constrain.walks import random_text

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


@settings(max_examples=num_examples(40))
@given(pattern=patterns(), texts=st.lists(TEXT, min_size=1, max_size=8))
def test_a_text_is_allowed_exactly_if_re_matches_it_as_a_whole(pattern: str, texts: list[str]) -> None:
    automaton = compiled(pattern)
    for text in texts:
        assert (automaton is not None and automaton.matches(text)) == bool(re.fullmatch(pattern, text))


@settings(max_examples=num_examples(40))
@given(data=st.data(), pattern=patterns())
def test_every_text_that_matches_is_allowed(data: st.DataObject, pattern: str) -> None:
    text = data.draw(st.from_regex(pattern, fullmatch=True).filter(lambda t: not re.search("[\ud800-\udfff]", t)))
    automaton = compiled(pattern)
    assert automaton is not None and automaton.matches(text)


@settings(max_examples=num_examples(10))
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
@settings(max_examples=num_examples(20))
@given(texts=st.lists(TEXT, min_size=1, max_size=8))
def test_a_search_allows_texts_in_which_the_pattern_is_found(pattern: str, texts: list[str]) -> None:
    automaton = compile_expression(parse_regex(pattern, search=True))
    for text in texts:
        if not text.endswith("\n"):  # $ also stands before a last newline; such texts are left out
            assert automaton.matches(text) == bool(re.search(pattern, text))


CONDITIONS = [r"\b", r"\B", "^", "$", "(?m:^)", "(?m:$)", r"\A", r"\Z"]
BEHIND = ["a", "b", "ab", "[^a]", "^", "^a", r"\n", "a|b", "(?<!a)b"]
SHORT = ["".join(chars) for length in range(5) for chars in itertools.product("ab \n", repeat=length)]


def conditional_patterns() -> st.SearchStrategy[str]:
    """With conditions on what stands around, anywhere, and groups whose first match is final."""

    def longer(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pairs = st.tuples(inner, inner)
        times = st.sampled_from(["*", "+", "?", "{2}", "*?", "+?", "??", "*+", "++", "?+"])
        return st.one_of(
            pairs.map("".join),
            pairs.map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
            st.tuples(inner, times).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
            inner.map(lambda part: f"(?={part})"),
            inner.map(lambda part: f"(?!{part})"),
            inner.map(lambda part: f"(?>{part})"),
            inner.map(lambda part: f"(?P<group>{part})") | inner,
        )

    atoms = st.sampled_from(["a", "b", "ab", ".", r"\w", "[^a]", " ", r"\n", *CONDITIONS])
    looks = st.tuples(st.sampled_from("=!"), st.sampled_from(BEHIND)).map(lambda pair: f"(?<{pair[0]}{pair[1]})")
    return st.recursive(atoms | looks, longer, max_leaves=5).filter(lambda text: text.count("<group>") < 2)


@settings(max_examples=num_examples(60))
@given(pattern=conditional_patterns())
def test_conditions_hold_wherever_they_stand(pattern: str) -> None:
    """Against every text of at most four characters, with boundaries of ASCII words, which are quick."""
    automaton = compiled(f"(?a){pattern}")
    wrong = [
        text
        for text in SHORT
        if bool(re.fullmatch(f"(?a){pattern}", text)) != (automaton is not None and automaton.matches(text))
    ]
    assert not wrong


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\bsiehe\b.*",
        r"(?=.*\bä)(?:\b\w+\b ?)+",
        r"(\w+)\B.",
        r"(['\"ä]).*?\1",
        r"(?i)(ä|b)x\1",
        r"(?P<q>''|\")[^\"']*(?P=q)(;(b|a)\3)*",
        r"(a|ab)(c|bcd)\1",
        r'"(?:[^"\\]|\\.)*+"',
        r"(?m)^a$\n^b$",
        r"(?<=a)|b|\Bc|^",
    ],
)
def test_conditions_and_back_references_mean_what_re_makes_of_them(pattern: str) -> None:
    rng, automaton = random.Random(0), compiled(pattern)
    assert automaton is not None
    for _ in range(30):
        text = random_text(automaton, rng, 14)
        assert re.fullmatch(pattern, text), text
        other = "".join(rng.choice([char, *"abcdxäÄ'\" ;\n"]) for char in text)
        assert automaton.matches(other) == bool(re.fullmatch(pattern, other)), other


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(\w+) \1", "a back reference to a group of other than at most 64 texts"),
        (r"(a)?\1", "a back reference to a group that is not before it"),
        (r"(?:(a)|b\1)*", "a back reference to a group that is not before it"),
        (r"(a)?(?(1)b|c)", "a conditional group"),
        (r"(?<=a\b)b", "a look-ahead inside a look-behind"),
    ],
)
def test_what_an_automaton_cannot_express_is_refused_by_name(pattern: str, named: str) -> None:
    with pytest.raises(RequestError, match=re.escape(named)):
        compile_expression(parse_regex(pattern))


@pytest.mark.parametrize("pattern", ["[", "(", "a{2,1}", "*a", "\\", "(?z)", "(?L)a", "(?au)a", 5, None, b"a"])
def test_what_is_no_pattern_is_refused_by_its_value(pattern: object) -> None:
    with pytest.raises(RequestError, match="regex"):
        parse_regex(pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["(a|b)*a(a|b){20}", "((a{1,100}){1,100}){1,100}", ".{0,3000}"])
def test_a_pattern_that_explodes_is_refused_by_the_states_that_it_needs(pattern: str) -> None:
    with pytest.raises(RequestError, match="states"):
        compile_expression(parse_regex(pattern))


@pytest.mark.slow
def test_a_pattern_that_takes_long_is_refused_within_the_limits() -> None:
    with pytest.raises(RequestError, match=r"work|seconds"):
        compile_expression(parse_regex("(.{1,50}){1,50}"), Work(MAX_WORK // 5))


REFUSED = {
    r"<([a-z]+)>[^<>]*</\1>",
    r"([a-z]+) \1",
    "(a)?(?(1)b|c)",
    r"(\w)\1",
    r"(\d)(?:\1)?x",
    r"(?:(a)|b)\1",
}
LARGE = {
    r"^(?=.*\bfoo\b)(?=.*\bbar\b).*$",  # a second, as the next
    r"(\b\w+\b ?){1,5}",
    r"(?:\w{1,64}\.){1,8}\w{2,63}",
    "(a|b)*a(a|b){20}",
    "(.{1,50}){1,50}",
    "(?:(?:a{1,30}){1,30}){1,30}",
    "((a{1,100}){1,100}){1,100}",
    ".{0,3000}",
}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_expressions_as_people_write_them_are_enforced_or_refused(part: int) -> None:
    """Which are refused is pinned: a conditional group, back references to groups of many texts, and what explodes."""
    rng = random.Random(part)
    for pattern in CASES[part::8]:
        if pattern in LARGE:
            continue
        if pattern in REFUSED:
            with pytest.raises(RequestError):
                compile_expression(parse_regex(pattern))
            continue
        automaton = compile_expression(parse_regex(pattern))
        for _ in range(5):
            text = random_text(automaton, rng, 40)
            assert re.fullmatch(pattern, text), (pattern, text)
