"""The tokenizer inside a GGUF file, equal to the `Tokenizer` of the published tokenizer.json.

The file stores pieces, merges and a type for each piece. The rest of tokenizer.json is the same for all models of the
family: spaces become `▁`, text without a piece falls back to bytes, and some pieces are *added tokens*, split off the
text before any merge. The file marks only the control tokens among these; the others are inferred: pieces that no merge
makes (`<table>`, `<unused0>`), and runs of newlines, tabs or `▁`. On Gemma 4's vocabulary that rule gives exactly the
6,414 of its tokenizer.json.

Invariant: the same text gives the same ids as with the tokenizer.json that the file was made from.

Run it:  python -m pytest tests/checkpoints/test_gguf_tokenizer.py
Source: tokenizer.json of Gemma 4; llama.cpp's `Gemma4Model.set_vocab`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from blockpress.checkpoints.gguf.header import Header
from blockpress.errors import ConfigError, DamagedFile
from blockpress.text import Tokenizer

MODEL = "gemma4"
SPACE = "▁"

_UNKNOWN, _CONTROL = 2, 3
_TYPES = range(1, 7)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_RUN = re.compile(rf"\n+|\t+|{SPACE}{{2,}}")

# Control tokens that the converter calls user-defined, so that llama.cpp prints them for its chat parser.
_SHOWN = frozenset(
    {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
)


def read_tokenizer(header: Header) -> Tokenizer | None:
    """The tokenizer of the file, or None where it has none.

    Raises:
        ConfigError: another kind of tokenizer. DamagedFile: pieces, merges or ids that contradict each other.
    """
    metadata = header.metadata
    model = str(metadata.get("tokenizer.ggml.model", "none"))
    if model in ("none", "no_vocab"):
        return None
    if model != MODEL:
        raise ConfigError(
            f"GGUF key tokenizer.ggml.model is {model!r:.80}", hint=f"files of this family say {MODEL!r}: convert again"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix", False) is not False:
        raise ConfigError("GGUF key tokenizer.ggml.add_space_prefix is not False", hint="convert the file again")
    pieces = _texts(header, "tokenizer.ggml.tokens")
    if len(set(pieces)) != len(pieces):
        raise _damaged(header, "tokenizer.ggml.tokens has a piece twice")
    merges = [_pair(header, merge) for merge in _texts(header, "tokenizer.ggml.merges")]
    named = _named(header, pieces)
    if "bos_token" not in named:
        raise _damaged(header, "it has neither tokenizer.ggml.bos_token_id nor a piece <bos>")
    backend = _backend(header, pieces, merges, named.get("unk_token"))
    _add_tokens(backend, pieces, merges, _types(header, len(pieces)))
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise _damaged(header, "tokenizer.chat_template is no text")
    flags = {name: metadata.get(f"tokenizer.ggml.{name}", False) for name in ("add_bos_token", "add_eos_token")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise _damaged(header, f"tokenizer.ggml.{name} is {flag!r:.40}, no truth value")
    # Whatever the file says: files of older converters have false, and the family is trained with <bos> in front.
    flags["add_bos_token"] = True
    return Tokenizer(backend, config={**named, **flags}, chat_template=template)


def _backend(
    header: Header, pieces: Sequence[str], merges: list[tuple[str, str]], unknown: str | None
) -> tokenizers.Tokenizer:
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    # The library raises bare Exception, here for a merge whose result is not a piece.
    except Exception as error:
        raise _damaged(header, f"its merges do not fit its pieces: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _add_tokens(
    backend: tokenizers.Tokenizer, pieces: Sequence[str], merges: Sequence[tuple[str, str]], types: Sequence[int]
) -> None:
    merged = {left + right for left, right in merges}
    control, other = [], []
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (_UNKNOWN, _CONTROL) or piece in _SHOWN:
            control.append(piece)
        elif _RUN.fullmatch(piece) or (len(piece) > 1 and piece not in merged and not _BYTE.fullmatch(piece)):
            other.append(piece)
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in other])


def _named(header: Header, pieces: Sequence[str]) -> dict[str, str]:
    """The control tokens that have a name, by the names of tokenizer_config.json: by key, else by piece."""
    named = {}
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk"), ("mask", "mask")):
        number = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is None and f"<{ours}>" in pieces:
            number = pieces.index(f"<{ours}>")
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(pieces):
            raise _damaged(header, f"tokenizer.ggml.{theirs}_token_id is {number!r:.40} of {len(pieces)} pieces")
        named[f"{ours}_token"] = pieces[number]
    return named


def _types(header: Header, count: int) -> list[int]:
    types: Any = header.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [1] * count
    if not isinstance(types, np.ndarray) or len(types) != count or not np.isin(types, _TYPES).all():
        raise _damaged(header, f"tokenizer.ggml.token_type is not {count} numbers from 1 to 6")
    return [int(kind) for kind in types]


def _texts(header: Header, key: str) -> list[str]:
    metadata: Mapping[str, Any] = header.metadata
    texts = metadata.get(key)
    if not isinstance(texts, list):
        raise _damaged(header, f"{key} is no list of texts")
    return texts


def _pair(header: Header, merge: str) -> tuple[str, str]:
    """The two pieces of a merge. No piece holds a space: it is `▁`."""
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise _damaged(header, f"the merge {merge!r:.40} is not two pieces and a space")
    return left, right


def _damaged(header: Header, what: str) -> DamagedFile:
    return DamagedFile(f"{str(header.file)!r} has a damaged tokenizer: {what}", hint="fetch or convert the file again")
