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

from collections.abc import Sequence
from typing import final

from blockpress.chat.sections import (
    AnswerSection,
    CallSection,
    Piece,
    Section,
    SpecialTokens,
    TextDelta,
    ThoughtSection,
    Tools,
    Vocabulary,
)
from blockpress.text.stream import StreamDecoder
from blockpress.text.tokenizer import Tokenizer

__all__ = ["Piece", "Section", "SpecialTokens", "TextDelta", "TurnParser"]


@final
class TurnParser:
    """One turn. `feed` it ids as they settle, then `finish`.

    A thought that never ends is a thought; a call that begins inside one ends it. Blanks around a thought are left out.
    An end of a thought or a call that is not open parts the text around it. Stop texts belong to the answer: they are
    looked for in it alone, and never across a thought or a call.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        controls: SpecialTokens,
        *,
        stop: Sequence[str] = (),
        section: Section = "answer",
        tools: Tools | None = None,
        held: bool = False,
    ) -> None:
        """`stop`: texts that end the answer. `section`: what the prompt leaves open. `tools`: None if not known.
        `held`: the turn is held to a constraint, so every thought and call begins with its token.

        RequestError names a stop text that is empty or no text.
        """
        self._vocabulary, self._stop = Vocabulary(tokenizer, controls, tools, held), stop
        self._fed = 0
        self._used: int | None = None
        self._has_thought = self._has_piece = False
        self._seam = ""
        self._section = self._begin(section, by_model=False)
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
        for token in self._vocabulary.tokenizer.checked_ids(ids):
            if self.stopped is not None:
                break
            self._fed += 1
            pieces += self._take(token)
            self._look_for_stop()
        return _joined(pieces)

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """No more ids come: return the rest. `cut`: the turn did not end by itself.

        A call that is still open is broken off, unless the turn ended and nothing of the call but its end is missing.
        """
        return [] if self.stopped is not None else _joined(self._leave(None, cut=cut))

    def _take(self, token: int) -> list[Piece]:
        section, controls = self._section, self._vocabulary.controls
        after = controls.section_after([token], section.kind)
        if after == section.kind and not controls.begins_anew(token, after):
            return self._noted(section.take(token))
        pieces = self._leave(token)
        if self.stopped is None:
            self._section = self._begin(after, by_model=token == controls.thought)
        return pieces

    def _leave(self, token: int | None, *, cut: bool = False) -> list[Piece]:
        pieces = self._noted(self._section.leave(token, cut=cut))
        self._look_for_stop()
        return pieces

    def _noted(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            self._has_piece = True
            self._has_thought |= isinstance(piece, TextDelta) and piece.kind == "thought"
            if not isinstance(piece, TextDelta) or piece.kind == "thought":
                self._seam = ""
            elif self._seam or piece.text.strip():
                self._seam = piece.text[-1]
        return pieces

    def _look_for_stop(self) -> None:
        section = self._section
        if self.stopped is None and isinstance(section, AnswerSection) and section.decoder.stopped is not None:
            self.stopped = section.decoder.stopped
            self._used = section.begin + section.decoder.tokens_used

    def _begin(self, kind: Section, *, by_model: bool) -> AnswerSection | ThoughtSection | CallSection:
        tokenizer = self._vocabulary.tokenizer
        if kind == "answer":
            apart, first = self._seam not in ("", "\n"), not self._has_piece
            decoder = StreamDecoder(tokenizer, self._stop)
            return AnswerSection(self._vocabulary, decoder, self._fed, apart=apart, first=first)
        if kind == "call":
            return CallSection(self._vocabulary)
        return ThoughtSection(StreamDecoder(tokenizer), apart=self._has_thought, by_model=by_model)


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
