"""Tokenizers for the tests of this room: Gemma 4's where it lies beside the checkout, and our own small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer

GEMMA = Path(__file__).parents[2] / "../shared/data/gemma4-tokenizer"


@pytest.fixture(scope="session")
def gemma() -> Tokenizer:
    tokenizer = Tokenizer.find(GEMMA)
    if tokenizer is None:
        pytest.skip("the Gemma 4 tokenizer is not at ../shared/data/gemma4-tokenizer")
    return tokenizer


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("digits")
    write_digits_tokenizer(folder)
    return Tokenizer.from_directory(folder)
