"""Whether one given value satisfies a schema: for listed values, whose texts are known.

Invariant: True and False are certain for every draft and for Python's patterns as for ECMA's; None is neither.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from blockpress.constrain.ecma import pattern_is_found
from blockpress.constrain.formats import FORMATS, format_texts
from blockpress.constrain.json_numbers import is_multiple
from blockpress.constrain.merge import Flat, canonical, has_type, normalize_keywords, property_schema, schema_list
from blockpress.constrain.references import Document, below

Verdict = bool | None


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """Whether all are true."""
    found = [*verdicts]
    return False if False in found else None if None in found else True


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    found = [*verdicts]
    return True if True in found else None if None in found else False


def _not(verdict: Verdict) -> Verdict:
    return None if verdict is None else not verdict


class Values:
    """Judges values by the schemas of one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._open: set[Hashable] = set()
        self._own: dict[int, tuple[Any, Flat | None]] = {}
        self._sets: dict[int, tuple[Any, set[str]]] = {}

    def allows(self, value: Any, schema: Any, place: str) -> Verdict:
        """Whether a value satisfies a schema."""
        if not isinstance(schema, Mapping):
            return bool(schema)
        key = (id(value), id(schema))
        if key in self._open:
            return None
        self._open.add(key)
        try:
            if id(schema) not in self._own:
                self._own[id(schema)] = schema, normalize_keywords(schema, place, self._document.draft)
            own = self._own[id(schema)][1]
            return every([False if own is None else self.fits(value, own, place), *self._parts(value, schema, place)])
        finally:
            self._open.discard(key)

    def _parts(self, value: Any, schema: Mapping[str, Any], place: str) -> Iterable[Verdict]:
        for name in ("$ref", "$dynamicRef", "$recursiveRef"):
            if name in schema:
                yield self.allows(value, self._document.follow(schema, name, place), below(place, name))
        options = {
            name: [self.allows(value, part, below(place, name)) for part in schema_list(schema[name], place)]
            for name in ("allOf", "anyOf", "oneOf")
            if name in schema
        }
        yield every(options.get("allOf", []))
        if "anyOf" in options:
            yield _any(options["anyOf"])
        if "oneOf" in options:
            yield options["oneOf"].count(True) == 1 if None not in options["oneOf"] else None
        if "not" in schema:
            yield _not(self.allows(value, schema["not"], below(place, "not")))
        if "if" in schema and ("then" in schema or "else" in schema):
            condition = self.allows(value, schema["if"], below(place, "if"))
            then, otherwise = (self.allows(value, schema.get(name, True), place) for name in ("then", "else"))
            yield then if condition else otherwise if condition is False else every([then, otherwise]) or None
        if isinstance(value, Mapping):
            for name in ("dependencies", "dependentRequired", "dependentSchemas"):
                for key, needed in schema.get(name, {}).items() if isinstance(schema.get(name), Mapping) else ():
                    if key in value:
                        names = [needed] if isinstance(needed, str) else needed
                        listed = isinstance(names, list | tuple)
                        yield all(each in value for each in names) if listed else self.allows(value, needed, place)
            if "unevaluatedProperties" in schema and value:
                yield None
        if isinstance(value, list | tuple) and "unevaluatedItems" in schema and value:
            yield None

    def fits(self, value: Any, flat: Flat, place: str) -> Verdict:
        """Whether a value satisfies keywords in the form of `normalize_keywords`."""
        kinds = flat.get("type")
        if not has_type(value, kinds):
            return False
        if self._document.draft == 4 and isinstance(value, float) and kinds is not None and "number" not in kinds:
            return False  # there 1.0 is no integer
        if "enum" in flat and not self._is_among(value, flat["enum"]):
            return False
        if "not_values" in flat and self._is_among(value, flat["not_values"]):
            return False
        if isinstance(value, str):
            return every(self._text(value, flat))
        if isinstance(value, Mapping):
            return every(self._object(value, flat, place))
        if isinstance(value, list | tuple):
            return every(self._array(value, flat, place))
        return every(_number(value, flat)) if isinstance(value, int | float) and not isinstance(value, bool) else True

    def _is_among(self, value: Any, values: Sequence[Any]) -> bool:
        if id(values) not in self._sets:
            self._sets[id(values)] = values, {*map(canonical, values)}
        return canonical(value) in self._sets[id(values)][1]

    def _text(self, value: str, flat: Flat) -> Iterable[Verdict]:
        yield flat.get("minLength", 0) <= len(value) <= flat.get("maxLength", len(value))
        yield from (pattern_is_found(pattern, value) for pattern in flat.get("pattern", ()))
        yield from (_not(pattern_is_found(pattern, value)) for pattern in flat.get("not_pattern", ()))
        for name in flat.get("format", ()):
            yield True if name not in FORMATS or format_texts(name).matches(value) else None

    def _object(self, value: Mapping[str, Any], flat: Flat, place: str) -> Iterable[Verdict]:
        yield flat.get("minProperties", 0) <= len(value) <= flat.get("maxProperties", len(value))
        yield all(name in value for name in flat.get("required", ()))
        for name, inner in value.items():
            yield self.allows(name, flat.get("propertyNames", True), below(place, "propertyNames"))
            yield self.allows(inner, property_schema(flat, name), below(place, "properties", name))

    def _array(self, value: list[Any] | tuple[Any, ...], flat: Flat, place: str) -> Iterable[Verdict]:
        yield flat.get("minItems", 0) <= len(value) <= flat.get("maxItems", len(value))
        yield not flat.get("uniqueItems") or len({*map(canonical, value)}) == len(value)
        first = flat.get("prefixItems", [])
        for number, inner in enumerate(value):
            schema = first[number] if number < len(first) else flat.get("items", True)
            yield self.allows(inner, schema, below(place, "items"))
        for schema, least, most in flat.get("contains", ()):
            found = [self.allows(inner, schema, below(place, "contains")) for inner in value]
            sure, possible = found.count(True), len(found) - found.count(False)
            if possible < least or (most is not None and sure > most):
                yield False
            else:
                yield True if sure >= least and (most is None or possible <= most) else None


def _number(value: float, flat: Flat) -> Iterable[Verdict]:
    exact = Decimal(repr(value))
    yield not flat.get("fractional") or exact != exact.to_integral_value()
    for side, sign in (("minimum", 1), ("maximum", -1)):
        if side in flat:
            bound, excluded = flat[side]
            yield sign * exact > sign * bound or (exact == bound and not excluded)
    yield from (is_multiple(value, factor) for factor in flat.get("multipleOf", ()))
