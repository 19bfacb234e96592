"""Token ids to text and back: the tokenizer, and the decoder that gives text as soon as it will not change any more.

Why: the model knows numbers, people know text. What is said in a conversation is the matter of `chat`.

Invariant: no import of torch or transformers.
Run it:  python -m pytest tests/text
"""

from __future__ import annotations

from blockpress.text.stream import StreamDecoder
from blockpress.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
