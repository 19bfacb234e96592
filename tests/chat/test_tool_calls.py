"""The grammar of tool calls: what is written is read back; what can be read in one way is mended; the rest stays whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockpress.chat import tool_calls
from blockpress.chat.tool_calls import MAX_DEPTH, QUOTE, MalformedToolCall, ToolCall, read_call, write_call
from tests.conftest import num_examples

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


def values_of(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
    )


arguments = st.dictionaries(st.text(), values_of(scalars, st.text()), max_size=5)

# Calls as models write them: keys are names, and no string looks like an entry of an object.
names = st.sampled_from(["path", "code", "n", "text"])
words = st.text("abc", min_size=1, max_size=6)
plain = st.dictionaries(names, values_of(words | st.sampled_from([1, -2.5, True, None]), names), min_size=1, max_size=3)


def pieces(text: str) -> list[str]:
    return text.split(QUOTE)


def quoted(value: object) -> bool:
    """Whether the quote's own text is in a string: then the pieces cannot be had from the joined text."""
    if isinstance(value, dict):
        return any(quoted(key) or quoted(entry) for key, entry in value.items())
    return any(map(quoted, value)) if isinstance(value, list) else QUOTE in str(value)


def is_same(call: object, given: dict[str, object]) -> bool:
    """Compared as JSON, in which 1 is not 1.0 and not true."""
    wanted = json.dumps(given, sort_keys=True)
    return isinstance(call, ToolCall) and json.dumps(call.arguments, sort_keys=True) == wanted


@settings(max_examples=num_examples(50))
@given(arguments.filter(lambda value: not quoted(value)))
def test_calls_round_trip(given: dict[str, object]):
    call = read_call(pieces(write_call("tool.name-1", given)))
    assert is_same(call, given)
    assert isinstance(call, ToolCall) and call.name == "tool.name-1" and not call.mended


@pytest.mark.parametrize(
    ("name", "given", "written"),
    [
        ("now", {}, "call:now{}"),
        ("ls", {"path": "."}, 'call:ls{path:<|"|>.<|"|>}'),
        ("f", {"b": 1, "A": 2, "c": -0.5}, "call:f{A:2,b:1,c:-0.5}"),
        ("f", {"x": [True, None, ["y"], {}]}, 'call:f{x:[true,null,[<|"|>y<|"|>],{}]}'),
        ("f", {"a:b": 1, "": 2, " c": 3}, 'call:f{<|"|><|"|>:2,<|"|> c<|"|>:3,<|"|>a:b<|"|>:1}'),
        ("f", {"it's": 1}, 'call:f{<|"|>it\'s<|"|>:1}'),
        ("f", {"größe": "„ü“\n"}, 'call:f{größe:<|"|>„ü“\n<|"|>}'),
    ],
)
def test_calls_are_written_in_the_published_form(name: str, given: dict[str, object], written: str):
    assert write_call(name, given) == written


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('  call : ls { path : <|"|>.<|"|> , n : 3 }\n', {"path": ".", "n": 3}),
        ('call:ls{"path":"a\\"b\\n","n":"{"}', {"path": 'a"b\n', "n": "{"}),
        ('call:ls{<|"|>a b<|"|>:[ ],c d:[1 ,2]}', {"a b": [], "c d": [1, 2]}),
        ("call:ls{a:-1.5e3,b:" + "9" * 300 + "}", {"a": -1500.0, "b": int("9" * 300)}),
        ('call:ls{a:<|"|>{[,:"\\n\x00\u2603<|"|>}', {"a": '{[,:"\\n\x00\u2603'}),
    ],
    ids=["blanks", "JSON's quotes", "keys", "numbers", "any character"],
)
def test_json_arguments_are_read_too(text: str, wanted: dict[str, object]):
    call = read_call(pieces(text))
    assert call == ToolCall(name="ls", arguments=wanted)
    assert isinstance(call, ToolCall) and not call.mended


MENDED: list[tuple[str, dict[str, object]]] = [
    # Words without quotes, and what JSON does not write.
    ("call:f{when:12:30,city:New York,url:http://a/b}", {"when": "12:30", "city": "New York", "url": "http://a/b"}),
    ("call:f{a:1e400,b:01,e:nan,f:-}", {"a": "1e400", "b": "01", "e": "nan", "f": "-"}),
    ("call:f{a:" + "9" * 5000 + "}", {"a": "9" * 5000}),
    ("call:f{left:108.,right:22.8,c:-1.e2,d:.5}", {"left": 108.0, "right": 22.8, "c": -100.0, "d": 0.5}),
    ("call:f{a:[108.,True,False,None]}", {"a": [108.0, True, False, None]}),
    ("call:f{a:,b:[{c:}]}", {"a": "", "b": [{"c": ""}]}),
    # Single quotes.
    ("call:f{ids:['a','b c'],'k': 'v'}", {"ids": ["a", "b c"], "k": "v"}),
    ("call:f{a:'don't, it's',b:'it\\'s \\s\\n'}", {"a": "don't, it's", "b": "it's \\s\n"}),
    ("call:f{a:'x,y:{z}',b:'abc}", {"a": "x,y:{z}", "b": "'abc"}),
    # Braces and commas.
    ("call:f{", {}),
    ("call:f{a:1", {"a": 1}),
    ('call:f{a:[{b:<|"|>c<|"|>,d:1}]', {"a": [{"b": "c", "d": 1}]}),
    ("call:f{a:[1,[2", {"a": [1, [2]]}),
    ("call:f{a:1,}", {"a": 1}),
    ("call:f{a:[1,2,],b:{c:3,},}", {"a": [1, 2], "b": {"c": 3}}),
    ("call:f{a:1,", {"a": 1}),
    ("call:f{{a:1}}", {"a": 1}),
    ("call:f{{a:1}", {"a": 1}),
    ("call:f{a:1}}", {"a": 1}),
    ("call:f{a:{{b:[1]}}}", {"a": {"b": [1]}}),
    ("call:f{{}}", {}),
    # The word `call`.
    (":f{a:1}", {"a": 1}),
    ("f{a:1}", {"a": 1}),
    ("call:f{a:tomorrow at 12:30,b:see http://x.org}", {"a": "tomorrow at 12:30", "b": "see http://x.org"}),
    ("call:f{a:[New York,5 km]}", {"a": ["New York", "5 km"]}),
    # A string without its end.
    ('call:f{a:<|"|>ls}', {"a": "ls"}),
    ('call:f{p:<|"|>/tmp<|"|>,a:<|"|>ls -l, please', {"p": "/tmp", "a": "ls -l, please"}),
    ('call:f{a:[{b:<|"|>echo {c}}]}', {"a": [{"b": "echo {c}"}]}),
    ('call:f{a:<|"|>}', {"a": ""}),
    # Strings without their beginning.
    ('call:f{q:weather in Tokyo<|"|>}', {"q": "weather in Tokyo"}),
    ('call:f{q:Paris, France<|"|>,limit:5}', {"q": "Paris, France", "limit": 5}),
    ('call:f{a:x<|"|>,b:<|"|>y<|"|>,c:z<|"|>}', {"a": "x", "b": "y", "c": "z"}),
    ('call:f{n:1,t:12:30<|"|>,l:[a<|"|>]}', {"n": 1, "t": "12:30", "l": ["a"]}),
    ("call:f{p:':\\s*\\w+'<|\"|>}", {"p": ":\\s*\\w+"}),
    # Quote tokens for quotation marks.
    (
        'call:f{code:<|"|>q(<|"|><|"|><|"|> SELECT 1 <|"|><|"|><|"|>)<|"|>,refs:[<|"|>a<|"|>]}',
        {"code": 'q(""" SELECT 1 """)', "refs": ["a"]},
    ),
    (
        'call:f{old:<|"|>print(<|"|>a<|"|>, <|"|>b<|"|>)<|"|>,new:<|"|>x = [<|"|>c<|"|>,<|"|>d<|"|>]<|"|>}',
        {"old": 'print("a", "b")', "new": 'x = ["c","d"]'},
    ),
    (
        'call:f{j:<|"|>{<|"|>a<|"|>:<|"|>x<|"|>,<|"|>b<|"|>:[1,<|"|>y<|"|>]}<|"|>,k:1}',
        {"j": '{"a":"x","b":[1,"y"]}', "k": 1},
    ),
    ('call:f{size:<|"|>5<|"|> tall<|"|>,n:<|"|>x<|"|>}', {"size": '5" tall', "n": "x"}),
    ('call:f{a:[<|"|>say <|"|>hi<|"|> twice<|"|>,<|"|>b<|"|>]}', {"a": ['say "hi" twice', "b"]}),
]


@pytest.mark.parametrize(("text", "wanted"), MENDED, ids=[text[:60] for text, _ in MENDED])
def test_unambiguous_mistakes_are_repaired(text: str, wanted: dict[str, object]):
    call = read_call(pieces(text))
    assert is_same(call, wanted)
    assert isinstance(call, ToolCall) and call.name == "f" and call.mended


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "'call:'"),
        ("cal:ls{}", "'call:'"),
        ('<|"|>call<|"|>:ls{}', "quoted string"),
        ("call:{}", "no name"),
        (":{}", "'call:'"),
        (": to do, {}", "'call:'"),
        ("call{}", "'call:'"),
        ("call:ls", "no '{'"),
        ('call:ls(path="x")', "no '{'"),
        ("call:ls{,}", "a key"),
        ("call:ls{a:1,,b:2}", "a key"),
        ("call:ls{a}", "no ':'"),
        ("call:ls{a:", "inside an object"),
        ("call:ls{a:[1,,2]}", "a value"),
        ("call:ls{a:[1,b:2]}", "'b:2'"),
        ("call:ls{a:1,a:2}", "twice"),
        ("call:ls{a:[{b:1,b:1}]}", "twice"),
        ("call:ls{a:[1}", "','"),
        ("call:ls{a:1]}", "','"),
        ("call:ls{{a:1},b:2}", "'}'"),
        ("call:ls{a:1}}}", "after the call"),
        ("call:ls{}call:ls{}", "after the call"),
        ("call:ls{} ok", "after the call"),
        ('call:ls{a:x<|"|>y<|"|>}', "after text"),
        ('call:ls{a:"x}', "not closed"),
        ('call:ls{a:"x<|"|>}', "not closed"),
        ('call:ls{a:"\\q"}', "JSON string"),
        ("call:ls{a:NaN}", "NaN"),
        ("call:ls{a:[-Infinity]}", "-Infinity"),
        ("call:ls{a:" + "[" * (MAX_DEPTH + 1), "deeper"),
        ("call:ls{a:" + "[" * 100_000, "deeper"),
        ("call:ls{" + "{" * 100_000, "deeper"),
        # Two readings.
        ('call:ls{a:<|"|>x<|"|><|"|>y<|"|>}', "','"),
        ('call:ls{a:<|"|>one,b:<|"|>two<|"|>}', "','"),
        ('call:ls{a:<|"|>1,b:<|"|>2,c:<|"|>3<|"|>}', "','"),
        ('call:ls{a:<|"|>if (x) {}', "not closed"),
        ('call:ls{a:<|"|>ls,path:/tmp}', "not closed"),
        ('call:ls{a:[x,y<|"|>]}', "after text"),
        ('call:ls{a:[<|"|>x<|"|>,y<|"|>]}', "after text"),
        ('call:ls{a:x,b:y<|"|>}', "after text"),
        ('call:ls{a:<|"|><|"|>x<|"|><|"|>}', "','"),
        ('call:ls{a:[<|"|>print(<|"|>x<|"|>, <|"|>y<|"|>)<|"|>]}', "','"),
        ('call:ls{a:<|"|>5<|"|> tall<|"|>,b:<|"|>6<|"|> wide<|"|>}', "','"),
        ("call:ls{a:1 b:2}", "'b:2', which may be the next entry"),
        ("call:ls{a:1;b:2}", "'b:2', which may be the next entry"),
        ("call:ls{a:New York\nnights: 2,c:3}", "'nights: 2', which may be the next entry"),
        ("call:ls{a:'x, b:'y'}", "which may be the next entry"),
        ("call:ls{a:[1 2]}", "no ',' in '1 2'"),
        ("call:ls{a:[null,true  false]}", "no ',' in 'true  false'"),
    ],
)
def test_malformed_calls_are_returned_whole_with_the_reason(text: str, fault: str):
    call = read_call(pieces(text))
    assert isinstance(call, MalformedToolCall)
    assert call.raw == text
    assert fault in call.fault


def test_an_empty_text_is_no_call():
    assert read_call([]) == MalformedToolCall(raw="", fault="it does not begin with 'call:'")


def test_the_deepest_allowed_nesting_is_read():
    inner: object = []
    for _ in range(MAX_DEPTH - 2):
        inner = [inner]
    assert read_call(pieces(write_call("f", {"a": inner}))) == ToolCall(name="f", arguments={"a": inner})


@pytest.mark.parametrize(
    "text",
    [
        "call:f{a:[" + '<|"|>x<|"|>,' * 300 + '!<|"|>]}',
        'call:f{a:<|"|>' + 'x<|"|>, ' * 400 + "}",
        'call:f{a:<|"|>' + '<|"|>k<|"|>: <|"|>v<|"|>, ' * 120 + '!<|"|>}',
        "call:f{a:[" + "'x," * 5000 + "}",
        'call:f{a:<|"|>' + ", a :" * 5000 + '<|"|>x<|"|>}',
        "call:f{a:" + "x:" * 5000 + '<|"|>]}',
        'call:f{a:<|"|>' + "} " * 5000,
    ],
)
def test_hostile_texts_cost_bounded_work(text: str):
    """Each of these takes for ever where readings are tried one after the other."""
    assert isinstance(read_call(pieces(text)), ToolCall | MalformedToolCall)


@settings(max_examples=num_examples(50))
@given(st.lists(st.text(alphabet="call:f{}[],\"'x1.N \n\\"), max_size=6), st.booleans())
def test_any_text_is_a_call_or_malformed(texts: list[str], closed: bool):
    call = read_call(texts, closed=closed)
    if isinstance(call, MalformedToolCall):
        assert call.raw == QUOTE.join(texts) and call.fault
    else:
        again = read_call(pieces(write_call(call.name, call.arguments)))
        assert again == call and isinstance(again, ToolCall) and not again.mended


def texts_in(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for entry in value:
            yield from texts_in(entry)
    else:
        yield str(value)


@settings(max_examples=num_examples(50))
@given(st.lists(st.text(alphabet="xyz{}[],:' \n"), min_size=1, max_size=6))
def test_a_repaired_call_keeps_every_letter(texts: list[str]):
    """And none is made up."""
    call = read_call(["call:f{a:" + texts[0], *texts[1:]])
    if isinstance(call, ToolCall):
        assert Counter(filter(str.isalpha, "".join(texts_in(call.arguments)))) == Counter(
            filter(str.isalpha, "a" + "".join(texts))
        )


def without(given: dict[str, object], places: list[int]) -> list[str]:
    """The pieces of a call that lacks these of its quote tokens."""
    left: list[str] = []
    for number, piece in enumerate(pieces(write_call("f", given))):
        if left and number - 1 in places:
            left[-1] += piece
        else:
            left.append(piece)
    return left


@settings(max_examples=num_examples(50))
@given(plain, st.data())
def test_a_quote_token_that_is_missing_is_found_or_the_call_is_broken(given: dict[str, object], data: st.DataObject):
    """Never is it another call: of the tokens any one may be missing, or any number of those that open a string."""
    tokens = len(pieces(write_call("f", given))) - 1
    assume(tokens)
    openers = st.lists(st.sampled_from(range(0, tokens, 2)), min_size=1, unique=True)
    places = data.draw(st.integers(0, tokens - 1).map(lambda place: [place]) | openers)
    call = read_call(without(given, places))
    assert isinstance(call, MalformedToolCall) or (is_same(call, given) and call.mended)


@settings(max_examples=num_examples(50))
@given(
    st.dictionaries(
        names,
        st.lists(st.sampled_from(['"ab"', "f(", ")", " = ", "ab", ", ", '"c"', "[", "]"]), max_size=8).map("".join),
    )
)
def test_quotation_marks_that_are_tokens_are_marks_again_or_the_call_is_broken(given: dict[str, object]):
    written = [
        part
        for i, piece in enumerate(pieces(write_call("f", given)))
        for part in (piece.split('"') if i % 2 else [piece])
    ]
    call = read_call(written)
    assert isinstance(call, MalformedToolCall) or is_same(call, given)


def test_programs_whose_quotation_marks_are_tokens_are_read_back_or_broken():
    """Tools that write files are given programs; here, those of this package."""
    right = 0
    sources = sorted(Path(tool_calls.__file__).parents[1].glob("c*/*.py"))
    for source in sources:
        program = source.read_text(encoding="utf-8").replace(QUOTE, "")
        before, _, after = write_call("write", {"path": "a.py", "n": 3, "text": "\0", "zip": ["x", "y"]}).partition(
            "\0"
        )
        given = {"path": "a.py", "n": 3, "text": program, "zip": ["x", "y"]}
        call = read_call(pieces(before + QUOTE.join(program.split('"')) + after))
        assert isinstance(call, MalformedToolCall) or is_same(call, given), source
        right += isinstance(call, ToolCall)
    assert right > len(sources) / 2


@settings(max_examples=num_examples(50))
@given(plain, st.integers(0, 8))
def test_braces_that_are_missing_at_the_end_are_added(given: dict[str, object], most: int):
    text = write_call("f", given)
    ends = len(text) - len(text.rstrip("}]"))
    left = read_call(pieces(text[: len(text) - min(ends, 1 + most)]))
    assert is_same(left, given) and isinstance(left, ToolCall) and left.mended


@settings(max_examples=num_examples(50))
@given(plain, st.data())
def test_a_truncated_call_is_no_call(given: dict[str, object], data: st.DataObject):
    text = write_call("f", given)
    cut = data.draw(st.integers(0, len(text) - 1))
    assert isinstance(read_call(pieces(text[:cut]), closed=False), MalformedToolCall)
    assert is_same(read_call(pieces(text), closed=False), given)


# What `transformers` 5.23 reads Gemma 4's turns by (transformers.cli.serving.utils).
RESPONSE_TEMPLATE = {
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [[QUOTE, QUOTE]]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
their_texts = st.text(st.characters(exclude_characters="\x01\x02", codec="utf-8")).filter(
    lambda text: QUOTE not in text
)
their_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | their_texts
)


def transformers_reads(text: str, **more: Any) -> Any:
    theirs = pytest.importorskip("transformers.utils.chat_parsing")
    message = theirs.parse_response(f"<|tool_call>{text}<tool_call|>", RESPONSE_TEMPLATE, prefix="", **more)
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parity
@settings(max_examples=num_examples(50))
@given(st.dictionaries(names, values_of(their_scalars, names), max_size=3))
def test_transformers_reads_well_formed_calls_the_same(given: dict[str, object]):
    text = write_call("f", given)
    assert is_same(read_call(pieces(text)), transformers_reads(text))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("5", {"type": "integer"}),
        ("3.0", {"type": "integer"}),
        ("007", {"type": "integer"}),
        ("2.5", {"type": "number"}),
        ("5", {"type": "number"}),
        ("True", {"type": "boolean"}),
        ("0", {"type": "boolean"}),
        ("None", {"type": ["integer", "null"]}),
        ('{"k":[1]}', {"anyOf": [{"type": "object"}, {"type": "null"}]}),
        ("x", {"type": "integer"}),
        ("x", {"type": "string"}),
        ("5", {}),
    ],
)
def test_transformers_reads_quoted_values_by_their_schema_the_same(text: str, schema: dict[str, Any]):
    parameters = {"type": "object", "properties": {"a": schema}}
    call = f"call:f{{a:{QUOTE}{text}{QUOTE}}}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert is_same(read_call(pieces(call), {"f": parameters}), transformers_reads(call, tools=tools))
