"""What does not satisfy keywords, and what is lost of a schema that is kept apart from another so.

    {"required": ["a"], "maximum": 3}  -->  {"properties": {"a": False}},  {"minimum": (3, excluded)}

Invariant: every value of what is given here fails the keywords, for each draft and for Python's patterns as for ECMA's.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from blockpress.constrain.merge import TYPES, Flat, Synthetic, canonical, not_schema, property_schema


def failing_keywords(own: Flat) -> Iterable[Flat]:
    """For each keyword what fails it, if that can be said."""
    if "enum" in own:
        yield from _unlisted(own["enum"])
    if "type" in own:
        kinds = {*own["type"], *(["integer"] if "number" in own["type"] else [])}
        others = [kind for kind in TYPES if kind not in kinds and kind != "integer"]
        yield {"type": [kind for kind in others if not (kind == "number" and "integer" in kinds)]}
        if "number" in others and "integer" in kinds:
            yield {"type": ["number"], "fractional": True}
    for what, kind in (("Length", "string"), ("Items", "array"), ("Properties", "object")):
        if own.get(f"min{what}", 0):
            yield {"type": [kind], f"max{what}": own[f"min{what}"] - 1}
        if f"max{what}" in own:
            yield {"type": [kind], f"min{what}": own[f"max{what}"] + 1}
    for side, other in (("minimum", "maximum"), ("maximum", "minimum")):
        if side in own:
            yield {"type": ["number"], other: (own[side][0], not own[side][1])}
    for pattern in own.get("pattern", ()):
        yield {"type": ["string"], "not_pattern": (pattern,)}
    for name in own.get("required", ()):
        yield {"type": ["object"], "properties": {name: False}}
    for name, schema in own.get("properties", {}).items():
        if schema is not True and schema != {}:
            yield {"type": ["object"], "required": [name], "properties": {name: not_schema(schema)}}
    if _is_closed(own):
        yield {"type": ["object"], "minProperties": len(own.get("properties", ())) + 1}
    for schema, least, most in own.get("contains", ()):
        if least == 1 and most is None:
            yield {"type": ["array"], "items": not_schema(schema)}
    if own.get("items", True) not in (True, {}) and "prefixItems" not in own:
        yield {"type": ["array"], "minItems": 1, "contains": ((not_schema(own["items"]), 1, None),)}


def _unlisted(values: Sequence[object]) -> Iterable[Flat]:
    """What is none of some values: of arrays and objects what is longer or shorter, or differs in a common property."""
    kept = {canonical(value): value for value in values}
    objects = [value for value in kept.values() if isinstance(value, Mapping)]
    arrays = [value for value in kept.values() if isinstance(value, list | tuple)]
    plain: Flat = {
        "not_values": tuple(value for value in kept.values() if not isinstance(value, Mapping | list | tuple))
    }
    kinds = [kind for kind in TYPES if not (kind == "object" and objects) and not (kind == "array" and arrays)]
    yield plain | {"type": [kind for kind in kinds if kind != "integer"]} if objects or arrays else plain
    for found, kind, what in ((objects, "object", "Properties"), (arrays, "array", "Items")):
        if found:
            yield {"type": [kind], f"min{what}": max(map(len, found)) + 1}
            if least := min(map(len, found)):
                yield {"type": [kind], f"max{what}": least - 1}
    for name in objects[0] if objects else ():
        if all(name in value for value in objects):
            listed = {"enum": [value[name] for value in objects]}
            yield {"type": ["object"], "required": [name], "properties": {name: not_schema(listed)}}
            yield {"type": ["object"], "properties": {name: False}}


def _is_closed(flat: Flat) -> bool:
    return flat.get("additionalProperties") is False and not flat.get("patternProperties")


def is_shallow(flat: Flat) -> bool:
    """Whether nothing within a value has to fail a schema, so that no recursion goes on there."""
    inner = [*flat.get("properties", {}).values(), *(each[0] for each in flat.get("contains", ())), flat.get("items")]
    return not any(isinstance(each, Synthetic) for each in inner)


def with_others(one: Flat, rivals: Sequence[Flat]) -> Iterable[Flat]:
    """What has a property that none of the rivals knows, of which none allows such ones."""
    rivals = [rival for rival in rivals if "object" in rival.get("type", ["object"])]
    if not all(map(_is_closed, rivals)):
        return
    known = {name for rival in rivals for name in rival.get("properties", ())}
    own = [name for name in one.get("properties", ()) if property_schema(one, name) is not False]
    others = [name for name in own if name not in known]
    if others and _is_closed(one):
        yield {"type": ["object"], "minProperties": len(own) - len(others) + 1}
    yield from ({"type": ["object"], "required": [name]} for name in others)


def loss(before: Flat, after: Flat) -> int:
    """How much less is written, in a rough order: 0 is nothing."""
    declared, left = before.get("properties", {}), after.get("properties", {})
    lost = 9 * sum(left[name] is False and schema is not False for name, schema in declared.items())
    lost += 9 * (len(before.get("type", ())) - len(after.get("type", ())) if "type" in before else 0)
    lost += sum(name not in before.get("required", ()) for name in after.get("required", ()))
    lost += sum(left[name] is not False and left[name] is not schema for name, schema in declared.items())
    same = ("type", "properties", "required", "declares")
    return lost + sum(before.get(name) != value for name, value in after.items() if name not in same)
