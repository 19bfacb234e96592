"""Token ids to text and back: the tokenizer, and the stream decoder that returns text as soon as it is final.

Why: the model reads token ids, people read text. The structure of a conversation belongs to `chat`.

Invariant: no import of torch or transformers.
Run it:  python -m pytest tests/text
"""

from __future__ import annotations

from blockpress.text.fences import CodeSpans
from blockpress.text.stream import StreamDecoder
from blockpress.text.tokenizer import Tokenizer

__all__ = ["CodeSpans", "StreamDecoder", "Tokenizer"]
