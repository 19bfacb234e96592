"""JSON schemas as expressions: texts that parse to a value that the schema allows.

    schema --references, alternatives--> flat keywords --one expression each--> Union --> Automaton, parts first

Not all such texts: keys stand in the schema's order, one space at most follows a comma or colon, an object has no keys
besides its declared ones unless `additionalProperties` or `patternProperties` says which; and recursion, long strings
and long arrays end where the automaton would become large. Each text that is left is valid.

Source: JSON Schema 2020-12, and what drafts 4 to 2019-09 have otherwise (`definitions`, a list in `items`, ...).

Invariant: a keyword is enforced, or the schema refused with its name and place; the same schema always gives the same
automaton, however long that takes.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from decimal import Decimal
from hashlib import sha256
from typing import Any

from blockpress.constrain.alternatives import Alternatives
from blockpress.constrain.automaton import (
    MAX_STATES,
    NOTHING,
    Automaton,
    Chars,
    Concat,
    Expression,
    Linked,
    Repeat,
    Union,
    _NothingMatches,
    _TooLarge,
    difference,
    intersection,
    literal,
    optional,
)
from blockpress.constrain.compiler import compile_expression, listed_texts
from blockpress.constrain.containers import any_value, array_texts, object_texts
from blockpress.constrain.json_numbers import (
    DIGIT,
    MOST_DIGITS,
    has_exact_digits,
    number_texts,
)
from blockpress.constrain.json_text import json_string, text_of
from blockpress.constrain.merge import Flat, bounds, canonical, has_type, implied_types, refused, schema_name
from blockpress.constrain.nondeterministic import Work
from blockpress.constrain.references import ROOT, Document, below
from blockpress.constrain.values import Values
from blockpress.errors import RequestError

COMPILED = 20
"""As how many states the work of making an automaton of any size counts."""
STEPS = 16
"""How many steps (`Work`) may be needed for each state."""
MAX_SECONDS = 120.0
"""A last resort: what an automaton may need is limited by its states."""


@dataclass(frozen=True)
class Limits:
    """How much of what has no end, or a distant one, is written out.

    depth: recursive references within each other. any_depth: arrays and objects within each other where any value may
    stand. counted: characters of a string that has a `maxLength`. repeated: states of an array's counted items.
    optional: states of what an object or array may do without, all together; None: all of it is written out.
    enough: the most states of an automaton for which these limits are taken. work: the most of all that it is made
    of, each counted where it is made; a part that comes later has to be one that may be left out.
    """

    depth: int
    any_depth: int
    counted: int
    repeated: int
    optional: int | None
    enough: int
    work: int


LIMITS = (
    Limits(6, 3, 256, 4000, None, 6000, 40_000),
    Limits(3, 2, 64, 1000, None, 6000, 40_000),
    Limits(2, 1, 32, 250, None, 14_000, 60_000),
    Limits(1, 0, 16, 50, None, MAX_STATES, 100_000),
    Limits(1, 0, 16, 50, 6000, MAX_STATES, 100_000),
)
"""From generous to narrow: the first that stay small enough are taken."""


def schema_automaton(schema: object) -> Automaton:
    """The texts of values that a schema allows.

    Raises:
        RequestError: the schema is malformed, has a keyword that cannot be enforced, or is too large; the message says
            where. _NothingMatches: it allows no value.
    """
    if isinstance(schema, str):
        raise RequestError(f"schema is the text {schema!r:.80}", hint="give a mapping; json.loads reads a text")
    document = Document(schema)
    if document.draft == 3:
        raise RequestError("schema #/$schema is draft 3", hint="write it as draft 4 or later")
    deadline = time.thread_time() + MAX_SECONDS
    cut, large, compiler = False, None, None
    for limits in LIMITS:
        compiler = _Compiler(document, limits, deadline, compiler)
        try:
            result = compiler.value(document.root, ROOT)
        except _TooLarge as error:
            large = error
            continue
        if result is not None:
            return result
        cut = cut or compiler.cut
        if not cut:
            raise _NothingMatches
    if large is not None:
        raise large
    raise RequestError("schema needs a value of endless depth", hint="give its recursion an end")


class _Compiler:
    """One schema within limits. cut: a reference was not followed, for depth. before: what other limits have left."""

    def __init__(self, document: Document, limits: Limits, deadline: float, before: _Compiler | None) -> None:
        self._limits, self._deadline = limits, deadline
        self._document, self._values = document, Values(document)
        self._alternatives: Alternatives = before._alternatives if before else Alternatives(document, self._values)
        self._known: dict[Hashable, tuple[Any, Automaton | None]] = {}
        self._alike: dict[bytes, Automaton] = {}
        self._depth = limits.depth
        self.repeated, self.optional, self.enough = limits.repeated, limits.optional, limits.enough
        self._work, self._steps = 0, Work(STEPS * limits.work)
        if before is not None and limits.optional and replace(before._limits, optional=limits.optional) == limits:
            self._alike = before._alike  # what is small is the same with and without a limit on what is optional
            small = limits.optional // 2
            self._known = {key: each for key, each in before._known.items() if len(each[1] or ()) <= small}

    @property
    def cut(self) -> bool:
        return self._alternatives.cut

    @property
    def exhausted(self) -> bool:
        """Whether what may be left out is: the rest of the work is for what it stands in."""
        left = min(self._limits.work - self._work, self._steps.left // STEPS)
        return self.optional is not None and 2 * left < self._limits.work

    def value(self, schema: Any, place: str) -> Automaton | None:
        """The texts of a schema; None: there are none."""
        depth = self._depth
        place = self._document.place(schema, place)
        key = (schema_name(schema), depth)
        if key not in self._known:
            self._check_time(place)
            self._check_work(0, place)
            self._known[key] = schema, self._shared(self._compile(self._parts(schema, place, depth), place))
        return self._known[key][1]

    def _parts(self, schema: Any, place: str, depth: int) -> list[Expression]:
        """The expressions of a schema's alternatives; of those that are too large together the first."""
        parts: list[Expression] = []
        left = self._limits.enough
        found = self._alternatives.of(schema, place, depth)
        problem: _TooLarge | None = None
        for each in found:
            if parts and self.exhausted:
                break
            self._depth = each.depth
            try:
                part = self._flat(each.flat, place)
                if self.optional is not None and len(found) > 1:
                    size = len(compile_expression(part))
                    if size > left:
                        raise self._too_large(place)
                    left -= size
                parts.append(part)
            except _NothingMatches:
                continue
            except _TooLarge as error:
                if self.optional is None:
                    raise
                problem = error
            finally:
                self._depth = depth
        if problem is not None and not parts:
            raise problem
        return parts

    def _shared(self, automaton: Automaton | None) -> Automaton | None:
        """One automaton for all that are alike, so that alternatives with the same members can share these."""
        if automaton is None:
            return None
        key = automaton.table.tobytes() + automaton.accepting.tobytes()
        return self._alike.setdefault(sha256(key).digest(), automaton)

    def listed(self, schema: Any, place: str) -> list[Any] | None:
        """The values of a schema that only lists some."""
        found = self._alternatives.of(schema, place, self._depth)
        if any(each.flat.keys() != {"enum"} for each in found):
            return None
        return [*{canonical(value): value for each in found for value in each.flat["enum"]}.values()]

    def _compile(self, parts: list[Expression], place: str) -> Automaton | None:
        part = 1 if self._limits.enough == MAX_STATES else 4
        work = Work(min(self._steps.left, STEPS * self._limits.work // part))
        self._steps.spend(work.left)
        try:
            result = compile_expression(parts[0] if len(parts) == 1 else Union(tuple(parts)), work)
        except _NothingMatches:
            return None
        except _TooLarge:
            raise self._too_large(place) from None
        finally:
            self._steps.left += max(work.left, 0)
        self._check_work(len(result) + COMPILED, place)
        if len(result) > self._limits.enough:
            raise self._too_large(place)
        return result

    def _check_work(self, more: int, place: str) -> None:
        self._work += more
        if self._work > self._limits.work:
            raise _TooLarge(
                f"schema {place} and what it is made of need more than {self._limits.work} states in all",
                hint="make its strings, lists and numbers shorter, or nest fewer schemas there",
            )

    def _too_large(self, place: str) -> _TooLarge:
        inner = [(len(found), self._document.place(each, "")) for each, found in self._known.values() if found]
        size, largest = max(((s, p) for s, p in inner if p.startswith(place + "/")), default=(0, ""))
        most = f", of which {size} are for {largest}" if size > 1 else ""
        return _TooLarge(
            f"schema {place} needs more than {self._limits.enough} states{most}",
            hint="make its strings, lists and numbers shorter, or nest fewer schemas there",
        )

    def _check_time(self, place: str) -> None:
        if time.thread_time() > self._deadline:
            raise RequestError(
                f"schema {place} is reached after more than {MAX_SECONDS:.0f} seconds",
                hint="give a smaller schema, with fewer alternatives and references",
            )

    def _flat(self, flat: Flat, place: str) -> Expression:
        if "enum" in flat:
            return self._listed(flat, place)
        parts: list[Expression] = []
        kinds = flat.get("type") or implied_types(flat)
        if kinds == ["any"] and "not_values" in flat:
            kinds = ["object", "array", "string", "number", "boolean", "null"]
        forbidden = [value for value in flat.get("not_values", ()) if has_type(value, kinds)]
        for kind in kinds:
            excluded = [value for value in forbidden if has_type(value, [kind])]
            if kind == "any":
                parts.append(Linked(any_value(self._limits.any_depth)))
            elif kind == "boolean" or kind == "null":
                words = ("true", "false") if kind == "boolean" else ("null",)
                parts += [literal(word) for word in words if json.loads(word) not in excluded]
            elif kind in ("object", "array"):
                texts = object_texts if kind == "object" else array_texts
                parts.append(self._placed(texts, flat, place))
            else:
                expression = self._string(flat, place) if kind == "string" else _number(flat, place, kind)
                parts.append(self._linked(_without(expression, excluded)))
        return parts[0] if len(parts) == 1 else Union(tuple(parts))

    def _placed(self, texts: Callable[[Flat, str, _Compiler], Expression], flat: Flat, place: str) -> Expression:
        try:
            return texts(flat, place, self)
        except _TooLarge as error:
            raise (error if "schema #" in error.message else self._too_large(place)) from None

    def _linked(self, expression: Expression) -> Expression:
        """What may stand beside others in a union, compiled by itself."""
        try:
            return Linked(compile_expression(expression))
        except _NothingMatches:
            return NOTHING

    def _listed(self, flat: Flat, place: str) -> Expression:
        values = [value for value in flat["enum"] if self._values.fits(value, flat, place)]
        if not values:
            return NOTHING
        return Linked(listed_texts(tuple(json.dumps(value, ensure_ascii=False) for value in values)))

    def _string(self, flat: Flat, place: str) -> Expression:
        patterns, formats, without = (tuple(flat.get(name, ())) for name in ("pattern", "format", "not_pattern"))
        try:
            return json_string(text_of(bounds(flat, "Length", place), patterns, formats, without, self._limits.counted))
        except _NothingMatches:
            return NOTHING
        except _TooLarge:
            raise self._too_large(place) from None
        except RequestError as error:
            raise RequestError(f"schema {below(place, 'pattern')}: {error.message}", hint=error.hint) from None


def _without(expression: Expression, excluded: list[Any]) -> Expression:
    """The texts of strings or numbers but for those of some values."""
    if not excluded:
        return expression
    parts: list[Expression] = []
    for value in excluded:
        parts.append(literal(json.dumps(value, ensure_ascii=False)))
        if not isinstance(value, str) and value == int(value):
            zeros = [literal(f"{int(value)}.{'0' * places}") for places in range(1, MOST_DIGITS + 1)]
            parts += [literal(str(int(value))), *zeros]
    try:
        return difference(compile_expression(expression), compile_expression(Union(tuple(parts))))
    except _NothingMatches:
        return NOTHING


def _fractional(numbers: Expression) -> Expression:
    """Those of some numbers that have a point, a digit other than 0 after it and no exponent."""
    digits, some = Repeat(DIGIT, 0, None), Chars(((49, 57),))
    try:
        fractions = Concat((optional(literal("-")), digits, literal("."), digits, some, digits))
        return intersection(compile_expression(numbers), compile_expression(fractions))
    except _NothingMatches:
        return NOTHING


def _number(flat: Flat, place: str, kind: str) -> Expression:
    low, high = flat.get("minimum"), flat.get("maximum")
    whole = kind == "integer"
    if flat.get("fractional"):
        return NOTHING if whole else _fractional(_number({**flat, "fractional": False}, place, kind))
    for name, bound, side in (("minimum", low, 1), ("maximum", high, -1)):
        far = bound is not None and side * bound[0] >= 10**MOST_DIGITS
        if far or not (whole or bound is None or has_exact_digits(bound, high or low)):
            raise refused(below(place, name), str(bound and bound[0]), "to so many digits")
    if (
        not whole
        and "multipleOf" not in flat
        and any(not isinstance(value, str) for value in flat.get("not_values", ()))
    ):
        low = low or (Decimal(-(10**9)), False)
    return number_texts(low, high, tuple(flat.get("multipleOf", ())), whole=whole)
