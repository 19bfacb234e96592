"""The parser of a model's turn: thoughts, text and calls from ids, however the ids were cut up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockpress.chat import (
    ChatTemplate,
    MalformedToolCall,
    Piece,
    SpecialTokens,
    TextDelta,
    ToolCall,
    TurnParser,
    encode_chat,
)
from blockpress.chat.tool_calls import write_call
from blockpress.text import Tokenizer
from tests.conftest import num_examples

from .. import chat_tokenizer
from .test_tool_calls import arguments


def answer(text: str) -> TextDelta:
    return TextDelta("answer", text)


def thought(text: str) -> TextDelta:
    return TextDelta("thought", text)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    whole: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, TextDelta) and whole and isinstance(whole[-1], TextDelta) and whole[-1].kind == piece.kind:
            whole[-1] = TextDelta(piece.kind, whole[-1].text + piece.text)
        else:
            whole.append(piece)
    return whole


def parse(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int] = (), **options: Any) -> list[Piece]:
    parser = TurnParser(tokenizer, SpecialTokens.of(tokenizer), **options)
    edges = [0, *sorted(cuts), len(ids)]
    said = [piece for begin, end in pairwise(edges) for piece in parser.feed(ids[begin:end])]
    return joined([*said, *parser.finish()])


LS = ToolCall(name="ls", arguments={})
SAY = ToolCall(name="say", arguments={"a": "x"})
TURNS: list[tuple[str, list[Piece]]] = [
    ("Hello.<turn|>", [answer("Hello.")]),
    ("<turn|>", []),
    ("<|channel>thought\nI add.\n<channel|>4<turn|>", [thought("I add."), answer("4")]),
    ("<|channel>thought\n<channel|>4<turn|>", [answer("4")]),
    ("<|channel><channel|>4", [answer("4")]),
    ("<|channel>thought<channel|>4", [answer("4")]),
    ("<|channel>thought\n  a \n b  \n<channel|>\n4\n", [thought("a \n b"), answer("\n4\n")]),
    ("<|channel>plan\na<channel|>b", [thought("plan\na"), answer("b")]),
    ("<|channel>thought\nnever closed<turn|>", [thought("never closed")]),
    (
        "<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d",
        [thought("a"), answer("b"), thought("\n\nc"), answer("d")],
    ),
    ("<|channel>t<channel|>4", [thought("t"), answer("4")]),
    ("<|channel>tho\n<channel|>4", [thought("tho"), answer("4")]),
    ("<|channel>thoughtful<channel|>4", [thought("thoughtful"), answer("4")]),
    ("<|channel>thought \nto<channel|>4", [thought("to"), answer("4")]),
    ("<|channel>though<turn|>", [thought("though")]),
    ("<|channel>a<|channel>thought\nb<channel|>c", [thought("a\n\nb"), answer("c")]),
    ("<|channel><channel|><|channel>a<channel|>c", [thought("a"), answer("c")]),
    # An end of what is not open parts the text around it.
    ("I think so.<channel|>Hi", [answer("I think so.\n\nHi")]),
    ("a<channel|> b", [answer("a\n\n b")]),
    ("a\n<channel|>b", [answer("a\nb")]),
    ("a<channel|><channel|>b<channel|>", [answer("a\n\nb")]),
    ("<channel|>b", [answer("b")]),
    ("a<tool_call|>b", [answer("a\n\nb")]),
    ("a<|channel><channel|>b", [answer("a\n\nb")]),
    ("<|channel>a<tool_call|>b<channel|>c", [thought("a\n\nb"), answer("c")]),
    ("<|tool_call>call:ls{}<tool_call|><tool_call|>Done.", [LS, answer("Done.")]),
    ("<|tool_call>call:ls{}<tool_call|><|tool_response>", [LS]),
    ("Look:<|tool_call>call:ls{}<tool_call|><|tool_call>call:ls{}<tool_call|>", [answer("Look:"), LS, LS]),
    ('<|tool_call>call:say{a:<|"|>"{<|"|>}<tool_call|>', [ToolCall(name="say", arguments={"a": '"{'})]),
    ("<|channel>thought\na<|tool_call>call:ls{}<tool_call|>b", [thought("a"), LS, answer("b")]),
    (
        '<|tool_call>call:say{a:<|"|>x<turn|>',
        [MalformedToolCall(raw='call:say{a:<|"|>x', fault="the call is not closed")],
    ),
    (
        '<|tool_call>call:say{a:<|"|>x<|"|><turn|>',
        [MalformedToolCall(raw='call:say{a:<|"|>x<|"|>', fault="the call is not closed")],
    ),
    # What a call lacks before its end is mended, and a whole call without its end is one.
    ("<|tool_call>call:ls{<tool_call|>", [LS]),
    ('<|tool_call>call:say{a:<|"|>x}<tool_call|>', [SAY]),
    ("<|tool_call>call:ls{}<turn|>", [LS]),
    ('<|tool_call>call:say{a:<|"|>x<|"|>}', [SAY]),
    ("<|tool_call>call:ls{}<|tool_call>call:ls{}<tool_call|>", [LS, LS]),
    (
        "<|tool_call>call:ls{<|tool_call>call:ls{}<tool_call|>",
        [MalformedToolCall(raw="call:ls{", fault="the call is not closed"), LS],
    ),
    (
        "<|tool_call>ls()<tool_call|>ok",
        [MalformedToolCall(raw="ls()", fault="it does not begin with 'call:'"), answer("ok")],
    ),
    ("<|tool_call>", [MalformedToolCall(raw="", fault="the call is not closed")]),
]


@pytest.mark.parametrize(("text", "wanted"), TURNS, ids=[text for text, _ in TURNS])
def test_a_turn_is_parsed_into_text_thoughts_and_calls(gemma: Tokenizer, text: str, wanted: list[Piece]):
    ids = gemma.encode(text, add_special=False)
    assert parse(gemma, ids) == wanted
    assert parse(gemma, ids, range(1, len(ids))) == wanted


def test_a_thought_opened_by_the_prompt_is_a_thought(gemma: Tokenizer):
    ids = gemma.encode("so\n<channel|>4", add_special=False)
    assert parse(gemma, ids, section="thought") == [thought("so"), answer("4")]


def test_text_like_a_label_is_part_of_a_thought_that_the_prompt_opened(gemma: Tokenizer):
    """Its label is in the prompt, so what is like a label is a thought, too; but for one that is written again."""
    for text, wanted in (("tho", "tho"), ("thought", "thought"), ("thought\nso", "so"), ("t\n", "t")):
        ids = gemma.encode(f"{text}<channel|>4", add_special=False)
        assert parse(gemma, ids, section="thought") == [thought(wanted), answer("4")]


WITHOUT_OPENER: list[tuple[str, list[Piece]]] = [
    ("call:ls{}<turn|>", [LS]),
    ("call:ls{}", [LS]),
    ('Look.\ncall: say {a:<|"|>x<|"|>}\n<turn|>', [answer("Look.\n"), SAY]),
    ("<|channel>thought\na<channel|>call:ls{}<turn|>", [thought("a"), LS]),
    ("call:ls{}\ncall:ls{}<|tool_response>", [LS, LS]),
    ('call:say{a:<|"|>call:ls{}\ncall:ls{}<|"|>}', [ToolCall(name="say", arguments={"a": "call:ls{}\ncall:ls{}"})]),
    ("call:ls{}<|tool_call>call:ls{}<tool_call|>", [LS, LS]),
    # Its end came, so it is a call, and may be mended.
    ('call:say{a:<|"|>x}<tool_call|>ok', [SAY, answer("ok")]),
    (
        "call:ls{a:<tool_call|>ok",
        [MalformedToolCall(raw="call:ls{a:", fault="it ends inside an object"), answer("ok")],
    ),
    # Text that speaks of a call.
    ("Use call:ls{}", [answer("Use call:ls{}")]),
    ("call:ls{}\nThat lists.", [answer("call:ls{}\nThat lists.")]),
    ("call:ls{}call:ls{}", [answer("call:ls{}call:ls{}")]),
    ("call:ls{a:1<turn|>", [answer("call:ls{a:1")]),
    ("call:rm{}<turn|>", [answer("call:rm{}")]),
    ("call: me, call:ls{", [answer("call: me, call:ls{")]),
    ("call<turn|>", [answer("call")]),
    # A thought begins the turn, and ends.
    ("thought\nI add.\n<channel|>4", [thought("I add."), answer("4")]),
    ("\nthought \nI add.<channel|>4", [answer("\n"), thought("I add."), answer("4")]),
    ("thought<channel|>4", [answer("4")]),
    ("thought\n<channel|>4", [answer("4")]),
    ("thought\nI add.<turn|>", [answer("thought\nI add.")]),
    ("thought\nI add.<tool_call|>4", [answer("thought\nI add.\n\n4")]),
    ("thoughtful<channel|>4", [answer("thoughtful\n\n4")]),
    ("A\nthought\nB<channel|>4", [answer("A\nthought\nB\n\n4")]),
]


@pytest.mark.parametrize(("text", "wanted"), WITHOUT_OPENER, ids=[text for text, _ in WITHOUT_OPENER])
def test_calls_and_thoughts_without_their_opener_are_found(text: str, wanted: list[Piece]):
    """By a tokenizer of single characters, and so wherever a token may end."""
    ids = chat_tokenizer.ids(text)
    tools = {"ls": {}, "say": {}}
    for cuts in ((), range(1, len(ids))):
        found = parse(chat_tokenizer.TOKENIZER, ids, cuts, tools=tools)
        assert found == wanted
        mended = [piece.mended for piece in found if isinstance(piece, ToolCall)]
        assert all(mended[: len(mended) - text.count("<|tool_call>")])


def test_a_truncated_call_is_no_call(gemma: Tokenizer):
    """Though nothing of it is missing so far: more might have come."""
    for text, wanted in (
        ("<|tool_call>call:ls{}", MalformedToolCall(raw="call:ls{}", fault="the call is not closed")),
        ("call:ls{}", answer("call:ls{}")),
        ("<|tool_call>call:ls{}<tool_call|>", LS),
    ):
        parser = TurnParser(gemma, SpecialTokens.of(gemma))
        assert [*parser.feed(gemma.encode(text, add_special=False)), *parser.finish(cut=True)] == [wanted]


def test_only_tools_that_were_given_are_called_without_an_opener(gemma: Tokenizer):
    ids = gemma.encode("call:ls{}<turn|>", add_special=False)
    for tools, wanted in ((None, LS), ({"ls": {}}, LS), ({}, answer("call:ls{}")), ({"l": {}}, answer("call:ls{}"))):
        assert parse(gemma, ids, tools=tools) == [wanted]


def test_a_call_is_read_by_the_schema_of_its_tool(gemma: Tokenizer):
    ids = gemma.encode("<|tool_call>call:find{zip:501}<tool_call|>", add_special=False)
    tools = {"find": {"properties": {"zip": {"type": "string"}}}}
    assert parse(gemma, ids, tools=tools) == [ToolCall(name="find", arguments={"zip": "501"})]


def test_stop_texts_are_found_in_text_that_only_looked_like_a_call(gemma: Tokenizer):
    ids = gemma.encode("a\ncall:ls{}END b", add_special=False)
    assert parse(gemma, ids, range(len(ids)), stop=["END"]) == [answer("a\ncall:ls{}")]
    parser = TurnParser(gemma, SpecialTokens.of(gemma), stop=["END"])
    assert joined([*parser.feed(ids), *parser.finish()]) == [answer("a\ncall:ls{}")]
    assert parser.stopped == "END" and gemma.decode(ids[: parser.tokens_used]) == "a\ncall:ls{}"
    ids = gemma.encode("call:say{a:END}<turn|>", add_special=False)
    assert parse(gemma, ids, stop=["END"]) == [ToolCall(name="say", arguments={"a": "END"})]


CONTROLS = ["<|channel>", "thought\n", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<turn|>", "call:f{", "}"]
turns = st.lists(st.sampled_from([*CONTROLS, " word", "\n", "\ncall:f{}", "é", "🙂", "a:1,", "12", "tho"]), max_size=14)


@settings(max_examples=num_examples(30))
@given(turns, st.data())
def test_pieces_do_not_depend_on_how_tokens_are_split(gemma: Tokenizer, parts: list[str], data: st.DataObject):
    ids = [token for part in parts for token in gemma.encode(part, add_special=False)]
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    options: dict[str, Any] = {
        "stop": data.draw(st.sampled_from([(), ("word",), ("d 1", "\n")])),
        "section": data.draw(st.sampled_from(["answer", "thought"])),
        "tools": data.draw(st.sampled_from([None, {}, {"f": {}}])),
    }
    assert parse(gemma, ids, cuts, **options) == parse(gemma, ids, **options)


@settings(max_examples=num_examples(30))
@given(turns)
def test_pieces_are_never_taken_back(gemma: Tokenizer, parts: list[str]):
    """What comes of the beginning of a turn is the beginning of what comes of the turn."""
    ids = [token for part in parts for token in gemma.encode(part, add_special=False)]
    parser = TurnParser(gemma, SpecialTokens.of(gemma))
    whole, said = parse(gemma, ids), list[Piece]()
    for token in ids:
        said = joined([*said, *parser.feed([token])])
        if not said:
            continue
        assert said[:-1] == whole[: len(said) - 1]
        last, there = said[-1], whole[len(said) - 1]
        if isinstance(last, TextDelta) and isinstance(there, TextDelta):
            there = TextDelta(there.kind, there.text[: len(last.text)])
        assert last == there


@settings(max_examples=num_examples(30))
@given(st.lists(st.sampled_from([*CONTROLS, " word", "é", "🙂"]), max_size=14))
def test_no_text_is_lost(gemma: Tokenizer, parts: list[str]):
    said = "".join(
        piece.text
        if isinstance(piece, TextDelta)
        else piece.raw
        if isinstance(piece, MalformedToolCall)
        else f"call:{piece.name}{json.dumps(piece.arguments, ensure_ascii=False)}"
        for piece in parse(gemma, [token for part in parts for token in gemma.encode(part, add_special=False)])
    )
    for sign in ("word", "é", "🙂"):
        assert said.count(sign) == sum(part.count(sign) for part in parts)


def test_inside_a_call_only_the_end_token_is_special():
    controls = SpecialTokens(thought=1, thought_end=2, call=3, call_end=4)
    walk = [controls.section_after(ids) for ids in ([1], [1, 2], [1, 3], [3, 1], [3, 2], [3, 1, 4], [3, 3, 4, 1])]
    assert walk == ["thought", "answer", "call", "call", "call", "answer", "thought"]
    assert controls.section_after([2], "thought") == controls.section_after([2]) == "answer"
    assert SpecialTokens().section_after(range(9), "thought") == "thought"


@settings(max_examples=num_examples(30))
@given(arguments)
def test_a_call_rendered_by_the_template_is_parsed_back(gemma: Tokenizer, given: dict[str, Any]):
    """From an assistant's message through the template and the tokenizer to ids, and back."""
    # This vocabulary writes a space as U+2581, so it cannot tell that sign from a space.
    assume("\u2581" not in json.dumps(given, ensure_ascii=False))
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Look.", "tool_calls": [{"function": {"name": "f", "arguments": given}}]},
        {"role": "tool", "name": "f", "content": "x"},
    ]
    ids = encode_chat(gemma, TEMPLATE, messages).ids
    begin, end = ids.index(48) - 2, ids.index(49) + 1
    assert gemma.decode(ids[begin:]).startswith("Look.")
    assert parse(gemma, ids[begin:end]) == [answer("Look."), ToolCall(name="f", arguments=given)]


TEMPLATE = ChatTemplate.own()


@given(arguments)
def test_the_template_writes_calls_as_the_writer_does(given: dict[str, Any]):
    call = {"type": "function", "function": {"name": "f", "arguments": given}}
    text = TEMPLATE.render([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert f"<|tool_call>{write_call('f', given)}<tool_call|>" in text


def test_a_stop_text_is_looked_for_in_the_answer_only(gemma: Tokenizer):
    ids = gemma.encode("<|channel>thought\nEND it<channel|>go on.\nEND not this", add_special=False)
    parser = TurnParser(gemma, SpecialTokens.of(gemma), stop=["END"])
    assert joined([*parser.feed(ids), *parser.finish()]) == [thought("END it"), answer("go on.\n")]
    assert parser.stopped == "END"
    assert gemma.decode(ids[: parser.tokens_used]) == "thought\nEND itgo on.\n"
    parser = TurnParser(gemma, SpecialTokens.of(gemma), stop=["END"])
    assert parser.feed(gemma.encode("<|channel>thought\na<channel|>END", add_special=False)) == [thought("a")]
    assert parser.tokens_used == 5 and parser.feed(ids) == [] == parser.finish()


def test_a_stop_text_is_not_found_across_a_thought(gemma: Tokenizer):
    ids = gemma.encode("E<|channel>thought\nx<channel|>ND", add_special=False)
    assert parse(gemma, ids, stop=["END"]) == [answer("E"), thought("x"), answer("ND")]


def test_without_control_tokens_everything_is_text(digits: Tokenizer):
    assert SpecialTokens.of(digits) == SpecialTokens()
    assert parse(digits, digits.encode("12\n3")) == [answer("12\n3")]


def test_control_tokens_of_gemma_are_found(gemma: Tokenizer):
    assert SpecialTokens.of(gemma) == SpecialTokens(
        thought=100, thought_end=101, call=48, call_end=49, quote=52, stops=(106, 50)
    )
