"""Settled token ids of a model's turn to what they say: thoughts, answer, tool calls.

    ids    <|channel> thought \\n  I add.  <channel|>  4  <|tool_call> call:f{} <tool_call|>  <turn|>
    said               -          thought            answer            call                     -

Why: a canvas settles many tokens at once, and a thought or a call may begin in one canvas and end in another. So the
parser takes ids, one after the other, and knows control tokens by id: text that looks like one is text.

Invariant: the pieces, joined, are the same however the ids were cut up, and no text is left out: what is no call comes
back as a `MalformedToolCall` with its text.

Run: python -m pytest tests/chat/test_parser.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from blockpress.chat.tool_calls import QUOTE, MalformedToolCall, ToolCall, read_call
from blockpress.text.stream import StreamDecoder
from blockpress.text.tokenizer import Tokenizer

__all__ = ["Piece", "Section", "SpecialTokens", "TextDelta", "TurnParser"]

LABEL = "thought\n"
"""What a thought's channel begins with; it is no part of the thought."""


@final
@dataclass(frozen=True)
class TextDelta:
    """Text that will not change any more, of the answer or of a thought."""

    kind: Literal["answer", "thought"]
    text: str


Piece = TextDelta | ToolCall | MalformedToolCall

Section = Literal["answer", "thought", "call"]
"""What a token of a turn is part of."""


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
        """What is open behind these ids, given what was before them. In a call, only its end means anything."""
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


@final
class TurnParser:
    """One turn. `feed` it ids as they settle, then `finish`.

    A thought that never ends is a thought; a call that begins inside one ends it. Blanks around a thought are left out.
    Stop texts belong to the answer: they are looked for in it alone, and never across a thought or a call.
    """

    def __init__(
        self, tokenizer: Tokenizer, controls: SpecialTokens, *, stop: Sequence[str] = (), section: Section = "answer"
    ) -> None:
        """`stop`: texts that end the answer. `section`: what the prompt leaves open.

        RequestError names a stop text that is empty or no text.
        """
        self._tokenizer, self._controls, self._stop = tokenizer, controls, stop
        self._fed = 0
        self._used: int | None = None
        self._thoughts = 0
        self._section: _Section = self._begin(section)
        self.stopped: str | None = None
        """The stop text that ended the answer."""

    @property
    def tokens_used(self) -> int:
        """How many of the fed ids the turn needs: all, or after a stop text those up to the text before it."""
        return self._fed if self._used is None else self._used

    def feed(self, ids: Sequence[int]) -> list[Piece]:
        """Take the next ids; return what is newly certain. After a stop text that is nothing.

        TextError names an id that is not in the vocabulary; then none of `ids` was taken.
        """
        pieces: list[Piece] = []
        for token in self._tokenizer.checked_ids(ids):
            if self.stopped is not None:
                break
            self._fed += 1
            pieces += self._take(token)
            self._look_for_stop()
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        """No more ids come: return the rest. A call that is still open is broken off."""
        return [] if self.stopped is not None else self._leave()

    def _take(self, token: int) -> list[Piece]:
        section = self._section
        after = self._controls.section_after([token], section.kind)
        if after == section.kind and token != self._controls.call:
            return section.take(token)
        pieces = section.close() if isinstance(section, _Call) and after == "answer" else self._leave()
        if self.stopped is None:
            self._section = self._begin(after)
        return pieces

    def _leave(self) -> list[Piece]:
        pieces = self._section.finish()
        self._look_for_stop()
        return pieces

    def _look_for_stop(self) -> None:
        if self.stopped is None and isinstance(self._section, _Answer) and self._section.decoder.stopped is not None:
            self.stopped = self._section.decoder.stopped
            self._used = self._section.begin + self._section.decoder.tokens_used

    def _begin(self, kind: Section) -> _Section:
        if kind == "answer":
            return _Answer(StreamDecoder(self._tokenizer, self._stop), self._fed)
        if kind == "call":
            return _Call(self._tokenizer, self._controls)
        self._thoughts += 1
        return _Thought(StreamDecoder(self._tokenizer), apart=self._thoughts > 1)


@final
class _Answer:
    """Text as it comes. `begin`: how many ids of the turn stand before it."""

    kind: ClassVar[Section] = "answer"

    def __init__(self, decoder: StreamDecoder, begin: int) -> None:
        self.decoder, self.begin = decoder, begin

    def take(self, token: int) -> list[Piece]:
        return _said("answer", self.decoder.feed([token]))

    def finish(self) -> list[Piece]:
        return _said("answer", self.decoder.finish())


@final
class _Thought:
    """Text without the channel's label and without the blanks around it. `apart`: a thought has come before."""

    kind: ClassVar[Section] = "thought"

    def __init__(self, decoder: StreamDecoder, *, apart: bool) -> None:
        self._decoder = decoder
        self._labelled = False
        self._before = "\n\n" if apart else ""
        self._begun = False
        self._held = ""

    def take(self, token: int) -> list[Piece]:
        return self._add(self._decoder.feed([token]))

    def finish(self) -> list[Piece]:
        return self._add(self._decoder.finish())

    def _add(self, text: str) -> list[Piece]:
        self._held += text
        if not self._labelled:
            if LABEL.startswith(self._held):
                return []
            self._labelled, self._held = True, self._held.removeprefix(LABEL)
        if not self._begun:
            self._held = self._held.lstrip()
        kept = self._held.rstrip()
        if not kept:
            return []
        self._held = self._held[len(kept) :]
        before, self._before, self._begun = self._before, "", True
        return _said("thought", before + kept)


@final
class _Call:
    """Ids, held until the call is whole."""

    kind: ClassVar[Section] = "call"

    def __init__(self, tokenizer: Tokenizer, controls: SpecialTokens) -> None:
        self._tokenizer, self._controls = tokenizer, controls
        self._pieces: list[list[int]] = [[]]

    def take(self, token: int) -> list[Piece]:
        if token == self._controls.quote:
            self._pieces.append([])
        else:
            self._pieces[-1].append(token)
        return []

    def close(self) -> list[Piece]:
        return [read_call(self._texts())]

    def finish(self) -> list[Piece]:
        # The id that ends the turn is no part of the call.
        if self._pieces[-1] and self._pieces[-1][-1] in self._tokenizer.special_ids:
            self._pieces[-1].pop()
        return [MalformedToolCall(raw=QUOTE.join(self._texts()), fault="the call is not closed")]

    def _texts(self) -> list[str]:
        return [self._tokenizer.decode(ids, skip_special=False) for ids in self._pieces]


_Section = _Answer | _Thought | _Call


def _said(kind: Literal["answer", "thought"], text: str) -> list[Piece]:
    return [TextDelta(kind, text)] if text else []


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, TextDelta) and isinstance(last, TextDelta) and last.kind == piece.kind:
            joined[-1] = TextDelta(piece.kind, last.text + piece.text)
        else:
            joined.append(piece)
    return joined
