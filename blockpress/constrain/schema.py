"""JSON schemas as expressions: texts that parse to a value that the schema allows.

    schema --flatten--> alternatives without $ref, allOf, anyOf, oneOf --one expression each--> Union

Not all such texts: keys stand in the schema's order, one space at most follows a comma or colon, an object has no keys
besides its declared ones unless `additionalProperties` or `patternProperties` says which, and recursion ends at a
depth that keeps the automaton small. Each text that is left is valid.

Source: JSON Schema 2020-12; `definitions`, a list in `items` and `additionalItems` are read as in draft 7.

Invariant: a keyword is enforced, is a mere annotation, or is refused by its name and place.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from blockpress.constrain.automaton import (
    EMPTY_TEXT,
    MAX_STATES,
    Automaton,
    Concat,
    Expression,
    Union,
    _NothingMatches,
    check_size,
    difference,
    intersection,
    literal,
)
from blockpress.constrain.compiler import MAX_SECONDS, check_time, compile_expression
from blockpress.constrain.containers import ANY_DEPTH, COLON, Members, any_value
from blockpress.constrain.json_text import (
    FORMATS,
    MOST_DIGITS,
    has_exact_digits,
    json_integer,
    json_literal,
    json_number,
    json_string,
    text_of,
)
from blockpress.constrain.merge import (
    ANNOTATIONS,
    KEYWORDS,
    has_type,
    implied_types,
    merge_keywords,
    normalize_keywords,
    overlap,
    property_schema,
    schema_list,
)
from blockpress.constrain.regex import NOTHING
from blockpress.errors import RequestError

MOST_MULTIPLE = 4096
DEPTHS = (6, 4, 3, 2, 1)
"""How often a definition may stand inside itself: the first that stays small enough is taken."""
MAX_ALTERNATIVES = 256
MAX_PARTS = 4000
"""Most schemas within one, recursion written out."""


def schema_automaton(schema: object) -> Automaton:
    """The texts of values that a schema allows.

    Raises:
        RequestError: the schema is malformed, has a keyword that cannot be enforced, or is too large; the message says
            where. _NothingMatches: it allows no value.
    """
    if isinstance(schema, str):
        raise RequestError(f"schema is the text {schema!r:.80}", hint="give a mapping; json.loads reads a text")
    deadline = time.monotonic() + 2 * MAX_SECONDS
    for depth in DEPTHS:
        compiler = _Compiler(schema, depth, deadline)
        try:
            return compile_expression(compiler.expression(schema, "schema", Counter()))
        except RequestError:
            if depth == DEPTHS[-1] or not compiler.recursive:
                raise
        except _NothingMatches:
            if not compiler.cut:
                raise
            raise RequestError("schema needs a value of endless depth", hint="give its recursion an end") from None
    raise AssertionError("the last depth returns or raises")


class _Compiler:
    """One schema at one depth. recursive: a definition was met inside itself; cut: that was too deep once."""

    def __init__(self, root: Any, depth: int, deadline: float) -> None:
        self._root, self._depth, self._deadline = root, depth, deadline
        self.recursive = self.cut = False
        self._known: dict[Hashable, tuple[Any, Expression]] = {}

    def expression(self, schema: Any, path: str, stack: Counter[str]) -> Expression:
        """The texts of a schema at `path`, inside the definitions of `stack`."""
        key = (id(schema), frozenset(stack.items()))
        if key not in self._known:
            check_size(len(self._known), MAX_PARTS)
            check_time(self._deadline)
            parts = [self._flat(flat, path, stack + refs) for flat, refs in self._flatten(schema, path, stack)]
            self._known[key] = schema, parts[0] if len(parts) == 1 else Union(tuple(parts))
        return self._known[key][1]

    def _flatten(self, schema: Any, path: str, stack: Counter[str]) -> list[tuple[dict[str, Any], Counter[str]]]:
        """Alternatives without combining keywords, and the definitions that each came through."""
        if isinstance(schema, bool):
            return [({}, Counter())] if schema else []
        if not isinstance(schema, Mapping):
            raise RequestError(f"{path} is {schema!r:.80}", hint="a schema is a mapping, true or false")
        for name in schema:
            if name not in KEYWORDS and name not in ANNOTATIONS:
                raise _refused(path, name, schema[name])
        if schema is not self._root and not str(schema.get("$id", "#")).startswith("#"):
            raise _refused(path, "$id", schema["$id"], "inside a schema, where it changes what $ref means")
        own = {name: value for name, value in schema.items() if name in KEYWORDS}
        combined: list[list[tuple[dict[str, Any], Counter[str]]]] = []
        if "$ref" in own:
            combined.append(self._follow(own.pop("$ref"), path, stack))
        for place, part in enumerate(schema_list(own.pop("allOf", []), f"{path}.allOf")):
            combined.append(self._flatten(part, f"{path}.allOf[{place}]", stack))
        for name in ("anyOf", "oneOf"):
            if name in own:
                parts = schema_list(own.pop(name), f"{path}.{name}")
                options = [self._flatten(part, f"{path}.{name}[{i}]", stack) for i, part in enumerate(parts)]
                if name == "oneOf":
                    self._check_exclusive(options, path)
                combined.append([flat for option in options for flat in option])
        base = normalize_keywords(own, path)
        result = [] if base is None else [(base, Counter[str]())]
        for options_of_part in combined:
            result = [
                (both, refs | more)
                for flat, refs in result
                for other, more in options_of_part
                if (both := merge_keywords(flat, other, path)) is not None
            ]
            if len(result) > MAX_ALTERNATIVES:
                raise RequestError(
                    f"{path} has more than {MAX_ALTERNATIVES} combinations of alternatives", hint="combine fewer anyOf"
                )
        return result

    def _follow(self, ref: Any, path: str, stack: Counter[str]) -> list[tuple[dict[str, Any], Counter[str]]]:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise RequestError(f"{path}.$ref is {ref!r:.80}", hint="only references into the schema itself, '#/...'")
        target = self._root
        for name in unquote(ref[2:]).split("/") if len(ref) > 1 else []:
            name = name.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(name)] if isinstance(target, list) else target[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise RequestError(f"{path}.$ref is {ref!r:.80}, which is not there", hint="correct the name") from None
        if stack[ref]:
            self.recursive = True
        if stack[ref] >= self._depth:
            self.cut = True
            return []
        inner = stack + Counter([ref])
        return [(flat, refs | Counter({ref: 1})) for flat, refs in self._flatten(target, ref, inner)]

    def _check_exclusive(self, options: Sequence[list[tuple[dict[str, Any], Counter[str]]]], path: str) -> None:
        """Raises RequestError unless no value can be of two options."""
        for place, option in enumerate(options):
            for other in options[:place]:
                for flat, _ in option:
                    for rival, _ in other:
                        if overlap(flat, rival):
                            raise RequestError(
                                f"{path}.oneOf has options that one value may satisfy both",
                                hint="use anyOf, or give each option a constant of its own in a required property",
                            )

    def _flat(self, flat: dict[str, Any], path: str, stack: Counter[str]) -> Expression:
        if "enum" in flat:
            return self._listed(flat, path, stack)
        parts: list[Expression] = []
        for kind in flat.get("type") or implied_types(flat):
            if kind == "any":
                parts.append(any_value(ANY_DEPTH))
            elif kind == "object":
                parts.append(self._object(flat, path, stack))
            elif kind == "array":
                parts.append(self._array(flat, path, stack))
            elif kind == "string":
                parts.append(_string(flat, path))
            elif kind in ("number", "integer"):
                parts.append(_number(flat, path, whole=kind == "integer"))
            else:
                parts += [literal(text) for text in (("true", "false") if kind == "boolean" else ("null",))]
        return Union(tuple(parts))

    def _listed(self, flat: dict[str, Any], path: str, stack: Counter[str]) -> Expression:
        values = [value for value in flat["enum"] if has_type(value, flat.get("type"))]
        rest = {name: value for name, value in flat.items() if name != "enum"}
        if rest.keys() - {"type"}:
            try:
                allowed = compile_expression(self._flat(rest, path, stack))
            except _NothingMatches:
                return NOTHING
            values = [value for value in values if allowed.matches(json.dumps(value, ensure_ascii=False))]
        return Union(tuple(json_literal(value) for value in values))

    def _object(self, flat: dict[str, Any], path: str, stack: Counter[str]) -> Expression:
        declared: dict[str, Any] = dict(flat.get("properties", {}))
        required = flat.get("required", [])
        for name in required:
            declared.setdefault(name, property_schema(flat, name))
        least, most = _bounds(flat, "Properties", path)
        names = flat.get("propertyNames", True)
        free = [*self._free_keys(flat, declared, path, stack)]
        if free and least > max(1, len(required) + 1):
            raise _refused(path, "minProperties", least, "beside keys that may repeat")
        highest = max(least, 1) if most is None else most
        graph = Members()
        graph.add("start", literal("{"), (0, 0))
        for place, (name, schema) in enumerate(declared.items()):
            member: Expression = NOTHING
            if self._key_allowed(name, names, path, stack):
                value = self.expression(schema, f"{path}.properties.{name}", stack)
                member = Concat((json_literal(name), COLON, value))
            for count in range(highest + 1):
                if name not in required:
                    graph.add((place, count), EMPTY_TEXT, (place + 1, count))
                graph.member(place, count, member, place + 1, highest, bounded=most is not None)
        last = len(declared)
        for count in range(highest + 1):
            for member in free:
                graph.member(last, count, member, last, highest, bounded=most is not None)
            if count >= least:
                graph.add((last, count), literal("}"), "end")
        return graph.expression()

    def _key_allowed(self, name: str, names: Any, path: str, stack: Counter[str]) -> bool:
        if names is True:
            return True
        try:
            allowed = compile_expression(self.expression(names, f"{path}.propertyNames", stack))
        except _NothingMatches:
            return False
        return allowed.matches(json.dumps(name, ensure_ascii=False))

    def _free_keys(
        self, flat: dict[str, Any], declared: Mapping[str, Any], path: str, stack: Counter[str]
    ) -> Iterator[Expression]:
        """Members of objects whose keys are not declared one by one."""
        patterns: Mapping[str, Any] = flat.get("patternProperties", {})
        additional = flat.get("additionalProperties", not (declared or patterns))
        known = Union(tuple(literal(name) for name in declared))
        languages = {pattern: text_of((0, None), (pattern,), ()) for pattern in patterns}
        schemas: list[tuple[str, Any, str | None]] = [
            (f"patternProperties.{pattern}", value, pattern) for pattern, value in patterns.items()
        ]
        if additional is not False:
            schemas.append(("additionalProperties", additional, None))
        for where, schema, own in schemas:
            try:
                keys = text_of((0, None), (), ()) if own is None else languages[own]
                for pattern, language in languages.items():
                    if pattern != own:
                        keys = difference(keys, language)
                if declared:
                    keys = difference(keys, compile_expression(known))
                text = compile_expression(json_string(keys))
                if "propertyNames" in flat:
                    names = {"allOf": [{"type": "string"}, flat["propertyNames"]]}
                    text = intersection(
                        text, compile_expression(self.expression(names, f"{path}.propertyNames", stack))
                    )
            except _NothingMatches:
                continue
            yield Concat((text, COLON, self.expression(schema, f"{path}.{where}", stack)))

    def _array(self, flat: dict[str, Any], path: str, stack: Counter[str]) -> Expression:
        first = flat.get("prefixItems", [])
        least, most = _bounds(flat, "Items", path)
        if flat.get("uniqueItems", False) and most != 1 and most != 0:
            raise _refused(path, "uniqueItems", True)
        further = flat.get("items", not first or least > len(first))
        highest = max(least, len(first), 1) if most is None else most
        items = [self.expression(item, f"{path}.prefixItems[{i}]", stack) for i, item in enumerate(first[:highest])]
        if further is not False:
            rest = self.expression(further, f"{path}.items", stack)
            try:
                rest = compile_expression(rest) if highest > 1 else rest
            except _NothingMatches:
                rest = NOTHING
            items += [rest] * (highest + (most is None) - len(items))
        graph = Members()
        graph.add("start", literal("["), (0, 0))
        for count in range(highest + 1):
            if count < len(items):
                graph.member(0, count, items[count], 0, highest, bounded=most is not None)
            if count >= least:
                graph.add((0, count), literal("]"), "end")
        return graph.expression()


def _string(flat: dict[str, Any], path: str) -> Expression:
    least, most = _bounds(flat, "Length", path)
    patterns, formats = (tuple(flat.get(name, ())) for name in ("pattern", "format"))
    for name in formats:
        if name not in FORMATS:
            raise _refused(path, "format", name, f"which is none of {', '.join(sorted(FORMATS))}")
    try:
        return json_string(text_of((least, most), patterns, formats))
    except _NothingMatches:
        return NOTHING


def _number(flat: dict[str, Any], path: str, *, whole: bool) -> Expression:
    low, high = flat.get("minimum"), flat.get("maximum")
    multiple = flat.get("multipleOf")
    if multiple is not None and multiple != int(multiple):
        raise _refused(path, "multipleOf", multiple, "other than a whole number")
    if multiple is not None and multiple > MOST_MULTIPLE:
        raise _refused(path, "multipleOf", multiple, f"above {MOST_MULTIPLE}")
    for name, bound, side in (("minimum", low, 1), ("maximum", high, -1)):
        far = bound is not None and side * bound[0] >= 10**MOST_DIGITS
        if far or not (whole or bound is None or has_exact_digits(bound, high or low)):
            raise _refused(path, name, str(bound and bound[0]), "to so many digits")
    if not whole and multiple is None:
        return json_number(low, high)
    least = None if low is None else int(low[0].to_integral_value("ROUND_CEILING")) + (low[1] and low[0] == int(low[0]))
    most = (
        None if high is None else int(high[0].to_integral_value("ROUND_FLOOR")) - (high[1] and high[0] == int(high[0]))
    )
    return json_integer(least, most, None if multiple is None else int(multiple))


def _bounds(flat: Mapping[str, Any], what: str, path: str) -> tuple[int, int | None]:
    for name in (f"min{what}", f"max{what}"):
        if flat.get(name, 0) > MAX_STATES:
            raise _refused(path, name, flat[name], f"above {MAX_STATES}")
    return flat.get(f"min{what}", 0), flat.get(f"max{what}")


def _refused(path: str, name: str, value: Any, why: str = "") -> RequestError:
    return RequestError(
        f"{path}.{name} is {value!r:.80}, which cannot be enforced{' ' if why else ''}{why}",
        hint="leave it out and check the answer yourself",
    )
