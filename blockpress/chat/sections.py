"""What a turn of the model is made of: its answer, its thoughts and its calls, each of which reads its own tokens.

    call:ls{}<turn|>              a call without its opener: a line begins with it, and nothing comes after it
    thought\\nI add.<channel|>4    a thought without its opener: the turn begins with it

Models leave these openers out. What may be such a call or thought is held back until it is known; if it is none, it is
text like any other. A call without its opener is one only of a tool that the model was given.

Invariant: what comes out is the same however the tokens come, and no text is left out.

Run: python -m pytest tests/chat/test_parser.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

from blockpress.chat.tool_calls import QUOTE, MalformedToolCall, ToolCall, read_call
from blockpress.text.stream import StreamDecoder
from blockpress.text.tokenizer import Tokenizer

__all__ = [
    "AnswerSection",
    "CallSection",
    "Piece",
    "Section",
    "SpecialTokens",
    "TextDelta",
    "ThoughtSection",
    "Tools",
    "Vocabulary",
]

_LABEL = re.compile(r"thought[ \t\r]*\n")
"""What a thought's channel begins with; it is no part of the thought."""

_BARE_CALL = re.compile(r"call:[ \t]*([\w.:-]+)[ \t]*\{")
_BARE_NAME = re.compile(r"call:[ \t]*[\w.:-]{0,128}[ \t]*")
_MOST_HEAD = 160
"""How many ids may be held before it is known what they begin."""


@final
@dataclass(frozen=True)
class TextDelta:
    """Text that will not change any more, of the answer or of a thought."""

    kind: Literal["answer", "thought"]
    text: str


Piece = TextDelta | ToolCall | MalformedToolCall

Section = Literal["answer", "thought", "call"]
"""What a token of a turn is part of."""

Tools = Mapping[str, Mapping[str, Any]]
"""The tools that the model may call, by name, with the JSON schemas of their parameters."""


@final
@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids of a chat's control tokens; None where the vocabulary has none, and then what they mark does not exist.

    `thought` to `thought_end` frame a thought, `call` to `call_end` a tool call, `quote` a string in it. `stops`: the
    ids that end a turn: its own end, and the beginning of a tool's response, which is not the model's to write.
    """

    thought: int | None = None
    thought_end: int | None = None
    call: int | None = None
    call_end: int | None = None
    quote: int | None = None
    stops: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """The controls that this vocabulary has. A frame without its end, or the other way round, is none."""
        find = tokenizer.backend.token_to_id

        def frame(begin: str, end: str) -> tuple[int | None, int | None]:
            ids = find(begin), find(end)
            return (None, None) if None in ids else ids

        thought, thought_end = frame("<|channel>", "<channel|>")
        call, call_end = frame("<|tool_call>", "<tool_call|>")
        stops = tuple(number for number in map(find, ("<turn|>", "<|tool_response>")) if number is not None)
        return cls(
            thought=thought, thought_end=thought_end, call=call, call_end=call_end, quote=find(QUOTE), stops=stops
        )

    def section_after(self, ids: Iterable[int], section: Section = "answer") -> Section:
        """What is open after these ids, given what was before them. In a call, only its end means anything."""
        for token in ids:
            if section == "call":
                section = "answer" if token == self.call_end else "call"
            elif token == self.call:
                section = "call"
            elif token == self.thought:
                section = "thought"
            elif token == self.thought_end:
                section = "answer"
        return section

    def begins_anew(self, token: int, section: Section) -> bool:
        """Whether a section of the same kind begins here: its opener in it, or an end of what is not open."""
        if section == "call":
            return token == self.call
        stray = self.thought if section == "thought" else self.thought_end
        return token in (stray, self.call_end)


@final
@dataclass(frozen=True)
class Vocabulary:
    """What sections read with. `tools`: None where it is not known which tools the model may call. `held`: the turn is
    held to a constraint, which leaves no opener out."""

    tokenizer: Tokenizer
    controls: SpecialTokens
    tools: Tools | None
    held: bool = False

    def offers(self, name: str) -> bool:
        """Whether the model may call this tool, as far as is known."""
        return self.tools is None or name in self.tools

    def text(self, ids: Sequence[int]) -> str:
        """Without control tokens."""
        return self.tokenizer.decode(ids)

    def call(self, ids: Sequence[int], *, closed: bool, cut: bool = False) -> ToolCall | MalformedToolCall:
        """The call that these ids say; the id that ends the turn is no part of it.

        `closed`: the call's own end came. `cut`: the turn was cut off, so that more of it might have come.
        """
        if not closed and ids and ids[-1] in self.tokenizer.special_ids:
            ids = ids[:-1]
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token == self.controls.quote:
                pieces.append([])
            else:
                pieces[-1].append(token)
        texts = [self.tokenizer.decode(piece, skip_special=False) for piece in pieces]
        call = read_call(texts, self.tools, closed=closed, held=self.held)
        if closed:
            return call
        if cut or isinstance(call, MalformedToolCall):
            return MalformedToolCall(raw=QUOTE.join(texts), fault="the call is not closed")
        return replace(call, mended=True)


@final
class AnswerSection:
    """Text as it comes. `begin`: how many ids of the turn stand before it.

    `apart`: text is before it on the same line, and something else was in between. `first`: the turn begins with it.
    """

    kind: ClassVar[Section] = "answer"

    def __init__(self, vocabulary: Vocabulary, decoder: StreamDecoder, begin: int, *, apart: bool, first: bool) -> None:
        self.decoder, self.begin = decoder, begin
        self._vocabulary, self._apart, self._first = vocabulary, apart, first
        self._at_line_start = True
        self._held: list[int] = []
        self._known: Literal["", "call", "thought"] = ""

    def take(self, token: int) -> list[Piece]:
        self._held.append(token)
        waits = self._known or (len(self._held) <= _MOST_HEAD and self._may_open(self._held))
        return [] if waits else self._release()

    def leave(self, token: int | None, *, cut: bool = False) -> list[Piece]:
        """`token`: what ends the section; None: no more ids come. `cut`: they might have."""
        controls, found = self._vocabulary.controls, list[Piece]()
        if token is not None and token == controls.thought_end and self._first and self._held_is_thought():
            thought = ThoughtSection(StreamDecoder(self._vocabulary.tokenizer), apart=False, by_model=True)
            found = [piece for one in self._held for piece in thought.take(one)] + thought.leave(token)
            self._held = []
        elif self._known == "call" and not cut:
            found = self._calls(closed=token is not None and token == controls.call_end)
            self._held = [] if found else self._held
        return [*self._release(), *self._spaced(self.decoder.finish()), *found]

    def _release(self) -> list[Piece]:
        """What is held is text."""
        held, self._held = self._held, []
        text = self.decoder.feed(held)
        # Most tokens are in the middle of a line, and to decode them twice costs half as much again.
        if self._at_line_start or not text or "\n" in text:
            said = self._vocabulary.text(held)
            self._at_line_start = _ends_at_line_start(said, self._at_line_start)
            self._first &= not said.strip()
        return self._spaced(text)

    def _spaced(self, text: str) -> list[Piece]:
        if text and self._apart:
            self._apart, text = False, text if text[0] == "\n" else f"\n\n{text}"
        return _said("answer", text)

    def _may_open(self, ids: Sequence[int]) -> bool:
        """Whether these ids, the first of a line, may begin a call or a thought; then which, once that is known."""
        looks = self._at_line_start and not self._vocabulary.held
        text = self._vocabulary.text(ids).lstrip() if looks else ""
        if not text:
            return False
        if self._first and self._vocabulary.controls.thought_end is not None:
            self._known = "thought" if _LABEL.match(text) else ""
            if self._known or "thought".startswith(text.rstrip(" \t\r")):
                return True
        if self._vocabulary.controls.call is None:
            return False
        if self._is_call(ids):
            self._known = "call"
        return bool(self._known) or "call:".startswith(text) or _BARE_NAME.fullmatch(text) is not None

    def _is_call(self, ids: Sequence[int]) -> bool:
        """Whether these ids begin a call without its opener."""
        call = _BARE_CALL.match(self._vocabulary.text(ids[:_MOST_HEAD]).lstrip())
        return call is not None and self._vocabulary.offers(call[1])

    def _held_is_thought(self) -> bool:
        return self._known == "thought" or self._vocabulary.text(self._held).strip() == "thought"

    def _calls(self, *, closed: bool) -> list[Piece]:
        """What is held, as calls, each of which begins a line. `closed`: the last one's end came."""
        parts: list[list[int]] = [[]]
        in_string, at_line_start = False, False
        for place, token in enumerate(self._held):
            text = self._vocabulary.text([token])
            in_string ^= token == self._vocabulary.controls.quote
            if at_line_start and not in_string and text.strip() and self._is_call(self._held[place:]):
                parts.append([])
            parts[-1].append(token)
            at_line_start = _ends_at_line_start(text, at_line_start)
        calls = [self._vocabulary.call(ids, closed=closed and ids is parts[-1]) for ids in parts]
        if all(isinstance(call, ToolCall) and self._vocabulary.offers(call.name) for call in calls):
            return [replace(call, mended=True) for call in calls if isinstance(call, ToolCall)]
        return [self._vocabulary.call(self._held, closed=True)] if closed else []


@final
class ThoughtSection:
    """Text without the channel's label and without the blanks around it.

    `apart`: a thought has come before. `by_model`: the model opened it, so a label alone is a thought that is empty.
    """

    kind: ClassVar[Section] = "thought"

    def __init__(self, decoder: StreamDecoder, *, apart: bool, by_model: bool) -> None:
        self._decoder, self._by_model = decoder, by_model
        self._labelled = False
        self._before = "\n\n" if apart else ""
        self._begun = False
        self._held = ""

    def take(self, token: int) -> list[Piece]:
        self._held += self._decoder.feed([token])
        if not self._labelled and "thought".startswith(self._held.rstrip(" \t\r")):
            return []
        return self._say()

    def leave(self, token: int | None, *, cut: bool = False) -> list[Piece]:
        """`token`: what ends the section; None: no more ids come. `cut`: they might have."""
        self._held += self._decoder.finish()
        if not self._labelled and self._by_model and self._held.strip() == "thought":
            return []
        return self._say()

    def _say(self) -> list[Piece]:
        if not self._labelled:
            self._labelled, self._held = True, _LABEL.sub("", self._held, count=1)
        if not self._begun:
            self._held = self._held.lstrip()
        kept = self._held.rstrip()
        if not kept:
            return []
        self._held = self._held[len(kept) :]
        before, self._before, self._begun = self._before, "", True
        return _said("thought", before + kept)


@final
class CallSection:
    """Ids, held until the call is whole."""

    kind: ClassVar[Section] = "call"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._ids = vocabulary, list[int]()

    def take(self, token: int) -> list[Piece]:
        self._ids.append(token)
        return []

    def leave(self, token: int | None, *, cut: bool = False) -> list[Piece]:
        """`token`: what ends the section; None: no more ids come. `cut`: they might have."""
        closed = token is not None and token == self._vocabulary.controls.call_end
        return [self._vocabulary.call(self._ids, closed=closed, cut=cut)]


def _said(kind: Literal["answer", "thought"], text: str) -> list[Piece]:
    return [TextDelta(kind, text)] if text else []


def _ends_at_line_start(text: str, before: bool) -> bool:
    """Whether a line has only blanks so far, after text that follows one of which that is known."""
    _, newline, line = text.rpartition("\n")
    return (bool(newline) or before) and not line.strip()
