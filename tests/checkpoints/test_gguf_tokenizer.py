"""The tokenizer inside a GGUF file gives the ids of the tokenizer.json that it was made from."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.checkpoints.gguf.header import Header, read_header
from blockpress.checkpoints.gguf.tokenizer import read_tokenizer
from blockpress.errors import BlockpressError, ConfigError, DamagedFile
from blockpress.text import Tokenizer
from tests.builders.gguf_files import ARCHITECTURE, MERGES, PIECES, TYPES, write_file
from tests.conftest import GEMMA, num_examples

SHOWN = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>']

SMALL = {
    "tokenizer.ggml.model": "gemma4",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
}

TEXTS = [
    "", " ", "Hello, world!", "two  spaces\tand\ttabs\t\t\n\n\nlines\n", "naïve café — Übermut, 東京, עברית, 😀👩‍👩‍👧", "\x00\x07\x7f",
    "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>", "<|tool_call>call:f{a:<|\"|>x<|\"|>}<tool_call|>",
    "<table><tr><td>1</td></tr></table> <unused17> [multimodal] <mask> <unk>", "▁▁▁ ▁ a▁b", "def f(x):\n    return x ** 2\n\n\n\n",
    "<0x41> <0x0A>", "      indented       text      ", "<|image|><|image><image|><|video|>", "1234567890 3.14159 1e-5",
]  # fmt: skip


def header_of(folder: Path, **changes: Any) -> Header:
    write_file(folder / "x.gguf", SMALL | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}, {})
    return read_header(folder / "x.gguf")


@pytest.fixture(scope="module")
def published(gemma: Tokenizer) -> Tokenizer:
    return gemma


@pytest.fixture(scope="module")
def keys(published: Tokenizer) -> dict[str, Any]:
    """The published tokenizer in the words of llama.cpp's converter."""
    data = json.loads((GEMMA / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = data["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in data["added_tokens"] if token["special"]} | {"<mask>"}
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.full(len(pieces), -1000, np.float32),
        "tokenizer.ggml.token_type": np.array([
            4 if piece in SHOWN else 3 if piece in special else 6 if len(piece) == 6 and piece.startswith("<0x") else 1
            for piece in pieces
        ]),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in data["model"]["merges"]],
        **{f"tokenizer.ggml.{name}_token_id": number for number, name in enumerate(["padding", "eos", "bos", "unknown", "mask"])},
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ours(keys: dict[str, Any]) -> Tokenizer:
    tokenizer = read_tokenizer(Header(file=Path("memory.gguf"), metadata=keys, tensors={}))
    assert tokenizer is not None
    return tokenizer


def packed(keys: dict[str, Any]) -> bytes:
    """A GGUF file of these keys and no tensors, as the package writes it: that takes 40 seconds over the published ones."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def one(value: Any) -> bytes:
        match value:
            case bool():
                return struct.pack("<I?", 7, value)
            case int():
                return struct.pack("<II", 4, value)
            case str():
                return struct.pack("<I", 8) + text(value)
            case np.ndarray():
                kind, values = (6, value.astype("<f4")) if value.dtype.kind == "f" else (5, value.astype("<i4"))
                return struct.pack("<IIQ", 9, kind, len(value)) + values.tobytes()
            case _:
                return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))

    named = {"general.architecture": ARCHITECTURE, **keys}
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(named)) + b"".join(text(k) + one(v) for k, v in named.items())


@pytest.mark.slow
@pytest.mark.end_to_end  # a shape check for each of 776,000 strings
def test_the_published_vocabulary_round_trips(keys: dict[str, Any], tmp_path: Path) -> None:
    few = {key: value[:300] if isinstance(value, list | np.ndarray) else value for key, value in keys.items()}
    listed = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in few.items()}
    write_file(tmp_path / "few.gguf", listed, {})
    assert (tmp_path / "few.gguf").read_bytes().rstrip(b"\0") == packed(few).rstrip(b"\0"), "the package's bytes"
    (tmp_path / "x.gguf").write_bytes(packed(keys))
    read = read_header(tmp_path / "x.gguf").metadata
    assert all(np.array_equal(read[key], value) for key, value in keys.items())


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_ids_equal_the_published_tokenizer_s(text: str, ours: Tokenizer, published: Tokenizer) -> None:
    ids = published.encode(text, add_special=False)
    assert ours.encode(text, add_special=False) == ids
    # The file calls <mask> a control token, as transformers does; tokenizer.json alone does not.
    shown = [number for number in ids if number != 4]
    assert ours.decode(shown) == published.decode(shown)
    assert ours.decode(ids, skip_special=False) == published.decode(ids, skip_special=False)


@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from([" ", "\n", "\t", "▁", "<", ">", "|"]), max_size=60))
@settings(max_examples=num_examples(200))
def test_gguf_ids_of_any_text_equal_the_published_tokenizer_s(text: str, ours: Tokenizer, published: Tokenizer) -> None:
    assert ours.encode(text, add_special=False) == published.encode(text, add_special=False)


def test_added_tokens_are_the_published_ones(ours: Tokenizer, published: Tokenizer) -> None:
    """Which pieces are cut out of a text is not in the file: it follows from what they are."""

    def added(tokenizer: Tokenizer) -> dict[int, tuple[str, bool]]:
        table = tokenizer.backend.get_added_tokens_decoder()
        return {number: (token.content, token.special or token.content == "<mask>") for number, token in table.items()}

    assert len(added(ours)) == 6414
    assert added(ours) == added(published)
    assert ours.special_ids == published.special_ids | {4}


def test_bos_and_token_names_are_read(ours: Tokenizer) -> None:
    assert ours.encode("Hi")[0] == ours.bos == 2
    assert ours.encode("<bos>Hi") == ours.encode("Hi")
    assert (ours.eos, ours.pad, ours.special_tokens["mask_token"]) == (1, 0, "<mask>")


def test_a_saved_gguf_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(header_of(tmp_path))
    assert tokenizer is not None
    text = "abc ab\n\n  <table>a<turn|>"
    tokenizer.save(tmp_path / "saved")
    ids = [PIECES.index(x) for x in ("<bos>", "abc", "▁", "ab", "\n\n", "▁▁", "<table>", "a", "<turn|>")]
    assert tokenizer.encode(text) == Tokenizer.from_directory(tmp_path / "saved").encode(text) == ids


@pytest.mark.parametrize("changes", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"bos_token_id": None}])
def test_bos_stands_in_front_whatever_the_file_says(changes: dict[str, Any], tmp_path: Path) -> None:
    """Older converters wrote add_bos_token = false; llama.cpp overrides it for this family, too."""
    tokenizer = read_tokenizer(header_of(tmp_path, **changes))
    assert tokenizer is not None
    a = PIECES.index("a")
    assert tokenizer.encode("a") == tokenizer.encode("<bos>a") == [2, a]
    assert tokenizer.encode("a", add_special=False) == [a]
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_directory(tmp_path / "saved").encode("a") == [2, a]


def test_eos_stands_at_the_end_only_where_the_file_says_so(tmp_path: Path) -> None:
    ends = {flag: read_tokenizer(header_of(tmp_path, add_eos_token=flag)) for flag in (True, False)}
    assert [ends[flag].encode("a")[-1] == 1 for flag in ends] == [True, False]  # type: ignore[union-attr]


def test_control_tokens_without_a_key_are_found_by_their_pieces(tmp_path: Path) -> None:
    names = ("bos", "eos", "unknown")
    tokenizer = read_tokenizer(header_of(tmp_path, **{f"{name}_token_id": None for name in names}))
    assert tokenizer is not None
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)


def test_a_gguf_file_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    for model in ("none", "no_vocab", None):
        assert read_tokenizer(header_of(tmp_path, model=model)) is None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "llama"}, ConfigError, "tokenizer.ggml.model is 'llama'"),
        ({"model": [1, 2]}, ConfigError, "tokenizer.ggml.model is "),
        ({"add_bos_token": [True, False]}, DamagedFile, "add_bos_token is array([ True, False]), no truth value"),
        ({"add_eos_token": "no"}, DamagedFile, "add_eos_token is 'no', no truth value"),
        ({"tokens": None}, DamagedFile, "tokenizer.ggml.tokens is no list"),
        ({"merges": [1, 2]}, DamagedFile, "tokenizer.ggml.merges is no list"),
        ({"tokens": [*PIECES[:-1], "a"]}, DamagedFile, "a piece twice"),
        (
            {"tokens": ["<s>" if piece == "<bos>" else piece for piece in PIECES], "bos_token_id": None},
            DamagedFile,
            "<bos>",
        ),
        ({"merges": ["a"]}, DamagedFile, "the merge 'a'"),
        ({"merges": ["a b c"]}, DamagedFile, "the merge 'a b c'"),
        ({"merges": ["a zz"]}, DamagedFile, "merges do not fit"),
        ({"token_type": [1, 2]}, DamagedFile, "token_type"),
        ({"token_type": [7] * 64}, DamagedFile, "token_type"),
        ({"bos_token_id": 64}, DamagedFile, "bos_token_id is 64 of 64"),
        ({"eos_token_id": "x"}, DamagedFile, "eos_token_id is 'x'"),
    ],
)
def test_damaged_tokenizers_are_refused(
    changes: dict[str, Any], error: type[BlockpressError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        read_tokenizer(header_of(tmp_path, **changes))
    assert words in caught.value.message
