"""Incremental detokenization: the text that each token adds, which `tokenizers` does not offer.

Why: `tokenizers` decodes whole sequences, and some of its decoders change earlier text when more tokens come (a run of
byte tokens is one character, or one replacement character for every byte if any of them is wrong). A detokenizer here
knows when text is final. `tokenizers.decoders.DecodeStream` guesses that from a trailing replacement character and
cannot be flushed.

Invariant: the texts of all chunks, joined, are `backend.decode(tokens)`; a chunk that was returned never changes.

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

__all__ = ["IncrementalDetokenizer", "TextChunk", "detokenizer_for", "is_lossless", "piece_for_display", "token_bytes"]

_BYTE_TOKEN = re.compile(r"<0x([+0-9A-Fa-f][0-9A-Fa-f])>")


class TextChunk(NamedTuple):
    """Final text, and the number (from 1) of the id whose token completed it."""

    text: str
    token_index: int


class IncrementalDetokenizer(Protocol):
    """Takes the tokens that are not skipped one by one and returns final text. One detokenizer serves one stream."""

    def push(self, token: int, token_index: int) -> list[TextChunk]:
        """Take the token with number `token_index` (from 1); return the chunks that it makes final."""
        ...

    def flush(self) -> list[TextChunk]:
        """End the sequence: return the remaining text."""
        ...


def detokenizer_for(backend: tokenizers.Tokenizer) -> IncrementalDetokenizer:
    """A new detokenizer for this tokenizer's decoder.

    Decoders that can rewrite any part of their text at the end (suffix marks, CTC, patterns over the joined text) get
    one that holds everything until `flush`: late, but correct.
    """
    steps = _decoder_steps(backend)
    shape = "".join(_step_letter(step) for step in steps)
    if shape == "L":
        return _ByteLevelDetokenizer(backend)
    if re.fullmatch(r"R*B?F?S*|M|W", shape):
        replaced = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
        return _LocalDetokenizer(backend, replaced if "B" in shape else None)
    return _WholeDetokenizer(backend)


def is_lossless(backend: tokenizers.Tokenizer) -> bool:
    """Whether every byte has a token of its own, so that the vocabulary can represent any text."""
    if any(step["type"] == "ByteLevel" for step in _decoder_steps(backend)):
        return all(backend.token_to_id(char) is not None for char in _BYTE_OF_CHAR)
    if getattr(backend.model, "byte_fallback", False):
        return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return False


def token_bytes(backend: tokenizers.Tokenizer) -> list[bytes | None] | None:
    """The bytes that each token adds to a text, None for a control token or an id without one; None if they depend on
    the tokens around it."""
    steps = _decoder_steps(backend)
    shape = "".join(_step_letter(step) for step in steps)
    if shape != "L" and not (steps and re.fullmatch(r"R*B?F?", shape)):
        return None
    replaced = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
    control = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    pieces: list[bytes | None] = [None] * backend.get_vocab_size()
    for piece, token in backend.get_vocab().items():
        if token in control:
            continue
        if shape == "L":
            pieces[token] = _byte_level_bytes(piece)
            continue
        for text, instead in replaced:
            piece = piece.replace(text, instead)
        byte = _BYTE_TOKEN.fullmatch(piece) if "B" in shape else None
        pieces[token] = bytes([int(byte[1], 16)]) if byte else piece.encode("utf-8")
    return pieces


def piece_for_display(backend: tokenizers.Tokenizer, token: int) -> str:
    """The token's text with unprintable characters escaped, so that it cannot control a terminal."""
    piece = _piece(backend, token)
    if [step["type"] for step in _decoder_steps(backend)] == ["ByteLevel"]:
        text = _byte_level_bytes(piece).decode("utf-8", errors="backslashreplace")
    else:
        text = piece.replace("\u2581", " ")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


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


def _bytes_by_char() -> dict[str, int]:
    # GPT-2's table: printable Latin-1 bytes represent themselves, the others are mapped to U+0100 and up, in order.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return chars | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_CHAR = _bytes_by_char()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in piece])
    except KeyError:
        return piece.encode("utf-8")


@final
class _ByteLevelDetokenizer:
    """Every token is bytes; the sequence is decoded as UTF-8 with replacement characters (GPT-2, Llama 3, Qwen)."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._token_index = 0

    def push(self, token: int, token_index: int) -> list[TextChunk]:
        self._token_index = token_index
        return [TextChunk(self._utf8.decode(_byte_level_bytes(_piece(self._backend, token))), token_index)]

    def flush(self) -> list[TextChunk]:
        return [TextChunk(self._utf8.decode(b"", final=True), self._token_index)]


@final
class _LocalDetokenizer:
    """A token's text depends only on whether it comes first; runs of byte tokens are read as one (Gemma, Llama, T5).

    ::

        tokens    he  llo  <0xE2> <0x82> <0xAC>  !
        chunks    he  llo  |------ euro ------|  !       a run of bytes is final when it ends: one wrong byte breaks it

    The first tokens are decoded as they are, until they yield text. After that a token is decoded after an anchor, any
    token that yields text by itself, so that the decoder's treatment of the first token (a leading space is removed)
    applies to the anchor.
    """

    def __init__(self, backend: tokenizers.Tokenizer, replaced: list[tuple[str, str]] | None) -> None:
        self._backend = backend
        self._replaced = replaced
        self._head: list[int] | None = []
        self._run: list[tuple[int, int, int]] = []
        self._anchor, self._anchor_text = self._find_anchor()

    def push(self, token: int, token_index: int) -> list[TextChunk]:
        byte = self._byte(token)
        if byte is not None:
            self._run.append((token, byte, token_index))
            return []
        return [*self.flush(), TextChunk(self._text([token]), token_index)]

    def flush(self) -> list[TextChunk]:
        if not self._run:
            return []
        tokens, values, indices = zip(*self._run, strict=True)
        self._run = []
        text = self._text(tokens)
        chars = bytes(values).decode("utf-8", errors="ignore")
        # With a wrong byte, `text` has a replacement character for each and is longer; a leading space may be off.
        if not chars.endswith(text):
            return [TextChunk(text, indices[-1])]
        ends = accumulate(len(char.encode("utf-8")) for char in chars)
        chunks = [TextChunk(char, indices[end - 1]) for char, end in zip(chars, ends, strict=True)]
        return chunks[len(chars) - len(text) :]

    def _text(self, tokens: Sequence[int]) -> str:
        if self._head is None:
            assert self._anchor is not None  # this sequence has a token that is no byte, so an anchor exists
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
class _WholeDetokenizer:
    """Holds all tokens until the end, for decoders whose text is final only then."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._tokens: list[int] = []
        self._token_index = 0

    def push(self, token: int, token_index: int) -> list[TextChunk]:
        self._tokens.append(token)
        self._token_index = token_index
        return []

    def flush(self) -> list[TextChunk]:
        tokens, self._tokens = self._tokens, []
        return [TextChunk(self._backend.decode(tokens, skip_special_tokens=False), self._token_index)]
