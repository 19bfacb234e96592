"""What people type and read: tokenizer, chat template and stream decoder.

Why: the model knows numbers, people know text; everything between the two is in this room, and no tensor is.

Invariant: no import of torch or transformers.

Run: python -m pytest tests/text
"""

from __future__ import annotations

from .stream import StreamDecoder
from .template import ChatTemplate
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StreamDecoder", "Tokenizer"]
