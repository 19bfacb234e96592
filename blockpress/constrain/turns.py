"""A turn of a chat as an expression: thoughts, calls of tools and free text around what a constraint holds.

    thought first     <|channel> any text <channel|> answer
    calls             <|tool_call> call:f{city: <|"|> any text <|"|> } <tool_call|>
    calls if any      any text, until a call begins, and after it again

Control tokens are letters of the alphabet: bytes that UTF-8 never uses. So whatever expressions can do (union,
repetition, intersection) works for them too, and no text can look like one.

Invariant: an expression here matches exactly the turns that `chat.parser` reads as such thoughts, calls and texts.
Run it:  python -m pytest tests/constrain/test_turns.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from blockpress.constrain.automaton import (
    EMPTY_TEXT,
    Bytes,
    Concat,
    Expression,
    Graph,
    Repeat,
    Union,
    _NothingMatches,
    literal,
)
from blockpress.constrain.call_text import QUOTE, call_text
from blockpress.constrain.schema import schema_automaton
from blockpress.constrain.tokens import FIRST_LETTER
from blockpress.errors import RequestError

THOUGHT, THOUGHT_END, CALL, CALL_END = (FIRST_LETTER + number for number in range(1, 5))
LETTERS = {"thought": THOUGHT, "thought_end": THOUGHT_END, "call": CALL, "call_end": CALL_END, "quote": QUOTE}
"""The letters of a chat's control tokens, by their names in `chat.SpecialTokens`."""

ANY_BYTE = Bytes(0, FIRST_LETTER - 1)
ANY_TEXT = Repeat(ANY_BYTE, 0, None)

Opening = Literal["answer", "blank", "thought", "open"]
"""What comes before an answer. blank: it may be a thought without content, as models write who are not asked to think.
thought: a thought, which may be of any length. open: the rest of a thought that the prompt has begun."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A tool that may be called. parameters: its JSON schema as JSON text, None without any. at: its place in the
    request, for errors. strict: whether its arguments follow the schema even where a call is the model's choice."""

    name: str
    parameters: str | None
    at: str
    strict: bool


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The calls that a turn may hold. needed: it is made of them. several: there may be more than one."""

    functions: tuple[Function, ...]
    needed: bool
    several: bool


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a turn may hold beside a constrained answer."""

    opening: Opening = "answer"
    calls: Calls | None = None

    def expression(self, answer: Expression | None) -> Expression:
        """The turns of this kind; `answer`: what a text without calls must be, None: any text.

        Raises:
            RequestError: the parameters of a tool cannot be enforced; the message says where. _NothingMatches: the
                answer allows no text.
        """
        if self.calls is None:
            assert answer is not None, "without a constraint a turn needs no expression"
            return self._after_opening(answer)
        calls = self.calls
        if answer is None and not calls.needed:
            return self._free(calls)
        wanted = _repeated(Union(tuple(_call(each) for each in calls.functions)), several=calls.several)
        return self._after_opening(wanted if calls.needed or answer is None else Union((wanted, answer)))

    def _after_opening(self, answer: Expression) -> Expression:
        begins, ends = _letter(THOUGHT), _letter(THOUGHT_END)
        blank = Union((Concat((begins, literal("thought\n"), ends)), EMPTY_TEXT))
        before: dict[Opening, Expression] = {
            "answer": EMPTY_TEXT,
            "blank": blank,
            "thought": Concat((begins, ANY_TEXT, ends)),
            "open": Concat((ANY_TEXT, ends)),
        }
        return Concat((before[self.opening], answer))

    def _free(self, calls: Calls) -> Expression:
        """Any text and thoughts, and calls that follow their schema where it is strict."""
        text, thought, called, text_after, thought_after = range(2, 7)
        edges: list[tuple[int, Expression, int]] = [(0, EMPTY_TEXT, thought if self.opening == "open" else text)]
        for here, inside in ((text, thought), (text_after, thought_after)):
            edges += [(here, ANY_BYTE, here), (here, _letter(THOUGHT), inside), (here, EMPTY_TEXT, 1)]
            edges += [(inside, ANY_BYTE, inside), (inside, _letter(THOUGHT_END), here)]
        any_arguments = Concat((literal("{"), Repeat(Union((ANY_BYTE, _letter(QUOTE))), 0, None)))
        edges += [(text, _letter(CALL), called), (thought, _letter(CALL), called)]  # a call ends the thought around it
        for each in calls.functions:
            arguments = _arguments(each) if each.strict else any_arguments
            edges.append((called, _written(each, arguments), text if calls.several else text_after))
        return Graph(tuple(edges))


def _letter(letter: int) -> Expression:
    return Bytes(letter, letter)


def _call(function: Function) -> Expression:
    return Concat((_letter(CALL), _written(function, _arguments(function))))


def _written(function: Function, arguments: Expression) -> Expression:
    return Concat((literal(f"call:{function.name}"), arguments, _letter(CALL_END)))


def _repeated(part: Expression, *, several: bool) -> Expression:
    """The part at least once; it stands in the graph only once."""
    again: tuple[tuple[int, Expression, int], ...] = ((3, EMPTY_TEXT, 2),) if several else ()
    return Graph(((0, EMPTY_TEXT, 2), (2, part, 3), (3, EMPTY_TEXT, 1), *again))


def _arguments(function: Function) -> Expression:
    if function.parameters is None:
        return literal("{}")
    try:
        return call_text(schema_automaton(_as_rendered(json.loads(function.parameters))))
    except RequestError as error:
        message = f"{function.at}.parameters: {error.message.removeprefix('schema ')}"
        raise RequestError(message, hint=error.hint) from error
    except _NothingMatches:
        raise RequestError(
            f"{function.at}.parameters allows no arguments", hint="correct it so that something matches"
        ) from None


_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples")


def _as_rendered(schema: Any) -> Any:
    """A tool's schema as templates show it: properties in the order of their names, `nullable` and types in capitals
    as JSON Schema has them. The order of any other mapping means nothing."""
    if isinstance(schema, list):
        return [_as_rendered(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for key, value in _in_order(schema).items():
        if key in _NAMED and isinstance(value, Mapping):
            found[key] = {name: _as_rendered(part) for name, part in value.items()}
        else:
            found[key] = value if key in _VALUES else _as_rendered(value)
    kind = found.get("type")
    if isinstance(kind, str):
        found["type"] = kind = kind.lower()
    if isinstance(found.get("nullable"), bool) and found.pop("nullable") and isinstance(kind, str):
        found["type"] = [kind, "null"]
        if isinstance(found.get("enum"), list):
            found["enum"] = [*found["enum"], None]
    return found


def _in_order(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_order(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _in_order(value[key]) for key in sorted(value, key=str.lower)}
    return value
