"""What people type and read: tokenizer, chat template, prompt, stream decoder, and what a model's turn says.

Why: the model knows numbers, people know text; everything between the two is in this room, and no tensor is.

Invariant: no import of torch or transformers.

Run: python -m pytest tests/text
"""

from __future__ import annotations

from .calls import BrokenCall, ToolCall
from .messages import Media
from .prompt import ChatPrompt, encode_chat
from .stream import StreamDecoder
from .template import ChatTemplate
from .tokenizer import Tokenizer
from .turns import Controls, Piece, Said, Section, TurnParser

__all__ = [
    "BrokenCall",
    "ChatPrompt",
    "ChatTemplate",
    "Controls",
    "Media",
    "Piece",
    "Said",
    "Section",
    "StreamDecoder",
    "Tokenizer",
    "ToolCall",
    "TurnParser",
    "encode_chat",
]
