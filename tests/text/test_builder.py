"""The sixteen ids of the digits tokenizer are fixed, and other programs read its files as we do."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockpress.text.builder import DIGITS_VOCABULARY, digits_tokenizer, write_digits_tokenizer


def test_ids_of_the_digits_tokenizer_are_fixed():
    tokenizer = digits_tokenizer()
    expected = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *"0123456789", "<|image|>"]
    assert [tokenizer.id_to_token(number) for number in range(17)] == [*expected, None]
    assert list(DIGITS_VOCABULARY) == expected


def test_every_character_is_one_token_after_bos():
    tokenizer = digits_tokenizer()
    assert tokenizer.encode("53\n\n0<|image|>9").ids == [2, 10, 8, 4, 4, 5, 15, 14]
    assert tokenizer.encode("5x😀\r").ids == [2, 10, 3, 3, 3]
    assert tokenizer.encode("12", add_special_tokens=False).ids == [6, 7]


def test_decoding_joins_without_spaces_and_leaves_controls_out():
    tokenizer = digits_tokenizer()
    assert tokenizer.decode([2, 10, 8, 4, 15, 5, 1, 0]) == "53\n0"
    assert tokenizer.decode([2, 10, 15], skip_special_tokens=False) == "<bos>5<|image|>"


@pytest.mark.parity
def test_transformers_reads_the_files(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    write_digits_tokenizer(tmp_path / "new")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    assert theirs("53\n<|image|>")["input_ids"] == [2, 10, 8, 4, 15]
    assert theirs.decode([10, 4, 8]) == "5\n3"
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert (len(theirs), theirs.model_max_length) == (16, 256)
