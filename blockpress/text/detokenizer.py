"""What one token adds to a text: the part of decoding that a stream needs and `tokenizers` does not offer.

Why: `tokenizers` decodes whole sequences, and some of its decoders change what they already wrote when more tokens come
(a run of byte tokens is one character, or one replacement mark for every byte if any of them is wrong). A speller says
when text is settled. `tokenizers.decoders.DecodeStream` guesses that from a trailing replacement mark and cannot be
flushed, hence our own.

Invariant: the texts of all units, joined, are `backend.decode(tokens)`; a unit that was handed out is never taken back.

Run: python -m pytest tests/text/test_stream.py
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, final

import tokenizers

__all__ = ["IncrementalDetokenizer", "TextChunk", "detokenizer_for", "is_lossless", "piece_for_display"]

_BYTE_TOKEN = re.compile(r"<0x([+0-9A-Fa-f][0-9A-Fa-f])>")


class TextChunk(NamedTuple):
    """Settled text, and how many ids had been fed when its last token came."""

    text: str
    token_index: int


class IncrementalDetokenizer(Protocol):
    """Takes kept tokens one by one and hands out settled text. One speller serves one stream."""

    def push(self, token: int, place: int) -> list[TextChunk]:
        """Take the token that was fed as number `token_index` (from 1); return the units that are settled by it."""
        ...

    def flush(self) -> list[TextChunk]:
        """Return what is left, as the end of the sequence has it."""
        ...


def detokenizer_for(backend: tokenizers.Tokenizer) -> IncrementalDetokenizer:
    """A fresh speller for this tokenizer's decoder.

    Decoders that can rewrite any part of their text at the end (suffix marks, CTC, patterns over the joined text) get a
    speller that holds everything until `flush`: late, but equal.
    """
    steps = _decoder_steps(backend)
    shape = "".join(_step_letter(step) for step in steps)
    if shape == "L":
        return _ByteLevelSpeller(backend)
    if re.fullmatch(r"R*B?F?S*|M|W", shape):
        replaced = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
        return _LocalSpeller(backend, replaced if "B" in shape else None)
    return _WholeSpeller(backend)


def is_lossless(backend: tokenizers.Tokenizer) -> bool:
    """True if every byte has a token of its own, so that no text can be out of the vocabulary."""
    if any(step["type"] == "ByteLevel" for step in _decoder_steps(backend)):
        return all(backend.token_to_id(sign) is not None for sign in _BYTE_OF_SIGN)
    if getattr(backend.model, "byte_fallback", False):
        return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return False


def piece_for_display(backend: tokenizers.Tokenizer, token: int) -> str:
    """The token's text with everything unprintable escaped, so that it cannot move a terminal's cursor or colour it."""
    piece = _piece(backend, token)
    if [step["type"] for step in _decoder_steps(backend)] == ["ByteLevel"]:
        text = _byte_level_bytes(piece).decode("utf-8", errors="backslashreplace")
    else:
        text = piece.replace("\u2581", " ")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def _piece(backend: tokenizers.Tokenizer, token: int) -> str:
    piece = backend.id_to_token(token)
    assert piece is not None, f"id {token} was not checked"
    return piece


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [leaf for part in step["decoders"] for leaf in flat(part)] if step["type"] == "Sequence" else [step]

    return flat(json.loads(backend.decoder.__getstate__()))


def _step_letter(step: dict[str, Any]) -> str:
    kind = step["type"]
    if kind == "Replace":
        return "R" if step["pattern"].get("String") else "?"
    if kind == "Strip":
        return "S" if step["stop"] == 0 else "?"
    return {"ByteFallback": "B", "Fuse": "F", "Metaspace": "M", "WordPiece": "W", "ByteLevel": "L"}.get(kind, "?")


def _signs_of_bytes() -> dict[str, int]:
    # The table of GPT-2: printable Latin-1 bytes stand for themselves, the others follow from U+0100 in order.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return signs | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_SIGN = _signs_of_bytes()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF_SIGN[sign] for sign in piece])
    except KeyError:
        return piece.encode("utf-8")


@final
class _ByteLevelSpeller:
    """Every token is bytes, and the whole is read as UTF-8 with replacement marks (GPT-2, Llama 3, Qwen)."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._place = 0

    def push(self, token: int, place: int) -> list[TextChunk]:
        self._place = place
        return [TextChunk(self._utf8.decode(_byte_level_bytes(_piece(self._backend, token))), place)]

    def flush(self) -> list[TextChunk]:
        return [TextChunk(self._utf8.decode(b"", final=True), self._place)]


@final
class _LocalSpeller:
    """A token's text depends only on whether it comes first; runs of byte tokens are read as one (Gemma, Llama, T5).

    ::

        tokens    he  llo  <0xE2> <0x82> <0xAC>  !
        units     he  llo  |------ euro ------|  !       a run of bytes settles when it ends: one wrong byte spoils it

    What comes first is decoded as it is, until it yields text. After that a token is decoded behind an anchor, any
    token that yields text alone, so that the decoder's care for the first place (a space that is taken off) falls on
    the anchor.
    """

    def __init__(self, backend: tokenizers.Tokenizer, replaced: list[tuple[str, str]] | None) -> None:
        self._backend = backend
        self._replaced = replaced
        self._head: list[int] | None = []
        self._run: list[tuple[int, int, int]] = []
        self._anchor, self._anchor_text = self._find_anchor()

    def push(self, token: int, place: int) -> list[TextChunk]:
        byte = self._byte(token)
        if byte is not None:
            self._run.append((token, byte, place))
            return []
        return [*self.flush(), TextChunk(self._text([token]), place)]

    def flush(self) -> list[TextChunk]:
        if not self._run:
            return []
        tokens, values, places = zip(*self._run, strict=True)
        self._run = []
        text = self._text(tokens)
        signs = bytes(values).decode("utf-8", errors="ignore")
        # Where a byte is wrong, `text` has a mark for each byte and is longer; at the start, a space may be taken off.
        if not signs.endswith(text):
            return [TextChunk(text, places[-1])]
        ends = accumulate(len(sign.encode("utf-8")) for sign in signs)
        units = [TextChunk(sign, places[end - 1]) for sign, end in zip(signs, ends, strict=True)]
        return units[len(signs) - len(text) :]

    def _text(self, tokens: Sequence[int]) -> str:
        if self._head is None:
            assert self._anchor is not None  # a token that is no byte opened this sequence or is in it, so one exists
            return self._decode([self._anchor, *tokens])[len(self._anchor_text) :]
        self._head.extend(tokens)
        text = self._decode(self._head)
        if text:
            self._head = None
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)

    def _byte(self, token: int) -> int | None:
        if self._replaced is None:
            return None
        piece = _piece(self._backend, token)
        for old, new in self._replaced:
            piece = piece.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(piece)
        return int(match[1], 16) if match else None

    def _find_anchor(self) -> tuple[int | None, str]:
        for token in range(self._backend.get_vocab_size()):
            if self._backend.id_to_token(token) is not None and self._byte(token) is None:
                text = self._decode([token])
                if text:
                    return token, text
        return None, ""


@final
class _WholeSpeller:
    """Holds all tokens to the end, for decoders whose text is settled only there."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._tokens: list[int] = []
        self._place = 0

    def push(self, token: int, place: int) -> list[TextChunk]:
        self._tokens.append(token)
        self._place = place
        return []

    def flush(self) -> list[TextChunk]:
        tokens, self._tokens = self._tokens, []
        return [TextChunk(self._backend.decode(tokens, skip_special_tokens=False), self._place)]
