"""A tokenizer for the tests of this room: our own small one (Gemma 4's is that of all tests)."""

from __future__ import annotations

import pytest

from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("digits")
    write_digits_tokenizer(folder)
    return Tokenizer.from_directory(folder)
