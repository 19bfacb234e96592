"""Turns as automata: what a call writes is what its JSON says, thoughts end where the network ends them."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpress.chat.tool_calls import QUOTE as QUOTE_TEXT
from blockpress.chat.tool_calls import ToolCall, read_call, write_call
from blockpress.constrain import CanvasConstraint
from blockpress.constrain.automaton import Expression, literal
from blockpress.constrain.call_text import QUOTE, call_text
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.schema import schema_automaton
from blockpress.constrain.tokens import TokenAutomaton, TokenBytes, lift
from blockpress.constrain.turns import CALL, CALL_END, THOUGHT, THOUGHT_END, Calls, Function, Opening, Turn
from blockpress.errors import RequestError

from .walks import random_bytes, random_text

TEXT = {"type": "string", "maxLength": 6}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"city": TEXT, "n": {"type": "integer"}}, "required": ["city"]},
    {"type": "object", "properties": {"a:b": TEXT, " x": TEXT, "": TEXT, "it's": {"type": "null"}}},
    {
        "type": "object",
        "properties": {"deep": {"type": "object", "properties": {"k": {"type": "array", "items": TEXT}}}},
    },
    {"type": "object", "additionalProperties": {"enum": ['say "hi"', "a\\b", "line\nend", 7, None, {"é": [1, ""]}]}},
    {"type": "object", "properties": {"any": {}, "f": {"type": "number"}}},
    {
        "type": "object",
        "properties": {"p": {"type": "string", "pattern": '^[\\x00-\\x1f"\\\\]{1,3}$'}},
        "required": ["p"],
    },
]


def told(text: bytes) -> ToolCall:
    """What the chat's parser makes of a call with the letter of the quote token in it."""
    pieces = [piece.decode() for piece in text.split(bytes([QUOTE]))]
    call = read_call(pieces, held=True)
    assert isinstance(call, ToolCall), (call, text)
    return call


def written(call: str) -> bytes:
    return call.encode().replace(QUOTE_TEXT.encode(), bytes([QUOTE]))


def sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value, key=str.lower)}
    return [sorted_keys(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_call_says_what_its_schema_allows_and_needs_no_mending(schema: dict[str, Any]) -> None:
    automaton, rng = compile_expression(call_text(schema_automaton(schema))), random.Random(0)
    for _ in range(30):
        call = told(b"call:f" + random_bytes(automaton, rng))
        jsonschema.validate(call.arguments, schema)
        assert not call.mended


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_json_text_has_its_call_in_the_form_that_templates_show(schema: dict[str, Any]) -> None:
    schema = sorted_keys(schema)
    automaton, rng = schema_automaton(schema), random.Random(1)
    calls = compile_expression(call_text(automaton))
    for _ in range(30):
        text = random_text(automaton, rng)
        arguments = json.loads(text)
        if json.dumps(sorted_keys(arguments)) == json.dumps(arguments) and "." not in text and "e" not in text:
            assert calls.matches(written(write_call("f", arguments)).removeprefix(b"call:f")), arguments


def test_no_text_of_a_string_can_end_it_or_begin_another_section() -> None:
    calls = compile_expression(call_text(schema_automaton({"type": "object", "properties": {"a": {"type": "string"}}})))
    assert calls.matches(written('{a:<|"|>" <|"> }{,<|"|>}'))
    for letter in (QUOTE, CALL, CALL_END, THOUGHT, THOUGHT_END):
        assert not calls.matches(written('{a:<|"|>x') + bytes([letter]) + written('y<|"|>}'))


def tool(name: str = "f", strict: bool = False, **parameters: Any) -> Function:
    whole = json.dumps({"type": "object", **parameters}) if parameters else None
    return Function(name=name, parameters=whole, at="tools[0].function", strict=strict)


NUMBER = {"n": {"type": "integer", "minimum": 1, "maximum": 99}}
READABLE = {
    "<|channel>": THOUGHT,
    "<channel|>": THOUGHT_END,
    "<|tool_call>": CALL,
    "<tool_call|>": CALL_END,
    QUOTE_TEXT: QUOTE,
}


def matches(turn: Turn, answer: Expression | None, text: str) -> bool:
    raw = text.encode()
    for name, letter in READABLE.items():
        raw = raw.replace(name.encode(), bytes([letter]))
    return compile_expression(turn.expression(answer)).matches(raw)


@pytest.mark.parametrize(
    ("opening", "good", "bad"),
    [
        ("answer", ["12"], ["", "<|channel>thought\n<channel|>12", "1<channel|>2"]),
        ("blank", ["12", "<|channel>thought\n<channel|>12"], ["<|channel>thought\nhm<channel|>12", "hm<channel|>12"]),
        ("thought", ["<|channel>thought\nhm <channel|>12", "<|channel><channel|>12"], ["12", "<|channel>12"]),
        ("open", ["<channel|>12", "hm 12<channel|>12"], ["12", "<|channel>x<channel|>12", "x<channel|>13"]),
    ],
)
def test_a_constraint_holds_after_the_thought(opening: Opening, good: list[str], bad: list[str]) -> None:
    turn = Turn(opening=opening)
    assert all(matches(turn, literal("12"), text) for text in good)
    assert not any(matches(turn, literal("12"), text) for text in bad)


def test_needed_calls_are_one_or_several_of_the_tools() -> None:
    functions = (tool(properties=NUMBER, required=["n"]), tool("g"))
    one, many = (Turn(calls=Calls(functions=functions, needed=True, several=several)) for several in (False, True))
    call, other = "<|tool_call>call:f{n:7}<tool_call|>", "<|tool_call>call:g{}<tool_call|>"
    assert matches(one, None, call) and matches(one, None, other) and matches(many, None, call + other + call)
    for text in ("", call + other, "x" + call, call + "x", call[:-5], "<|tool_call>call:f{}<tool_call|>"):
        assert not matches(one, None, text)
    assert not matches(many, None, other + "<|tool_call>call:h{}<tool_call|>")


def test_an_answer_may_be_a_call_instead_of_its_shape() -> None:
    turn = Turn(calls=Calls(functions=(tool("g"),), needed=False, several=True))
    assert matches(turn, literal("12"), "12") and matches(turn, literal("12"), "<|tool_call>call:g{}<tool_call|>")
    assert not matches(turn, literal("12"), "12<|tool_call>call:g{}<tool_call|>")


def test_free_text_holds_calls_of_strict_tools_to_their_schema() -> None:
    functions = (tool(strict=True, properties=NUMBER, required=["n"]), tool("g", properties=NUMBER))
    turn = Turn(calls=Calls(functions=functions, needed=False, several=True))
    call, other = "<|tool_call>call:f{n:7}<tool_call|>", '<|tool_call>call:g{n:<|"|>x<|"|>,<tool_call|>'
    for text in ("", "Any. {", "a" + call + "b" + other, "<|channel>hm<channel|>x<|channel>y" + call):
        assert matches(turn, None, text), text
    for text in ("<|tool_call>", "<|tool_call>call:f{n:100}<tool_call|>", "<|tool_call>call:h{}<tool_call|>"):
        assert not matches(turn, None, text), text
    once = Turn(calls=Calls(functions=functions, needed=False, several=False))
    assert matches(once, None, "a" + call + "b<|channel>c<channel|>") and not matches(once, None, call + other)


def test_a_schema_is_read_as_templates_show_it() -> None:
    parameters = {
        "properties": {
            "B": {"type": "STRING", "enum": ["x"], "nullable": True},
            "a": {"type": "integer", "const": 1},
            "type": {"const": {"type": "ANY", "nullable": True}},
        },
        "required": ["type", "B", "a"],
    }
    turn = Turn(calls=Calls(functions=(tool(**parameters),), needed=True, several=False))
    kept = '{nullable:true,type:<|"|>ANY<|"|>}'
    assert matches(turn, None, f'<|tool_call>call:f{{a:1,B:<|"|>x<|"|>,type:{kept}}}<tool_call|>')
    assert matches(turn, None, f"<|tool_call>call:f{{a:1,B:null,type:{kept}}}<tool_call|>")


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"not": {}}, r"tools\[0\]\.function\.parameters allows no arguments"),
        ({"properties": {"a": {"type": "wrong"}}}, r"tools\[0\]\.function\.parameters: #/properties/a/type is"),
        ({"properties": {"a": False}, "required": ["a"]}, "allows no arguments"),
    ],
)
def test_parameters_that_cannot_be_enforced_are_named(parameters: dict[str, Any], named: str) -> None:
    turn = Turn(calls=Calls(functions=(tool(**parameters),), needed=True, several=False))
    with pytest.raises(RequestError, match=named):
        turn.expression(None)


# ------------------------------------------------------------------------------------------------- where thoughts end

PIECES: list[bytes | None] = [None, b"a", b"b", b"c", None, None]
STOP, BEGIN, END = 0, 4, 5


def thoughtful(answer: str) -> TokenAutomaton:
    expression = Turn(opening="open").expression(parse_regex(answer))
    vocabulary = TokenBytes(PIECES, {BEGIN: THOUGHT, END: THOUGHT_END})
    return lift(compile_expression(expression), vocabulary).with_stops([STOP])


@given(seed=st.integers(0, 1000), length=st.integers(2, 4), spread=st.sampled_from([0.1, 3.0, 40.0]))
def test_a_thought_ends_where_the_network_ends_it_however_unlikely_the_answer_is(
    seed: int, length: int, spread: float
) -> None:
    """P(end at i) is the network's own; what follows is the posterior of the answer given that end."""
    logits = np.random.default_rng(seed).normal(size=(length, len(PIECES))) * spread
    logits[:, STOP] -= 10 * spread
    biased, argmax = CanvasConstraint(thoughtful("ab?"), 0, length, 9)(torch.tensor(logits, dtype=torch.float32))
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares[:, BEGIN] = 0
    shares /= shares.sum(1, keepdims=True)
    free = shares[:, [1, 2, 3]].sum(1)
    ends = [shares[i, END] * free[:i].prod() for i in range(length)] + [free.prod()]
    expected = np.zeros_like(shares)
    for end, share in enumerate(ends):
        for i in range(min(end, length)):
            expected[i, [1, 2, 3]] += share * shares[i, [1, 2, 3]] / free[i]
        if end < length:
            expected[end, END] += share
            expected[end + 1 :] += share * rest(shares[end + 1 :])
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(biased.double().softmax(-1).numpy(), expected, atol=1e-4)
    assert thoughtful("ab?").step(0, int(argmax[0])) >= 0


def rest(shares: np.ndarray) -> np.ndarray:
    """The probabilities of "ab?" and stops over some positions, of which there may be none."""
    length, found = len(shares), np.zeros_like(shares)
    both = [[1] + [STOP] * (length - 1), [1, 2] + [STOP] * (length - 2)] if length else []
    texts = [tokens[:length] for tokens in both if len(tokens) >= length]
    logs = np.array([np.log(shares[np.arange(length), tokens]).sum() for tokens in texts])  # products may underflow
    for tokens, weight in zip(texts, np.exp(logs - logs.max(initial=-np.inf)), strict=True):
        found[np.arange(length), tokens] += weight
    return found / found[:1].sum() if length else found


def test_a_thought_closes_in_time() -> None:
    logits = torch.zeros(5, len(PIECES))
    logits[:, END] = -50.0
    _, argmax = CanvasConstraint(thoughtful("ab"), 0, 5, 0)(logits)
    state, automaton = 0, thoughtful("ab")
    for token in argmax.tolist():
        state = automaton.step(state, token)
    assert END in argmax.tolist() and automaton.accepting[state]


def test_text_that_is_never_free_is_left_as_it_is() -> None:
    assert not len(lift(compile_expression(parse_regex(".*a")), TokenBytes(PIECES)).with_stops([STOP]).entries[0])


def test_a_token_that_writes_no_text_is_no_letter() -> None:
    """A byte that UTF-8 never has is in some vocabularies; it stands for no control token."""
    lifted = lift(
        compile_expression(Turn(opening="open").expression(literal("a"))), TokenBytes([b"a", b"\xf9", b"\xfa"])
    )
    assert lifted.class_of.tolist()[1:] == [-1, -1]
    assert lifted.distance[0] > 10
