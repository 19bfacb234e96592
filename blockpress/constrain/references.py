"""Where the schemas within a schema are, and what its references mean.

    {"$id": "https://a.org/s", "$defs": {"x": {"$anchor": "y"}}}     "#/$defs/x", "#y", "https://a.org/s#y": the same

Invariant: a reference leads to a schema of the same document or to the metaschema of drafts 4 to 7, or is refused with
its place; nothing is fetched.
Source: JSON Schema 2020-12, core, 8.2; drafts 4 to 7 for `id` and `$id` with a fragment.
Run it:  python -m pytest tests/constrain/test_schema.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from blockpress.errors import RequestError

_SCHEMA = (
    *("items", "additionalItems", "contains", "unevaluatedItems"),
    *("additionalProperties", "propertyNames", "unevaluatedProperties", "not", "if", "then", "else"),
)
_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAP = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")
DEFINITIONS = ("$defs", "definitions")
ROOT = "#"


@cache
def metaschemas() -> dict[str, Any]:
    """The schemas of schemas of drafts 4, 6 and 7, as json-schema.org publishes them, by their names."""
    found = json.loads(Path(__file__).with_name("metaschemas.json").read_text("utf-8"))
    return {str(each.get("$id", each.get("id"))).removesuffix("#"): interned(each) for each in found}


def below(place: str, *names: object) -> str:
    """The JSON pointer to something within the schema at `place`.

    >>> below("#", "properties", "a/b")
    '#/properties/a~1b'
    """
    return "/".join((place, *(str(name).replace("~", "~0").replace("/", "~1") for name in names)))


def subschemas(schema: Any) -> Iterator[tuple[tuple[object, ...], Any]]:
    """The schemas directly within one, each with the names that lead to it."""
    if not isinstance(schema, Mapping):
        return
    for name in _SCHEMA:
        if isinstance(schema.get(name), Mapping | bool):
            yield (name,), schema[name]
    for name in _LIST:
        if isinstance(schema.get(name), list | tuple):
            yield from (((name, place), part) for place, part in enumerate(schema[name]))
    for name in _MAP:
        if isinstance(schema.get(name), Mapping):
            yield from (((name, key), part) for key, part in schema[name].items() if isinstance(part, Mapping | bool))


_ANNOTATIONS = {"title", "description", "markdownDescription", "$comment"}
_NO_SCHEMAS = {"enum", "const", "default", "examples", "dependencies"}


def interned(root: Any) -> Any:
    """The same schema with one object for all parts that are alike but for annotations, so that each is made once.

    One with names inside, by which the same reference means different schemas, stays as it is.
    """
    known: dict[Hashable, Any] = {}
    named = False

    def same(part: Any, *, plain: bool = False) -> Any:
        nonlocal named
        if isinstance(part, list | tuple):
            items = [same(each, plain=plain) for each in part]
            return known.setdefault(("list", *map(_key, items)), items)
        if not isinstance(part, Mapping):
            return part
        named = named or (part is not root and any(isinstance(part.get(name), str) for name in ("id", "$id")))
        pairs = {
            name: same(each, plain=plain or name in _NO_SCHEMAS)
            for name, each in part.items()
            if plain or name not in _ANNOTATIONS or not isinstance(each, str)
        }
        return known.setdefault(tuple((name, _key(each)) for name, each in pairs.items()), pairs)

    result = same(root)
    return root if named else result


def _key(part: Any) -> Hashable:
    return id(part) if isinstance(part, list | dict) else (type(part), part)


class Document:
    """A schema as a whole. draft: 3 to 7, 2019 or 2020, by `$schema`; 0 if that does not say."""

    def __init__(self, root: Any) -> None:
        self.root = root = interned(root)
        named = str(root.get("$schema", "")) if isinstance(root, Mapping) else ""
        drafts = {"draft-03": 3, "draft-04": 4, "draft-06": 6, "draft-07": 7, "2019-09": 2019, "2020-12": 2020}
        self.draft = next((number for name, number in drafts.items() if name in named), 0)
        self._bases: dict[int, str] = {}
        self._places: dict[int, str] = {}
        self._named: dict[str, Any] = {"": root}
        self._dynamic: Counter[str] = Counter()
        self._resources = 0
        self._recursive: dict[int, bool] = {}
        self._reached: dict[int, list[Any]] = {}
        self._walk(root, "", ROOT)

    def _walk(self, schema: Any, base: str, place: str) -> None:
        queue = [(schema, base, place)]
        for part, around, where in queue:
            if not isinstance(part, Mapping) or id(part) in self._bases:
                continue
            own = self._name(part, around)
            self._bases[id(part)], self._places[id(part)] = own, where
            queue += [(inner, own, below(where, *names)) for names, inner in subschemas(part)]

    def _name(self, schema: Mapping[str, Any], base: str) -> str:
        """Notes how a schema is named, and gives the base of references within it."""
        given = schema.get("id" if 0 < self.draft <= 4 else "$id")
        if isinstance(given, str) and not ("$ref" in schema and 0 < self.draft <= 7):
            if given.startswith("#"):
                self._named.setdefault(base + given, schema)
            else:
                base = urldefrag(urljoin(base, given)).url
                self._named[base] = schema
                self._resources += 1
        for name in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(name), str):
                self._named.setdefault(f"{base}#{schema[name]}", schema)
        self._dynamic[str(schema.get("$dynamicAnchor"))] += 1
        return base

    def place(self, schema: Any, otherwise: str) -> str:
        """The JSON pointer to a schema of this document."""
        return self._places.get(id(schema), otherwise)

    def follow(self, schema: Mapping[str, Any], name: str, place: str) -> Any:
        """What the reference `name` of a schema leads to.

        Raises:
            RequestError: it is no text, leads out of the document or to nothing, or depends on where it is used.
        """
        ref = schema[name]
        base = self._bases.get(id(schema), "")
        problem, hint = "", "give its schema under $defs, and refer to it by '#/$defs/...'"
        if not isinstance(ref, str):
            raise RequestError(f"schema {below(place, name)} is {ref!r:.80}", hint="it must be a text")
        moves = self._dynamic[urldefrag(ref).fragment] > 1 if name == "$dynamicRef" else self._resources > 1
        if name != "$ref" and moves:
            problem, hint = "whose target depends on where it is used", "use $ref"
        uri, fragment = urldefrag(base + ref if ref.startswith("#") else urljoin(base, ref))
        fragment = unquote(fragment)
        if uri not in self._named and uri in metaschemas():
            self._named[uri] = metaschemas()[uri]
            self._walk(self._named[uri], uri, uri + "#")
        if problem:
            pass
        elif uri not in self._named:
            problem = "which is not part of the schema"
        elif not fragment or fragment.startswith("/"):
            try:
                return self._at(self._named[uri], fragment, uri)
            except (KeyError, IndexError, ValueError, TypeError):
                problem, hint = "where there is no schema", "correct the name"
        elif f"{uri}#{fragment}" in self._named:
            return self._named[f"{uri}#{fragment}"]
        else:
            problem, hint = "which no $anchor names", "correct the name"
        raise RequestError(f"schema {below(place, name)} is {ref!r:.120}, {problem}", hint=hint)

    def _at(self, target: Any, pointer: str, base: str) -> Any:
        place = self._places.get(id(target), ROOT)
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target, place = (target[int(name)] if isinstance(target, list) else target[name]), below(place, name)
            base = self._bases.get(id(target), base)
        if not isinstance(target, Mapping | bool):
            raise TypeError
        self._walk(target, base, place)
        return target

    def recursive(self, schema: Any) -> bool:
        """Whether a schema is applied within itself, by references."""
        if id(schema) not in self._recursive:
            reached: dict[int, Any] = {}
            queue = [*self._targets(schema)]
            for target in queue:
                if id(target) not in reached:
                    reached[id(target)] = target
                    queue += self._targets(target)
            self._recursive[id(schema)] = id(schema) in reached
        return self._recursive[id(schema)]

    def _targets(self, schema: Any) -> list[Any]:
        """What the references within a schema lead to; those of its definitions are not applied by itself."""
        if id(schema) not in self._reached:
            found, queue = [], [schema]
            for part in queue:
                for name in ("$ref", "$dynamicRef", "$recursiveRef"):
                    if isinstance(part, Mapping) and isinstance(part.get(name), str):
                        found.append(self.follow(part, name, self.place(part, ROOT)))
                queue += [inner for names, inner in subschemas(part) if names[0] not in DEFINITIONS]
            self._reached[id(schema)] = found
        return self._reached[id(schema)]
