"""The sandbox that chat templates run in: what one rendering may use, and how the published template stays linear.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from Python's objects and files; it has
no limit on time and memory. Those are kept here: processor seconds, the length of every text that is made, and what
lists hold together. No number of steps is counted: the published template looks ahead from each message through all
that follow, which is honest work.

That look-ahead is quadratic only because templates have no `break`: loops go on to their end after `found` is set. Such
a loop is ended here, at the first turn that can do nothing, and every turn after it neither:

    {% for j in range(...) %}{% if not next.found %} ... {% endif %}{% endfor %}      else: break
    {% for k in range(...) %}{% if scan.stopped %}{% elif ... %} ... {% endfor %}     stopped: break

Invariant: a rewritten template writes what the original writes. A template that takes too much of anything ends in a
SecurityError; a single operation that a limit does not foresee can only be of values that are themselves in bounds.

Run it:  python -m pytest tests/chat/test_template.py
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_OUTPUT = 16 * 2**20
"""Most characters of a rendering, and of each text in it."""

MAX_SECONDS = 30.0
"""Most processor seconds of a rendering. A talk of 5,000 messages takes about one by the published template."""

_LARGE, _MOST_LARGE = 2**20, 512 * 2**20
_MOST_NUMBER = 2**20
_MOST_BITS = 65_536

# Filters that turn their value into text, which for nested lists is longer than they are in memory.
_TEXTUAL = frozenset(
    {
        "capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower", "pprint", "replace",
        "string", "striptags", "sum", "title", "tojson", "trim", "truncate", "upper", "urlencode", "urlize",
        "wordcount", "wordwrap", "xmlattr",
    }
)  # fmt: skip
_STEADY = (
    nodes.And,
    nodes.Compare,
    nodes.Const,
    nodes.Getattr,
    nodes.Name,
    nodes.Not,
    nodes.Operand,
    nodes.Or,
    nodes.Test,
)
_Scope = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


class Budget:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.begin = time.thread_time()
        self.ticks = self.large = self.kept = 0

    def tick(self) -> None:
        """Called at every turn of a loop, every call and every filter."""
        self.ticks += 1
        if self.ticks & 15 == 0 and time.thread_time() - self.begin > MAX_SECONDS:
            raise SecurityError(f"more than {MAX_SECONDS:g} seconds of work")

    def made(self, size: int) -> None:
        """A text or list of that size is about to be made."""
        if size > MAX_OUTPUT:
            raise SecurityError(f"a text or list of more than {MAX_OUTPUT} parts")
        self.large += size if size >= _LARGE else 0
        if self.large > _MOST_LARGE:
            raise SecurityError(f"large texts of more than {_MOST_LARGE} characters together")

    def appended(self, value: Any) -> None:
        """The value becomes part of a list."""
        self.kept += _weigh(value)
        if self.kept > 4 * MAX_OUTPUT:
            raise SecurityError(f"lists of more than {4 * MAX_OUTPUT} characters together")


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def fresh_budget() -> Iterator[Budget]:
    """Limits for what runs inside, in this thread."""
    token = _budget.set(Budget())
    try:
        yield _budget.get()
    finally:
        _budget.reset(token)


class Sandbox(ImmutableSandboxedEnvironment):
    """Keeps to a `Budget`, and raises where the plain sandbox would return an empty text."""

    # Naming an operator here also keeps Jinja from folding it on constants while it compiles.
    intercepted_binops = frozenset({"*", "+", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(finalize=_printable, **options)
        self.filters = {name: _limited(name, filter) for name, filter in {**self.filters, **filters}.items()}

    @property
    def tick(self) -> None:
        """Reading it counts: the statement that `_Rewriter` puts into loops compiles to nothing else."""
        return _budget.get().tick()

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What blocks, macros and captures are made of."""
        texts = list(parts)
        _budget.get().made(sum(map(len, texts)))
        return "".join(texts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = _Rewriter().visit(super()._parse(source, name, filename))
        template.set_environment(self)
        return template

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "*" and (_is_sized(left) or _is_sized(right)):
            budget.made(_size(left) * _size(right))
        elif operator == "+" and _is_sized(left) and _is_sized(right):
            budget.made(len(left) + len(right))
            if not isinstance(left, str):
                budget.appended(min(left, right, key=len))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * right
            if bits > _MOST_BITS:
                raise SecurityError(f"a number of more than {_MOST_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **names: Any) -> Any:
        """A macro, a function or a method of a text: `''.join`, `''.replace`, ..."""
        _budget.get().tick()
        method = getattr(function, "__wrapped__", function)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            if method.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])  # a text or an iterator, which has no length that could be checked
            _check(method.__name__, owner, args, names)
        return super().call(context, function, *args, **names)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Their results have no length that is known beforehand, and no prompt needs them.
        text_only = ("expandtabs", "translate", "maketrans", "encode")  # the methods of bytes have no limits
        unbounded = attr in text_only if isinstance(obj, str) else isinstance(obj, int) and attr == "to_bytes"
        return not unbounded and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.")


class _Rewriter(NodeTransformer):
    """Puts a tick into what repeats, ends loops with nothing left to do, and makes `~` a filter, which has limits."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        pieces = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(pieces, "join", [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        _end_when_idle(node)
        return _ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _ticking(node)

    visit_CallBlock = visit_Block = visit_Macro  # noqa: N815


def _ticking(node: Any) -> nodes.Node:
    tick = nodes.ExprStmt(nodes.EnvironmentAttribute("tick", lineno=node.lineno), lineno=node.lineno)
    node.body.insert(0, tick)
    return node


def _end_when_idle(node: nodes.For) -> None:
    """Break out of a loop over a range at the first turn at which a test that no turn changes says: nothing to do."""
    statements = [statement for statement in node.body if not _is_blank(statement)]
    if len(statements) != 1 or not isinstance(branch := statements[0], nodes.If) or not _is_plain(node.iter):
        return
    first = branch.test
    while isinstance(first, nodes.And):
        first = first.left
    changing = {name.name for name in node.target.find_all(nodes.Name)} | {"loop"}
    if isinstance(node.target, nodes.Name):
        changing.add(node.target.name)
    parts = [first, *first.find_all(nodes.Node)]
    if not all(isinstance(part, _STEADY) for part in parts):
        return
    if changing & {part.name for part in parts if isinstance(part, nodes.Name)}:
        return
    stop: nodes.Node = nodes.Break(lineno=node.lineno)
    if not branch.elif_ and all(map(_is_blank, branch.else_)):
        node.body = [nodes.If(first, [branch], [], [stop], lineno=branch.lineno)]
    elif first is branch.test and all(map(_is_blank, branch.body)):
        branch.body = [stop]


def _is_plain(over: nodes.Node) -> bool:
    """Whether it is a range or a part of a list, in which nothing happens when the next one is taken."""
    if isinstance(over, nodes.Call) and isinstance(over.node, nodes.Name):
        return over.node.name == "range"
    return isinstance(over, nodes.Getitem) and isinstance(over.arg, nodes.Slice)


def _is_blank(statement: nodes.Node) -> bool:
    return isinstance(statement, nodes.Output) and all(
        isinstance(part, nodes.TemplateData) and not part.data for part in statement.nodes
    )


def _weigh(value: Any) -> int:
    """Characters and entries of a value, of what it holds over and over as often as it is held."""
    stack, characters, entries = [value], 0, 0
    while stack:
        current = stack.pop()
        if isinstance(current, str):
            characters += len(current)
        elif isinstance(current, list | tuple | dict):
            entries += 1 + len(current)
            if entries > _MOST_NUMBER:
                raise SecurityError(f"a value of more than {_MOST_NUMBER} entries")
            stack.extend(current if not isinstance(current, dict) else [*current, *current.values()])
    if characters > MAX_OUTPUT:
        raise SecurityError(f"a value of more than {MAX_OUTPUT} characters")
    return characters + entries


def _printable(value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        _weigh(value)
    return value


def _limited(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, that refuses to make what is too large."""
    passed = int(hasattr(filter, "jinja_pass_arg"))  # a context of Jinja's goes first

    @functools.wraps(filter)
    def limited(*given: Any, **names: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        hidden, (value, *rest) = given[:passed], given[passed:]
        if name == "join":
            value = list(value)
        if name in _TEXTUAL:
            _weigh(value)
        _check(name, value, rest, names)
        result = filter(*hidden, value, *rest, **names)
        if isinstance(result, str):
            budget.made(len(result))
        return result

    return limited


def _check(name: str, value: Any, rest: Iterable[Any], names: dict[str, Any]) -> None:
    """Raises SecurityError: a filter or a method of a text whose result would be too large."""
    given = [*rest, *names.values()]
    number = max((abs(entry) for entry in given if isinstance(entry, int)), default=0)
    if number > _MOST_NUMBER:
        raise SecurityError(f"{name} with the number {number}")
    texts = [len(entry) for entry in given if isinstance(entry, str)]
    longest = max([*texts, number])
    match name:
        case "join":
            parts = value if isinstance(value, list) else next(iter(given), ())
            between = len(value) if isinstance(value, str) else longest
            _budget.get().made(_weigh(parts) + between * len(parts) if isinstance(parts, list | tuple | dict) else 0)
        case "replace" if given:
            _budget.get().made(_weigh(value) + str(value).count(str(given[0])) * longest)
        case "indent" | "wordwrap" | "tojson":
            _budget.get().made(_weigh(value) + (1 + _weigh(value)) * longest if longest > 64 else 0)
        case "format" | "format_map":
            _check_format(str(value), given)


def _check_format(text: str, given: Iterable[Any]) -> None:
    """Raises SecurityError: widths and precisions in a format that make a large text of a small one."""
    given = list(given)
    widths = sum(int(digits[:9]) for digits in re.findall(r"\d+", text))
    numbers = max((abs(entry) for entry in given if isinstance(entry, int)), default=0)
    variable = text.count("*") + len(re.findall(r"[:.][^{}]*\{", text))
    _budget.get().made(
        len(text) + widths + _weigh(given) * (1 + text.count("%") + text.count("{")) + variable * numbers
    )


def _is_sized(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple)


def _size(value: Any) -> int:
    return len(value) if _is_sized(value) else value if isinstance(value, int) else 0
