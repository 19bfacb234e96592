"""Context-free grammars in Lark's syntax, as expressions of automata.

    grammar --lark--> rules without + * ? ~, terminals --unfold--> automaton over terminals --terminals--> over bytes

Rules that nest do so down to a depth, the largest that keeps the automaton small. A terminal takes what `re.match`
takes, as in lark's own parser (Earley with its dynamic lexer), so this parser accepts every text that is allowed.

Invariant: what lark reads is enforced, has no bearing on what is allowed (priorities, names, the tree), or is refused.
Run it:  python -m pytest tests/constrain/test_grammar.py
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from blockpress.constrain.automaton import (
    ANY_BYTES,
    DEAD,
    EMPTY_TEXT,
    NOTHING,
    Automaton,
    Concat,
    Expression,
    Graph,
    Union,
    _NothingMatches,
    difference,
    intersection,
    rerooted,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.conditions import ahead, first_match
from blockpress.constrain.nondeterministic import Work
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.unfold import Rules, Unfolding, productive, rule_name
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from lark import Lark
    from lark.lexer import TerminalDef

MAX_DEPTH = 8
"""How often a rule may stand inside itself at most."""
MAX_TERMINALS = 256
MAX_WORK = 400_000
"""Steps of making an automaton from which on half the depth is tried."""
MAX_SIZE = 6_000
"""States of terminals, wherever they stand, from which on no further depth is tried."""


def grammar_automaton(text: object) -> Automaton:
    """The texts that a grammar in Lark's syntax derives from its rule `start`, nested down to a depth.

    Raises:
        RequestError: the text is no grammar, has something that cannot be enforced, or is too large; the message says
            where. _NothingMatches: it allows no text.
    """
    grammar = _Grammar.read(text)
    unfolding = Unfolding(grammar.rules, Work())
    shapes: list[Expression] = []
    for depth in range(MAX_DEPTH + 1):
        try:
            shape = unfolding.automaton("start", depth)
            if shapes and grammar.size(compile_expression(shape)) > MAX_SIZE:
                break
        except RequestError:
            if not shapes:
                raise
            break
        shapes.append(shape)
        if not unfolding.nests:
            break
    while True:
        try:
            return compile_expression(grammar.expression(compile_expression(shapes[-1])), Work(MAX_WORK))
        except RequestError as error:
            del shapes[len(shapes) // 2 :]  # half as deep, so that a few attempts are enough
            if not shapes:
                raise RequestError(f"grammar rule start: {error.message}", hint=error.hint) from error


@dataclass(frozen=True)
class _Grammar:
    """Rules over numbered terminals, and the texts of these; ignored ones may stand between any two others.

    But for comments: an answer has none, as in each of them, and so between any two terminals, any text might stand.

    words: by keyword, a terminal such as "if", and another that also matches it, such as NAME, what of this one may
    follow the keyword. Where both may stand, the keyword ends with the word, and the word is not the keyword.
    """

    rules: Rules
    terminals: list[Expression]
    ignored: list[Expression]
    words: dict[tuple[int, int], Expression]

    @classmethod
    def read(cls, text: object) -> _Grammar:
        lark = _parser(text)
        numbers = {terminal.name: number for number, terminal in enumerate(lark.terminals)}
        if len(numbers) > MAX_TERMINALS:
            raise RequestError(
                f"grammar has {len(numbers)} terminals",
                hint=f"at most {MAX_TERMINALS}; join some in regular expressions",
            )
        rules: dict[str, list[tuple[int | str, ...]]] = {}
        for rule in lark.rules:
            for symbol in rule.expansion:
                if symbol.is_term and symbol.name not in numbers:
                    raise RequestError(
                        f"grammar has %declare {symbol.name}, which has no text", hint="define the terminal"
                    )
            parts = tuple(numbers[part.name] if part.is_term else str(part.name) for part in rule.expansion)
            rules.setdefault(str(rule.origin.name), []).append(parts)
        endless = rules.keys() - productive(rules)
        if endless:
            name = min(endless)
            for _ in endless:  # from a rule that needs another that cannot end to one that needs itself
                name = next(str(part) for part in rules[name][0] if part in endless)
            raise RequestError(
                f"grammar rule {rule_name(name)} can never end", hint="give it an alternative without itself"
            )
        ranked = sorted(lark.terminals, key=_rank)
        blanks = [terminal for terminal in ranked if terminal.name in lark.ignore_tokens]
        texts = {}
        for terminal in lark.terminals:
            before = blanks[: sum(_rank(blank) < _rank(terminal) for blank in blanks)]
            texts[terminal.name] = _terminal(terminal, [] if terminal in blanks else before)
        ignored = [texts[blank.name] for blank in blanks if not _is_comment(blank)]
        return cls(rules, [*texts.values()], ignored, dict(_words(lark.terminals)))

    def size(self, shape: Automaton) -> int:
        """How many states of terminals the expression of a shape has."""
        source, label = np.nonzero(shape.table != DEAD)
        pairs = {*zip(label.tolist(), shape.table[source, label].tolist(), strict=True)}
        blank = sum(map(_size, self.ignored))
        return sum(_size(self.terminals[label]) for label, _ in pairs) + len(shape) * blank

    def expression(self, shape: Automaton) -> Expression:
        """The texts of a shape, an automaton over the numbers of terminals.

        A terminal stands once for every state that it leads to, behind a node of its own.
        """
        edges: list[tuple[int, Expression, int]] = []
        node = [0, *range(2, len(shape) + 1)]
        inside: dict[tuple[int, int, frozenset[int]], int] = {}
        following = len(shape) + 1
        for state, row in enumerate(shape.table):
            labels = np.nonzero(row != DEAD)[0].tolist()
            for label in labels:
                others = frozenset(each for each in labels if {(each, label), (label, each)} & self.words.keys())
                key = label, int(row[label]), others
                if key not in inside:
                    inside[key], following = following, following + 1
                    edges.append((inside[key], self._among(label, others), node[key[1]]))
                edges.append((node[state], EMPTY_TEXT, inside[key]))
            for blank in self.ignored:
                edges += [(node[state], EMPTY_TEXT, following), (following, blank, node[state])]
                following += 1
            if shape.accepting[state]:
                edges.append((node[state], EMPTY_TEXT, 1))
        return Graph(tuple(edges))

    def _among(self, label: int, others: frozenset[int]) -> Expression:
        """A terminal where the others may stand as well."""
        words = [self.words[label, each] for each in sorted(others) if (label, each) in self.words]
        keywords = [
            Concat((self.terminals[each], ahead(self.words[each, label], False)))
            for each in sorted(others)
            if (each, label) in self.words
        ]
        before = [ahead(Union(tuple(keywords)), False)] if keywords else []
        return Concat((*before, self.terminals[label], *(ahead(word, False) for word in words)))


def _words(terminals: Collection[TerminalDef]) -> Iterator[tuple[tuple[int, int], Expression]]:
    keywords = [(i, each.pattern.value) for i, each in enumerate(terminals) if each.pattern.type == "str"]
    keywords = [(number, text) for number, text in keywords if re.fullmatch(r"\w+", text)]
    for other, terminal in enumerate(terminals):
        if terminal.pattern.type != "re" or not keywords:
            continue
        try:
            word = compile_expression(_pattern(terminal))
        except _NothingMatches:  # it never matches, or only before something
            continue
        for number, text in keywords:
            state = word.run(text)
            if state != DEAD and word.accepting[state]:
                try:
                    rest: Expression = difference(rerooted(word, state), compile_expression(EMPTY_TEXT))
                except _NothingMatches:
                    rest = NOTHING
                yield (number, other), rest


def _size(expression: Expression) -> int:
    """How many places an expression of a terminal has."""
    match expression:
        case Graph(edges):
            return len({node for source, _, target in edges for node in (source, target)})
        case Concat(parts) | Union(parts):
            return sum(map(_size, parts))
    return 1


def _parser(text: object) -> Lark:
    """Lark's parser of a grammar, which checks it. Raises RequestError: it is none."""
    from lark import Lark

    if not isinstance(text, str):
        raise RequestError(f"grammar is {text!r:.80}", hint="grammar must be a text in Lark's syntax")
    if re.search(r"^\s*%import\s+\.", text, re.MULTILINE):
        raise RequestError("grammar imports from a file", hint="import from lark's own grammars, or copy the rules")
    try:
        return Lark(text, parser="earley", lexer="dynamic")
    except Exception as error:  # lark's own, and those of `re`, of files and of Python that a bad grammar leads to
        what = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"grammar is not one that lark reads: {what:.400}", hint="correct it") from error


def _rank(terminal: TerminalDef) -> tuple[int, int, int, str]:
    """Lark's order of terminals: of those that match, its lexers take the first."""
    pattern = terminal.pattern
    return -terminal.priority, -pattern.max_width, -len(pattern.value), terminal.name


def _terminal(terminal: TerminalDef, blanks: Sequence[TerminalDef]) -> Expression:
    """What a terminal takes, where none of `blanks` matches: `-` is no minus where a comment begins with `--`."""
    own = _pattern(terminal)
    conditions: list[Expression] = []
    for blank in map(_pattern, blanks):
        try:
            intersection(*(compile_expression(Concat((each, ANY_BYTES))) for each in (own, blank)))
            conditions.append(ahead(blank, False))
        except _NothingMatches:
            pass
    try:
        return Concat((*conditions, first_match(own)))
    except RequestError as error:
        raise RequestError(f"grammar terminal {terminal.name}: {error.message}", hint=error.hint) from error


def _is_comment(terminal: TerminalDef) -> bool:
    """Whether somewhere in it more than half of all bytes may stand, as in a comment."""
    return bool(((compile_expression(_pattern(terminal)).table != DEAD).sum(axis=1) > 128).any())


def _pattern(terminal: TerminalDef) -> Expression:
    try:
        return parse_regex(terminal.pattern.to_regexp(), ordered=True)
    except RequestError as error:
        raise RequestError(f"grammar terminal {terminal.name}: {error.message}", hint=error.hint) from error
