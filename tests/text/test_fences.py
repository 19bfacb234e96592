"""Where fenced code stands in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpress.text.fences import CodeSpans
from tests.chat_tokenizer import TOKENIZER, ids

SPANS = CodeSpans(TOKENIZER)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code `here`\n", []),
        ("a\n```sh\nls -l\n```\nb", ["ls -l\n"]),
        ("~~~\nx\n\n~~~~\n```py\ny", ["x\n\n", "y"]),
        ("````\n```\nx\n```\n````\n", ["```\nx\n```\n"]),
        ("   ```\na\n    ```\nb\n ```\n", ["a\n    ```\nb\n"]),
        ("``` a`b\nx\n", []),
        ("```\n```\n", []),
        ("```", []),
        ("text ```\nx\n```\ny", ["y"]),
        ("", []),
    ],
)
def test_code_is_what_commonmark_fences(text: str, code: list[str]) -> None:
    tokens = ids(text)
    assert [TOKENIZER.decode(tokens[start:stop]) for start, stop in SPANS(tokens)] == code


@given(st.text("`~a \n", max_size=40))
def test_spans_are_in_order_and_in_the_answer(text: str) -> None:
    tokens = ids(text)
    flat = [place for span in SPANS(tokens) for place in span]
    assert flat == sorted(flat) and all(0 <= place <= len(tokens) for place in flat)


def test_rules_of_one_tokenizer_are_equal() -> None:
    assert CodeSpans(TOKENIZER) == SPANS
