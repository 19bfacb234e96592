"""Every text that docs/constraints.md says can be written is one: by the automaton, and by a network that is sure of it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.constrain.schema import schema_automaton
from tests.builders.chats import obedient_model
from tests.conftest import num_examples

CHARS = st.characters(exclude_categories=["Cs", "Cc"], include_characters='\b\t\n\f\r"\\/é日😀\x7f')
STRINGS = st.text(CHARS, max_size=6)
DIGITS = "0123456789"
WHOLE = st.integers(-(10**18) + 1, 10**18 - 1).map(str)
NUMBERS = st.builds(
    lambda whole, fraction, exponent: whole + fraction + exponent,
    WHOLE | st.just("-0"),
    st.just("") | st.text(DIGITS, min_size=1, max_size=18).map(".{}".format),
    st.just("") | st.builds("{}{}{}".format, st.sampled_from("eE"), st.sampled_from(["", "+", "-"]), st.integers(0, 99)),
)  # fmt: skip
COMMA, COLON = st.sampled_from([",", ", "]), st.sampled_from([":", ": "])
Pair = tuple[Any, str]
"""A schema, and the text of a value that it allows."""


def written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@st.composite
def array(draw: st.DrawFn, items: st.SearchStrategy[str], most: int = 3) -> str:
    texts = draw(st.lists(items, max_size=most))
    return "[" + "".join(draw(COMMA) * (place > 0) + text for place, text in enumerate(texts)) + "]"


@st.composite
def members(draw: st.DrawFn, pairs: list[tuple[str, str]]) -> str:
    parts = (draw(COMMA) * (place > 0) + written(key) + draw(COLON) + text for place, (key, text) in enumerate(pairs))
    return "{" + "".join(parts) + "}"


@st.composite
def free_object(draw: st.DrawFn, values: st.SearchStrategy[str], most: int = 3) -> str:
    return draw(members(draw(st.lists(st.tuples(STRINGS, values), max_size=most))))


PLAIN = STRINGS.map(written) | NUMBERS | st.sampled_from(["true", "false", "null"])


def anything(depth: int) -> st.SearchStrategy[str]:
    if not depth:
        return PLAIN
    inner = anything(depth - 1)
    return PLAIN | array(inner) | free_object(inner)


ANY = anything(1)
LEAVES: list[st.SearchStrategy[Pair]] = [
    st.tuples(st.just({}), ANY),
    st.tuples(st.just({"type": "object"}), free_object(ANY)),
    st.tuples(st.just({"type": "array"}), array(ANY)),
    st.tuples(st.just({"type": "number"}), NUMBERS),
    st.tuples(st.just({"type": "integer"}), WHOLE),
    st.tuples(st.just({"type": "string"}), STRINGS.map(written)),
    st.tuples(st.just({"type": "object", "additionalProperties": {"type": "number"}}), free_object(NUMBERS)),
    st.integers(-99, 99).map(lambda low: ({"type": "number", "minimum": low}, f"{low + 1}.5")),
    st.sampled_from([1, "é", None, [2, {"k": True}], {"b": 1, "a": "ü"}]).map(
        lambda value: ({"enum": ["other", value]}, written(value))
    ),
]


@st.composite
def objects(draw: st.DrawFn, pairs: st.SearchStrategy[Pair]) -> Pair:
    """Declared properties in their order, some left out, then free ones."""
    declared = draw(st.dictionaries(STRINGS, pairs, min_size=1, max_size=3))
    needed = draw(st.sets(st.sampled_from([*declared])))
    there = [(key, text) for key, (_, text) in declared.items() if key in needed or draw(st.booleans())]
    schema = {"type": "object", "properties": {key: part for key, (part, _) in declared.items()}}
    if draw(st.booleans()):
        further, text = draw(pairs)
        key = draw(STRINGS.filter(lambda key: key not in declared))
        return schema | {"required": sorted(needed), "additionalProperties": further}, draw(
            members([*there, (key, text)])
        )
    return schema | {"required": sorted(needed)}, draw(members(there))


@st.composite
def arrays(draw: st.DrawFn, pairs: st.SearchStrategy[Pair]) -> Pair:
    item, text = draw(pairs)
    listed = draw(array(st.just(text)))
    first, other = draw(pairs)
    if draw(st.booleans()):
        return {"type": "array", "items": item, "maxItems": 3}, listed
    return {"type": "array", "prefixItems": [first], "items": item}, f"[{other}{draw(COMMA)}{text}]"


def nested(pairs: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    return st.one_of(
        objects(pairs),
        arrays(pairs),
        st.tuples(pairs, pairs).map(lambda both: ({"anyOf": [both[0][0], both[1][0]]}, both[1][1])),
        pairs.map(lambda pair: ({"allOf": [pair[0], {}]}, pair[1])),
    )


PAIRS = st.recursive(st.one_of(LEAVES), nested, max_leaves=3)
REFERRING = PAIRS.map(lambda pair: ({"$defs": {"x": pair[0]}, "items": {"$ref": "#/$defs/x"}}, f"[{pair[1]}]"))


@settings(max_examples=num_examples(30))
@given(pair=PAIRS | REFERRING)
def test_every_text_within_the_documented_rules_can_be_written(pair: Pair) -> None:
    schema, text = pair
    assert schema_automaton(schema).matches(text)


def test_a_network_that_is_sure_of_an_allowed_text_and_of_its_end_is_not_overruled() -> None:
    lm = obedient_model()
    for text in ('{"b": 1}', '{"key":{"b":[-1.5E+3,null]}}', '{"a\\"\\\\":"x\\n, }","a": {}}'):
        asked = [{"role": "user", "content": f"say {text}"}]
        reply = lm.chat(asked, schema={"type": "object"}, max_tokens=len(text) + 2)
        assert (reply.text, reply.invalid) == (text, None)
