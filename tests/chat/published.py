"""Random conversations through the published chat template, as blockpress and as `transformers` render them.

    python -m tests.chat.published [--count 2000] [--seed 0]

A talk is drawn twice at once: as a client may send it (`given`), and in the one form that `transformers` renders right
(`plain`). Where the two are the same, so must the prompts be. Where they are not, or where one of the two libraries
refuses, the reason is one of REASONS, which docs/messages.md explains.

`diffusion_gemma.jinja` is the template of July 2026 ("Google Gemma 4 Canonical Chat Template, published 2026-07-09"),
unchanged from huggingface/trl, commit f2cd5771, trl/chat_templates (Apache-2.0).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from blockpress.chat import ChatTemplate, encode_chat
from blockpress.errors import BlockpressError
from tests.chat_tokenizer import TOKENIZER

SOURCE = (Path(__file__).parent / "diffusion_gemma.jinja").read_text(encoding="utf-8")
PUBLISHED = ChatTemplate(SOURCE, special_tokens={"bos_token": "<bos>"})

REASONS = {
    "closed turn": "after a result and text of one turn, the model's turn is opened",
    "no ids": "calls without ids get ids, so that a result has the name of its own tool",
    "object": "a result that is an object is its JSON text",
    "arguments": "arguments may be JSON text",
    "thinking": "a thought may be called `thinking`",
    "video_url": "a video may be called `video_url`",
    "schema": "types, references, alternatives and constants of a schema are spelled out",
    "no type": "parameters without a type are an object",
    "refused: unanswered": "a call without a result",
    "refused: no call": "a result without a call",
    "refused: name": "a result with the name of another tool",
    "refused: ids": "two calls with one id",
    "refused: field": "a field that nothing reads",
    "refused: picture": "an image in a message of the model",
}

WORDS = ["rain", "a", "1.5", " ", "\n", "  x ", '"', "{", "}", ":", ",", "'", "<", "|>", "&amp;", "[1, 2]", "None"]
CONTROLS = ["<|turn>", "<turn|>", "<|image|>", '<|"|>', "<tool_call|>", "<|think|>", "<eos>"]
NAMES = ["weather", "clock", "google:search", "a.b-c", "get_sum", "f"]

SCHEMAS: list[tuple[Any, Any]] = [
    ({"type": ["string", "null"], "description": "d"}, {"type": "string", "nullable": True, "description": "d"}),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"type": "integer", "nullable": True}),
    ({"const": "on"}, {"type": "string", "enum": ["on"]}),
    ({"$ref": "#/$defs/Unit"}, {"type": "string", "enum": ["C", "F"]}),
    (
        {"type": "array", "items": {"$ref": "#/$defs/Unit"}},
        {"type": "array", "items": {"type": "string", "enum": ["C", "F"]}},
    ),
    ({"oneOf": [{"enum": ["a"]}, {"enum": ["b"]}]}, {"type": "string", "enum": ["a", "b"]}),
    ({"type": "object", "title": "T"}, {"type": "object"}),
]
KEYWORDS: dict[str, list[Any]] = {
    "title": ["T"],
    "description": ["d e", ""],
    "default": [None, 1, "a", {}],
    "nullable": [True, False],
    "minimum": [1],
    "examples": [[1, "a"]],
}


@dataclass
class Talk:
    """`given`: as a client sends it. `plain`: the same for `transformers`. `closes`: the template closes the turn."""

    given: dict[str, Any] = field(default_factory=lambda: {"messages": [], "tools": []})
    plain: dict[str, Any] = field(default_factory=lambda: {"messages": [], "tools": []})
    reasons: set[str] = field(default_factory=set)
    closes: bool = False

    def say(self, given: dict[str, Any], plain: dict[str, Any] | None = None) -> None:
        self.given["messages"].append(given)
        self.plain["messages"].append(given if plain is None else plain)

    @property
    def is_refused(self) -> bool:
        return any(reason.startswith("refused") for reason in self.reasons)


def draw_talk(seed: int) -> Talk:
    """The talk of this number, the same on every machine."""
    return _Draw(Random(seed)).talk


class _Draw:
    def __init__(self, rng: Random) -> None:
        self.rng, self.talk = rng, Talk()
        self.chance = lambda share: rng.random() < share
        is_odd = self.chance(0.5)
        self.odd = lambda share: is_odd and rng.random() < share
        for _ in range(rng.randrange(3)):
            self.tool()
        self.thinking = self.chance(0.5)
        if self.chance(0.4):
            self.talk.say({"role": rng.choice(["system", "developer"]), "content": self.content(False)})
        for _ in range(rng.randint(1, 4)):
            self.exchange()
        for form in (self.talk.given, self.talk.plain):
            form["thinking"] = self.thinking

    def text(self, least: int = 0) -> str:
        pieces = WORDS + (CONTROLS if self.chance(0.3) else [])
        return "".join(self.rng.choice(pieces) for _ in range(self.rng.randint(least, 6))) + "." * least

    def content(self, shows: bool) -> Any:
        if self.chance(0.6):
            return self.text()
        kinds = ["text", "image", "image_url", "video"] if shows else ["text"]
        return [self.part(self.rng.choice(kinds)) for _ in range(self.rng.randint(1, 3))]

    def part(self, kind: str) -> dict[str, Any]:
        if kind == "image_url":
            return {"type": kind, kind: {"url": "data:,", "detail": "auto"}}
        return {"type": kind, kind: self.text() if kind == "text" else 0}

    def schema(self, depth: int = 0) -> dict[str, Any]:
        """One whose types are all spelled out, with keywords that say nothing to the template."""
        nested = ["array", "object", "object"] if depth < 3 else []
        schema: dict[str, Any] = {
            "type": self.rng.choice(["string", "STRING", "integer", "number", "boolean", "null", *nested])
        }
        schema |= {word: self.rng.choice(values) for word, values in KEYWORDS.items() if self.chance(0.15)}
        if schema["type"] in ("string", "integer") and self.chance(0.3):
            schema["enum"] = ["x y", "z"] if schema["type"] == "string" else [1, 2]
        if schema["type"] == "array" and self.chance(0.8):
            schema["items"] = self.schema(depth + 1)
        if schema["type"] == "object":
            names = self.rng.sample(["a", "B", "type", "properties", "required", "items", "c d"], self.rng.randrange(4))
            schema |= {"properties": {name: self.schema(depth + 1) for name in names}, "required": names[:2]}
            schema |= {"additionalProperties": False} if self.chance(0.3) else {}
        return schema

    def tool(self) -> None:
        given: dict[str, Any] = {"type": "object", "properties": {}}
        plain: dict[str, Any] = {"type": "object", "properties": {}}
        for name in self.rng.sample(["q", "Unit", "type", "n"], self.rng.randrange(4)):
            if self.odd(0.3):
                given["properties"][name], plain["properties"][name] = self.rng.choice(SCHEMAS)
                given["$defs"] = {"Unit": {"type": "string", "enum": ["C", "F"]}}
                self.talk.reasons.add("schema")
            else:
                given["properties"][name] = plain["properties"][name] = self.schema()
        if self.chance(0.5):
            given["required"] = plain["required"] = sorted(given["properties"])[:2]
        if self.odd(0.05):
            del given["type"]
            self.talk.reasons.add("no type")
        name, about = f"{self.rng.choice(NAMES)}{len(self.talk.given['tools'])}", self.text()
        for form, parameters in ((self.talk.given, given), (self.talk.plain, plain)):
            function = {"name": name, "description": about, "parameters": parameters, "strict": True}
            form["tools"].append({"type": "function", "function": function})

    def exchange(self) -> None:
        shown = self.content(True)
        plain = shown
        if isinstance(shown, list) and self.odd(0.1):
            shown, plain = [*shown, {"type": "video_url", "video_url": {"url": "x"}}], [*shown, {"type": "video"}]
            self.talk.reasons.add("video_url")
        self.talk.say({"role": "user", "content": shown}, {"role": "user", "content": plain})
        self.talk.closes = False
        for _ in range(self.rng.choice([0, 0, 1, 1, 2])):
            self.round()
        if self.chance(0.6):
            said, _ = self.said()
            self.assistant({"role": "assistant", "content": said}, {})
            self.talk.closes = False
        if self.odd(0.04):
            self.talk.say({"role": "tool", "tool_call_id": "x", "content": "x"})
            self.talk.reasons.add("refused: no call")

    def said(self) -> tuple[Any, bool]:
        """What the model said, with a thought in it at times, and whether any text is left of it without them."""
        text = self.text(1)
        if self.chance(0.2):
            thought = f"<|channel>thought\n{self.rng.choice(WORDS)}"
            text = self.rng.choice(
                [f"{thought}<channel|>{text}", f"{text}{thought}<channel|>", f"{text}{thought}", f"a<channel|>{text}"]
            )
        if self.odd(0.04):
            self.talk.reasons.add("refused: picture")
            return [{"type": "text", "text": text}, {"type": "image", "image": 0}], True
        return ([{"type": "text", "text": text}] if self.chance(0.2) else text), True

    def assistant(self, given: dict[str, Any], changed: dict[str, Any]) -> None:
        plain = {**given, **changed}
        if self.chance(0.3):
            name, thought = (
                self.rng.choice(["reasoning", "reasoning_content", *(["thinking"] if self.odd(1) else [])]),
                self.text(),
            )
            given, plain = {**given, name: thought}, {**plain, "reasoning" if name == "thinking" else name: thought}
            self.talk.reasons |= {"thinking"} if name == "thinking" else set()
        if self.chance(0.1):
            given = {**given, "refusal": None, "annotations": [], "audio": None, "function_call": None}
        if self.odd(0.04):
            given = {**given, "verdict": 1}
            self.talk.reasons.add("refused: field")
        self.talk.say(given, plain)

    def arguments(self) -> dict[str, Any]:
        values = ["x", 1, 2.5, True, None, [1, "a", [None]], {"B": 1, "a": "<|turn>"}, '<|"|>', "", {}]
        return {
            name: self.rng.choice(values) for name in self.rng.sample(["q", "Z", "a b", "n"], self.rng.randrange(4))
        }

    def round(self) -> None:
        """A message with calls, and their results."""
        with_ids, calls, plain_calls = not self.odd(0.2), [], []
        for number in range(self.rng.choice([1, 1, 2, 3])):
            arguments: Any = self.arguments() or self.rng.choice([{}, None])
            function = {"name": self.rng.choice(NAMES), "arguments": arguments}
            plain_calls.append({"id": f"c{number}", "type": "function", "function": function})
            if self.odd(0.1):
                function = {**function, "arguments": json.dumps(arguments)}
                self.talk.reasons.add("arguments")
            calls.append({"type": "function", "function": function} | ({"id": f"c{number}"} if with_ids else {}))
        self.talk.reasons |= set() if with_ids else {"no ids"}
        if with_ids and len(calls) > 1 and self.odd(0.04):
            calls[1]["id"] = "c0"
            self.talk.reasons.add("refused: ids")
        said, speaks = self.said() if self.chance(0.3) else (self.rng.choice([None, "", " "]), False)
        self.assistant({"role": "assistant", "content": said, "tool_calls": calls}, {"tool_calls": plain_calls})
        order = list(range(len(calls)))
        if with_ids:
            self.rng.shuffle(order)
        if self.odd(0.06):
            del order[0]
            self.talk.reasons.add("refused: unanswered")
        for number in order:
            self.result(plain_calls[number], with_ids)
        self.talk.closes = speaks

    def result(self, call: dict[str, Any], with_ids: bool) -> None:
        plain: Any = self.content(True) if self.chance(0.8) else None
        given = plain
        if self.odd(0.2):
            given = self.arguments()
            plain = json.dumps(given, ensure_ascii=False)
            self.talk.reasons.add("object")
        name = {} if with_ids and self.chance(0.5) else {"name": call["function"]["name"]}
        if name and self.odd(0.04):
            name = {"name": "other"}
            self.talk.reasons.add("refused: name")
        id_given = {"tool_call_id": call["id"]} if with_ids else {}
        self.talk.say(
            {"role": "tool", "content": given, **id_given, **name},
            {"role": "tool", "content": plain, "tool_call_id": call["id"]},
        )


def ours(talk: dict[str, Any]) -> str:
    """As blockpress renders it. BlockpressError: it refuses."""
    options = {"tools": talk["tools"], "thinking": talk["thinking"]}
    return TOKENIZER.decode(encode_chat(TOKENIZER, PUBLISHED, talk["messages"], **options).ids, skip_special=False)


def theirs(talk: dict[str, Any]) -> str:
    """As `transformers` renders it. Any exception: it refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    names = {"enable_thinking": talk["thinking"], "add_generation_prompt": True, "bos_token": "<bos>"}
    texts, _ = render_jinja_template([talk["messages"]], tools=talk["tools"] or None, chat_template=SOURCE, **names)
    return str(texts[0])


def compare(seed: int) -> tuple[set[str], str | None]:
    """The reasons why the two treat this talk in different ways; and what has no reason, or None."""
    talk = draw_talk(seed)
    try:
        text = ours(talk.given)
    except BlockpressError as error:
        return talk.reasons, None if talk.is_refused else f"talk {seed}: refused: {error}"
    if talk.is_refused:
        return talk.reasons, f"talk {seed}: not refused, though {talk.reasons}"
    wanted = theirs(talk.plain)
    if talk.closes:
        talk.reasons.add("closed turn")
        wanted = re.sub(r"(?:<\|channel>thought\n)?\Z", "<|turn>model\n", wanted, count=1)
    if text != wanted:
        return talk.reasons, f"talk {seed}:\n  ours   {text!r}\n  theirs {wanted!r}"
    return talk.reasons, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = [compare(seed) for seed in range(given.seed, given.seed + given.count)]
    counts = Counter(reason for reasons, _ in found for reason in reasons)
    print(f"{given.count} talks, {sum(not reasons for reasons, _ in found)} of them the same as they were sent")
    for reason, what in REASONS.items():
        print(f"{counts[reason]:6} {reason:20} {what}")
    unexplained = [what for _, what in found if what is not None]
    print(f"{len(unexplained):6} without a reason", *unexplained[:5], sep="\n")
    return bool(unexplained)


if __name__ == "__main__":
    raise SystemExit(main())
