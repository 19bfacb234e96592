"""The constraints of calls: what may be given, compiled once and kept.

Invariant: a constraint that cannot be enforced is refused by the name of its argument, before any forward.
Run it:  python -m pytest tests/lm/test_constraints.py
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

from blockpress.chat import SpecialTokens
from blockpress.errors import RequestError, TextError
from blockpress.lm.arguments import ConstraintOptions

if TYPE_CHECKING:
    from blockpress.constrain import Constraint
    from blockpress.constrain.automaton import Automaton, Expression
    from blockpress.constrain.tokens import TokenBytes
    from blockpress.constrain.turns import Turn
    from blockpress.text import Tokenizer

KEPT = 64
"""Compiled constraints that a model keeps."""


@final
class ConstraintCache:
    """The compiled constraints of one model, by what they enforce.

    Without a lock, which a fork might find locked for ever: two threads may compile the same constraint.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled: OrderedDict[Hashable, Constraint] = OrderedDict()

    def get(
        self,
        stop_ids: Collection[int],
        options: ConstraintOptions,
        turn: Turn | None = None,
    ) -> Constraint | None:
        """The constraint of a call; None if none is given. `turn`: what is around the answer in a chat.

        Raises:
            TypeError: an option has another name. RequestError: more than one is given, one is malformed, cannot be
                enforced, or not beside what else is asked for; the message says which.
        """
        name, checked = _only(options)
        calls = None if turn is None else turn.calls
        if name is None and calls is None:
            return None
        if name is not None and calls is not None and calls.needed:
            raise RequestError(
                f"{name} is given, and tool_choice says that the answer is a call",
                hint=f"leave {name} out, or let tool_choice be 'auto' or 'none'",
            )
        try:
            key = (frozenset(stop_ids), name, _key(name, checked), turn)
            compiled = self._compiled.pop(key, None) or self._compile(stop_ids, name, checked, turn)
        except RecursionError:
            raise RequestError(f"{name} nests too deeply", hint="nest fewer levels") from None
        self._compiled[key] = compiled
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return compiled

    def hole(self, options: ConstraintOptions) -> tuple[Automaton, str] | None:
        """What the text of a hole must be, and its name; None if no constraint is given. Raises as `get`."""
        from blockpress.constrain.automaton import _NothingMatches
        from blockpress.constrain.compiler import compile_expression

        name, checked = _only(options)
        if name is None:
            return None
        about = f"{name} {checked!r:.200}"
        try:
            return compile_expression(_expression(name, checked)), about
        except _NothingMatches:
            raise RequestError(f"{about} allows no text", hint="correct it so that something matches") from None
        except RecursionError:
            raise RequestError(f"{name} nests too deeply", hint="nest fewer levels") from None

    def __reduce__(self) -> tuple[object, ...]:
        # A copy of a model compiles its own: what is compiled is quick to make and long to pickle.
        return ConstraintCache, (self._tokenizer, self._vocab_size)

    def _compile(self, stop_ids: Collection[int], name: str | None, value: Any, turn: Turn | None) -> Constraint:
        from blockpress.constrain import Constraint
        from blockpress.constrain.automaton import _NothingMatches

        about = f"{name} {value!r:.200}" if name else "the call that tool_choice asks for"
        try:
            expression = None if name is None else _expression(name, value)
            if turn is not None:
                expression = turn.expression(expression)
            assert expression is not None, "there is a constraint or there are calls"
            return Constraint.of(expression, self.vocabulary, stop_ids, about)
        except _NothingMatches:
            raise RequestError(f"{about} allows no text", hint="correct it so that something matches") from None

    @cached_property
    def vocabulary(self) -> TokenBytes:
        from blockpress.constrain.tokens import TokenBytes
        from blockpress.constrain.turns import LETTERS

        if self._tokenizer is None:
            raise RequestError("a constraint needs a tokenizer; this model has none", hint="add tokenizer.json")
        try:
            pieces = self._tokenizer.token_bytes()[: self._vocab_size]
        except TextError as error:
            raise RequestError(f"a constraint cannot be enforced: {error.message}", hint=error.hint) from error
        controls = SpecialTokens.of(self._tokenizer)
        ids = {getattr(controls, control): letter for control, letter in LETTERS.items()}
        letters = {token: letter for token, letter in ids.items() if token is not None and token < self._vocab_size}
        return TokenBytes([*pieces, *[None] * (self._vocab_size - len(pieces))], letters)


def _only(options: ConstraintOptions) -> tuple[str | None, Any]:
    """The name and value of the one constraint that is given; (None, None): none is."""
    unknown = options.keys() - ConstraintOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    given = [(name, value) for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(name for name, _ in given)} are given", hint="give one constraint")
    name, value = given[0] if given else (None, None)
    return name, check_choice(value) if name == "choice" else value


def _expression(name: str, value: Any) -> Expression:
    """The texts that a constraint allows."""
    from blockpress.constrain.automaton import Union, literal
    from blockpress.constrain.compiler import compile_expression
    from blockpress.constrain.conditions import looks
    from blockpress.constrain.grammar import grammar_automaton
    from blockpress.constrain.regex import parse_regex
    from blockpress.constrain.schema import schema_automaton

    if name == "choice":
        return Union(tuple(literal(option) for option in value))
    if name == "regex":
        expression = parse_regex(value)  # its conditions are about the answer, not what is around it
        return compile_expression(expression) if any(looks(expression)) else expression
    return grammar_automaton(value) if name == "grammar" else schema_automaton(value)


def _key(name: str | None, value: Any) -> Hashable:
    if name != "schema":
        return value if isinstance(value, Hashable) else repr(value)
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"schema is {value!r:.80}: {error}", hint="give what JSON can represent") from None


def check_choice(choice: object) -> tuple[str, ...]:
    """The texts of which the answer must be one. Raises RequestError: none, twice the same, or something else."""
    if isinstance(choice, str) or not isinstance(choice, Sequence) or not all(isinstance(each, str) for each in choice):
        raise RequestError(f"choice is {choice!r:.200}", hint="choice must be a list of texts")
    options = tuple(choice)
    if not options:
        raise RequestError("choice is empty", hint="give at least one text")
    twice = next((each for number, each in enumerate(options) if each in options[:number]), None)
    if twice is not None:
        raise RequestError(f"choice has {twice!r:.80} twice", hint="give each text once")
    if "" in options:
        raise RequestError("choice has an empty text", hint="give texts of at least one character")
    return options
