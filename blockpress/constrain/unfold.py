"""The rules of a context-free grammar as an automaton over its terminals, nested down to a depth.

    expr: expr "+" term | term         start ----term----> done ----> end        recursion on the left is a loop
                                                          ^    |
                                                          +----+ "+" term
    term: NUMBER | "(" expr ")"        the inner expr stands in the automaton once more, at one depth less

Recursion on the left (`a: a x`) and at the end (`a: x a`) is regular and becomes a loop. Only a rule that goes on after
a use of itself within itself nests: its automaton stands in its own, `depth` times.

Invariant: every sequence of terminals that is allowed is one that the rules derive.
Run it:  python -m pytest tests/constrain/test_grammar.py
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from itertools import product
from typing import final

from blockpress.constrain.automaton import (
    EMPTY_TEXT,
    NOTHING,
    Bytes,
    Expression,
    Graph,
    _NothingMatches,
    optional,
)
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.nondeterministic import Work
from blockpress.errors import RequestError

Symbol = int | str
"""A terminal by its number, which is below 256, or a rule by its name."""
Rules = Mapping[str, list[tuple[Symbol, ...]]]
MAX_VARIANTS = 20_000
"""Most alternatives of all rules together, those with parts left out that may be empty counted."""


def productive(rules: Rules, *, terminals: bool = True) -> set[str]:
    """The rules that can end; without `terminals` those that can without any, so that they may be empty."""
    known: set[str] = set()
    while True:
        more = {
            name
            for name, options in rules.items()
            if any(all(terminals if isinstance(part, int) else part in known for part in option) for option in options)
        }
        if more == known:
            return known
        known = more


@final
class Unfolding:
    """The automata of a grammar's rules by depth. nests: whether some rule nests, so that depth matters."""

    def __init__(self, rules: Rules, work: Work) -> None:
        self._empty, self._work = productive(rules, terminals=False), work
        self._component = _components(
            {name: _names(part for option in rules[name] for part in option) for name in rules}
        )
        self._rules = self._without_empty(rules)
        self._left = _components(
            {name: _names(option[0] for option in options) & self._peers(name) for name, options in self._rules.items()}
        )
        self._known: dict[tuple[str, int], Expression] = {}
        self._open: set[tuple[str, int]] = set()
        self.nests = False

    def automaton(self, start: str, depth: int) -> Expression:
        """Everything that a rule derives, nested down to a depth.

        Raises:
            RequestError: a rule needs too many states; it is named.
        """
        inner = self._language(start, depth)
        return optional(inner) if start in self._empty else inner

    def _without_empty(self, rules: Rules) -> dict[str, list[tuple[Symbol, ...]]]:
        """The same, but for the empty text: parts that may be empty are left out in further alternatives.

        In alternatives without recursion they stay, and are optional where they are used.
        """
        result: dict[str, dict[tuple[Symbol, ...], None]] = {}
        count = 0
        for name, options in rules.items():
            found = result.setdefault(name, {})
            for option in options:
                recursive = any(part in self._peers(name) for part in option)
                choices = [((part,), ()) if recursive and part in self._empty else ((part,),) for part in option]
                for chosen in product(*choices):
                    count += 1
                    if count > MAX_VARIANTS:
                        raise RequestError(
                            f"grammar rule {rule_name(name)} has too many parts that may be empty",
                            hint="let fewer be empty",
                        )
                    variant = tuple(part for parts in chosen for part in parts)
                    if variant and variant != (name,):
                        found[variant] = None
        return {name: [*found] for name, found in result.items()}

    def _peers(self, name: str) -> frozenset[str]:
        """The rules that it uses and that use it, itself among them if it is recursive."""
        return self._component[name]

    def _language(self, name: str, depth: int) -> Expression:
        """What a rule derives; the empty text may be left out."""
        if depth < 0:
            self.nests = True
            return NOTHING
        key = name, depth
        if key not in self._known:
            self._open.add(key)
            try:
                self._known[key] = compile_expression(self._graph(name, depth), self._work)
            except _NothingMatches:
                self._known[key] = NOTHING
            except RequestError as error:
                if error.message.startswith("grammar"):
                    raise
                raise RequestError(f"grammar rule {rule_name(name)}: {error.message}", hint=error.hint) from error
            self._open.discard(key)
        return self._known[key]

    def _graph(self, name: str, depth: int) -> Graph:
        """The ways through a rule, and through those that it ends with and that may end with it.

        Nodes: ("start", rule); ("done", rule, part): a part at the left of the rule, found complete; and within.
        """
        numbers: dict[Hashable, int] = {("start", name): 0, "end": 1}
        edges: list[tuple[int, Expression, int]] = []

        def edge(source: Hashable, part: Expression, target: Hashable) -> None:
            ends = [numbers.setdefault(node, len(numbers)) for node in (source, target)]
            edges.append((ends[0], part, ends[1]))

        roots = [name]
        for root in roots:
            left = self._left[root] | {root}
            loops = {option[0] for part in left for option in self._rules[part] if option[0] in left}
            if root in loops:
                edge(("done", root, root), EMPTY_TEXT, "end")
            for part in sorted(left):
                target: Hashable = "end" if part == root and root not in loops else ("done", root, part)
                for place, option in enumerate(self._rules[part]):
                    starts = option[0] in left
                    source: Hashable = ("done", root, option[0]) if starts else ("start", root)
                    rest = option[starts:]
                    last = rest[-1] if rest else None
                    if last in self._peers(name) and (target == "end" or last == part == root):
                        # What the last part derives ends where the whole does: it begins there, and nothing nests.
                        following = [*rest[:-1]]
                        after: Hashable = ("start", last)
                        if last not in roots:
                            roots.append(last)
                    else:
                        following, after = [*rest], target
                    nodes = [source, *((root, part, place, i) for i in range(1, len(following))), after]
                    if not following:
                        edge(source, EMPTY_TEXT, after)
                    for symbol, here, there in zip(following, nodes, nodes[1:], strict=False):
                        edge(here, self._part(symbol, part, depth), there)
        return Graph(tuple(edges))

    def _part(self, symbol: Symbol, rule: str, depth: int) -> Expression:
        """A part of a rule: a terminal, or what another rule derives, at one depth less if it is being written out."""
        if isinstance(symbol, int):
            return Bytes(symbol, symbol)
        if symbol not in self._peers(rule):
            inner = self._language(symbol, depth)
            return optional(inner) if symbol in self._empty else inner
        return self._language(symbol, depth - ((symbol, depth) in self._open))


def rule_name(name: str) -> str:
    """The rule's own name, or of the one from which lark made it: `__start_plus_0`."""
    return re.sub(r"^__(.+?)_(?:plus|star|repeat|opt).*$", r"\1", name)


def _names(parts: Iterable[Symbol]) -> set[str]:
    return {part for part in parts if isinstance(part, str)}


def _components(graph: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    """For each node those that it leads to and that lead to it; nothing for one that is on no circle."""
    reached: dict[str, set[str]] = {}
    for name in graph:
        found, stack = set[str](), [*graph[name]]
        while stack:
            other = stack.pop()
            if other not in found:
                found.add(other)
                stack += graph[other]
        reached[name] = found
    return {name: frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
