"""Grammars: lark's own parser accepts every text that is allowed, and what it accepts is allowed down to a depth."""

from __future__ import annotations

import itertools
import random
import re
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lark import Lark
from lark.exceptions import LarkError

from blockpress.constrain import compiler
from blockpress.constrain.automaton import Automaton, _NothingMatches
from blockpress.constrain.grammar import MAX_DEPTH, grammar_automaton
from blockpress.errors import RequestError
from tests.conftest import num_examples
from tests.constrain.walks import random_text

ARITHMETIC = r"""
    ?start: sum | NAME "=" sum -> assign
    ?sum: product | sum "+" product -> add | sum "-" product -> sub
    ?product: atom | product "*" atom -> mul | product "/" atom -> div
    ?atom: NUMBER -> number | "-" atom -> neg | NAME -> var | "(" sum ")"
    %import common.CNAME -> NAME
    %import common.NUMBER
    %import common.WS_INLINE
    %ignore WS_INLINE
"""
JSON = r"""
    ?start: value
    ?value: object | array | string | SIGNED_NUMBER -> number | "true" -> true | "false" -> false | "null" -> null
    array: "[" [value ("," value)*] "]"
    object: "{" [pair ("," pair)*] "}"
    pair: string ":" value
    string: ESCAPED_STRING
    %import common.ESCAPED_STRING
    %import common.SIGNED_NUMBER
    %import common.WS
    %ignore WS
"""
SQL = r"""
    start: "SELECT"i ["DISTINCT"i] columns "FROM"i NAME ["WHERE"i condition] ["ORDER"i "BY"i NAME ["ASC"i | "DESC"i]]
    columns: "*" | column ("," column)*
    column: NAME ["AS"i NAME] | ("COUNT"i | "SUM"i) "(" NAME ")"
    ?condition: conjunction | condition "OR"i conjunction
    ?conjunction: negation | conjunction "AND"i negation
    ?negation: "NOT"i negation | NAME (OP value | "IS"i ["NOT"i] "NULL"i | "IN"i "(" value ("," value)* ")")
    ?value: INT | STRING | NAME
    OP: "=" | "<>" | "<=" | ">=" | "<" | ">"
    NAME: /[a-z_][a-z0-9_]*/i
    STRING: /'([^'\n]|'')*'/
    %import common (INT, WS)
    %ignore WS
    %ignore /--[^\n]*/
"""
CONFIG = r"""
    start: _NL* section+
    section: "[" NAME "]" _NL pair*
    pair: NAME ("=" | ":") value _NL
    value: NUMBER | BOOL | STRING | list
    list: "[" [value ("," value)*] "]"
    BOOL: "true" | "false"
    NAME: /[a-z_][a-z0-9_.-]*/i
    STRING: /"[^"\n]*"/
    %import common.SIGNED_NUMBER -> NUMBER
    %import common.WS_INLINE
    _NL: /(\r?\n)+/
    %ignore WS_INLINE
    %ignore /[;#].*/
"""
PYTHON = r"""
    ?start: or_test ["if" or_test "else" start] | "lambda" [NAME ("," NAME)*] ":" start
    ?or_test: not_test (("and" | "or") not_test)*
    ?not_test: "not" not_test | expr (("<" | "==" | "in" | "not" "in" | "is" "not"?) expr)*
    ?expr: factor (("+" | "-" | "*" | "/" | "//") factor)*
    ?factor: "-" factor | power
    ?power: atom trailer* ["**" factor]
    trailer: "(" [start ("," start)*] ")" | "." NAME
    ?atom: "(" start ")" | NAME | NUMBER | STRING+ | "None"
    NAME: /[a-z_][a-z_0-9]*/i
    NUMBER: /\d+(\.\d*)?([eE][+-]?\d+)?/
    STRING: /[rbf]?("(?!"").*?(?<!\\)(\\\\)*?"|'(?!'').*?(?<!\\)(\\\\)*?')/i
    %ignore /[ \t]+/
"""
CSV = r"""
    start: header row+
    header: "#" " "? (WORD _SEPARATOR?)+ _NL
    row: (value _SEPARATOR?)+ _NL
    _SEPARATOR: /[ ]+/ | "\t" | ","
    ?value: INT | FLOAT | STR
    INT: /-?\d+/
    FLOAT: /-?\d+\.\d*([eE][-+]\d+)?/
    STR: /"[^"]*"/
    WORD: /[a-z]+/
    _NL: /\r?\n/
"""
LISP = r"""
    start: item+
    item: ATOM | STRING | "(" item* ")" | "'" item
    ATOM: /[^\s()'"]+/
    STRING: /"(\\.|[^"\\])*+"/
    %ignore /\s+/
"""
BRACKETS = 'start: ("(" start ")" | "[" start "]")*'
TEMPLATES = r"""
    start: _list{item, ","} ";" pairs{INT, ":"}
    _list{x, s}: x (s x)*
    pairs{k, c}: "{" _list{pair{k, c}, ","} "}"
    pair{k, c}: k c item
    item: INT | "(" _list{item, "|"} ")" | "x"~2..4 | "a".."f"
    %import common.INT
"""
PRIORITIES = r"""
    start: (word | date | RANGE)+
    word.2: WORD
    date: YEAR "-" MONTH
    YEAR.3: /\d{4}/
    MONTH: "0" "1".."9" | "1" "0".."2"
    WORD.-1: /[a-z0-9]+/
    RANGE: "<" /[^<>]+?/ ">"
    %ignore " "
    %ignore ","
"""
TABLE = {
    "arithmetic": (ARITHMETIC, ["x = 1+2*(3-y)", "(" * 8 + "1" + ")" * 8, "1" + "+1" * 200], ["1+", "()", "x = = 1"]),
    "json": (JSON, ['{"a": [1, {"b": null}], "c": -1.5e3}', "[" + "1," * 200 + "1]"], ['{"a" 1}', "[1,]", "truefalse"]),
    "sql": (SQL, ["select a, count(b) from t where not a = 'x''y' or b in (1, 2) order by a desc"], ["select from t"]),
    "config": (CONFIG, ['[a]\nx = 1\ny: ["b", [true, 2]]\n\n[b]\n'], ["x = 1\n", "[a] x=1\n", "[a]\ntrue: = 1\n"]),
    "python": (PYTHON, ["f(x.y, lambda a: -a ** 2) if not b in c else 'd' \"e\"", "None"], ["f(", "lambda: )", "a b"]),
    "csv": (CSV, ['# a, b\n1,2.5e+1 "x"\n-3\n'.replace(", ", ",")], ["1,2\n", "# a\n1,,2\n"]),
    "lisp": (LISP, ['(define (f x) \'(+ x "a\\"b")) 1', "((((()))))"], ["(", "'"]),
    "brackets": (BRACKETS, ["", "()[]" * 100, "([])" * 3], ["(]", ")("]),
    "templates": (TEMPLATES, ["1,(2|xx|(a)),xxxx;{1:2,3:f}"], ["1,;{}", "x;{1:1}", "g;{1:1}"]),
    "priorities": (PRIORITIES, ["2026-11 ab, <x y>", "word"], ["2026-13", "<>", "1-"]),
}


@lru_cache(maxsize=16)
def compiled(grammar: str) -> Automaton:
    return grammar_automaton(grammar)


def accepts(parser: Lark, text: str) -> bool:
    try:
        parser.parse(text)
    except LarkError:
        return False
    return True


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "python" else ()) for name in TABLE]
)
def test_lark_accepts_every_text_that_is_allowed(name: str) -> None:
    grammar, allowed, refused = TABLE[name]
    automaton, parser, rng = compiled(grammar), Lark(grammar), random.Random(0)
    for text in allowed:
        assert accepts(parser, text) and automaton.matches(text), text
    for text in refused:
        assert not accepts(parser, text) and not automaton.matches(text), text
    for _ in range(num_examples(40)):
        text = random_text(automaton, rng, 50)
        assert accepts(parser, text), text


@pytest.mark.parametrize("name", ["arithmetic", "json", "sql", "config", "lisp", "brackets"])
def test_its_parser_lalr_with_the_contextual_lexer_does_too(name: str) -> None:
    grammar = TABLE[name][0]
    if name == "sql":  # there lark takes a keyword in lower case for a name
        grammar = re.sub(r'"([A-Z]+)"i', r'"\1"', grammar)
    automaton, parser, rng = compiled(grammar), Lark(grammar, parser="lalr"), random.Random(1)
    for _ in range(num_examples(40)):
        text = random_text(automaton, rng, 50)
        assert accepts(parser, text), text


PARTS = [
    '"-"',
    '"+"',
    '"-+"',
    "/-+/",
    r"/-\+?/",
    r"/-|-\+/",
    r"/-+?\+/",
    r"/[+-]/",
    "A",
    "B",
    r"/\+(?=-)/",
    r"/(?<=-)\+/",
    r"/(?>-|-\+)\+?/",
]
SHORT = ["".join(chars) for length in range(6) for chars in itertools.product("-+ ", repeat=length)]


def alternatives() -> st.SearchStrategy[str]:
    def longer(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(" ".join),
            pairs.map(lambda pair: f"({pair[0]} | {pair[1]})"),
            st.tuples(inner, st.sampled_from(["?", "*", "+", "~2", "~1..2"])).map(lambda pair: f"({pair[0]}){pair[1]}"),
            inner.map(lambda part: f"[{part}]"),
        )

    return st.recursive(st.sampled_from([*PARTS, "start", "x", "y"]), longer, max_leaves=4)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    rules=st.tuples(*[st.lists(alternatives(), min_size=1, max_size=3)] * 3),
    ignored=st.sampled_from(["", '%ignore " "', "%ignore / +/"]),
)
def test_small_grammars_allow_exactly_the_short_texts_that_lark_accepts(
    rules: tuple[list[str], ...], ignored: str
) -> None:
    """Recursion of any kind, empty rules, and terminals that overlap, match lazily or look around."""
    names = ("start", "x", "y")
    grammar = "\n".join(f"{name}: {' | '.join(options)}" for name, options in zip(names, rules, strict=True))
    grammar += f'\nA.2: "-"+\nB: /\\+*-/\n{ignored}\n'
    try:
        parser = Lark(grammar)
    except LarkError:  # a rule without tokens, or twice the same
        return
    try:
        automaton = grammar_automaton(grammar)
    except _NothingMatches:
        assert not any(accepts(parser, text) for text in SHORT)
        return
    except RequestError as error:
        if re.search("can never end|seconds|work|states", error.message):
            return
        raise
    assert [text for text in SHORT if automaton.matches(text)] == [text for text in SHORT if accepts(parser, text)]


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('start: "a" | start "," "a"', "a" + ",a" * 300),
        ('start: "a" | "a" "," start', "a" + ",a" * 300),
        ('start: x\nx: "a" y | "a"\ny: "," x', "a" + ",a" * 300),
        ('start: x\nx: y "," "a" | "a"\ny: x', "a" + ",a" * 300),
        ('start: start "+" start | "-" start | "a"', "-a" + "+--a" * 300),
        ('start: x\nx: "(" x* ")"', "(" + "()" * 300 + ")"),
    ],
)
def test_recursion_at_an_end_goes_on_for_ever(grammar: str, text: str) -> None:
    assert grammar_automaton(grammar).matches(text)


def test_what_nests_does_so_down_to_a_depth() -> None:
    automaton = compiled(BRACKETS)
    assert automaton.matches("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not automaton.matches("[" * 20 + "]" * 20)


def test_a_larger_grammar_nests_less_deep() -> None:
    pairs = [(chr(0x4E00 + number), chr(0x5E00 + number)) for number in range(12)]
    automaton = grammar_automaton("start: (" + " | ".join(f'"{a}" start "{b}"' for a, b in pairs) + ")*")
    depths = [depth for depth in range(10) if automaton.matches(pairs[0][0] * depth + pairs[0][1] * depth)]
    assert 1 < len(depths) < MAX_DEPTH


def test_a_keyword_is_no_name_where_both_may_stand() -> None:
    automaton = compiled('start: ("if" NAME | NAME "=" NAME) ";"\nNAME: /[a-z]+/\n%ignore " "')
    for text in ("if a;", "iff = a;", "a = if;", "a=b;"):
        assert automaton.matches(text)
    for text in ("if = a;", "ifa;"):
        assert not automaton.matches(text)


def test_comments_are_not_written_and_what_would_begin_one_is_nothing_else() -> None:
    automaton = compiled('start: "-"* "a"\n%ignore /--[^\\n]*/\n%ignore " "')
    assert automaton.matches("- -a") and not automaton.matches("--a") and not automaton.matches("--\na")


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        ('start: "a" b', "Rule 'b' used but not defined"),
        ('start: "a" B', "B"),
        ('begin: "a"', "start"),
        ('start: "a"\nx: (', "line 2 column 5"),
        ('start "a"', "line 1 column 7"),
        ('start: "a" x\nx: "b" x', "grammar rule x can never end"),
        ('start: x+\nx: "b" x', "grammar rule x can never end"),
        ("start: start", "never"),
        ("start: A\n%declare A", "%declare A"),
        ("%import .other.x\nstart: x", "imports from a file"),
        ("%import nowhere.x\nstart: x", "nowhere"),
        ("start: A\nA: /(/", "missing )"),
        ("start: A\nA: /a*/", "zero-width"),
        (r"start: A" "\n" r"A: /(\w+) \1/", "grammar terminal A"),
        ('start: x{"a"}\nx{a, b}: a b', "x"),
        ("start: x\nx{a}: a", "x"),
        ("start: " + " | ".join(f'"{chr(0x4E00 + number)}"' for number in range(300)), "300 terminals"),
        ("start: A~70\nA: /[a-z]{300}/", "grammar rule start"),
        ("", "start"),
        (5, "grammar is 5"),
        (b"start: x", "grammar is b'start: x'"),
        ("start: %json {}", "lark reads"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(grammar: object, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammar_automaton(grammar)
    assert named in caught.value.message


def test_a_rule_that_needs_too_many_states_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MAX_STATES", 100)
    with pytest.raises(RequestError, match=r"grammar rule x: the shape needs more than 100 states"):
        grammar_automaton('start: "b" x | x "c"\nx: "a"~120')


def test_a_grammar_without_texts_is_told_apart() -> None:
    with pytest.raises(_NothingMatches):
        grammar_automaton('start: /a(?!b)/ "b"')
