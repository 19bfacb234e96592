"""Chat: from messages to the prompt's token ids, and from the model's tokens to its parsed answer.

    messages --template, prompt--> ids and pictures       messages, schemas, template, prompt
    ids --parser--> text, reasoning, tool calls           parser, sections, tool_calls, call_*
    both together; thinking budget and retries            conversation, turn

Invariant: no import of torch or transformers; an invalid conversation is refused by name before any computation.
Run it:  python -m pytest tests/chat
"""

from __future__ import annotations

from blockpress.chat.conversation import Chat, EncodedChat, check_options
from blockpress.chat.messages import Media
from blockpress.chat.parser import Piece, Section, SpecialTokens, TextDelta, TurnParser
from blockpress.chat.prompt import ChatPrompt, encode_chat
from blockpress.chat.template import ChatTemplate
from blockpress.chat.tool_calls import MalformedToolCall, ToolCall
from blockpress.chat.turn import RETRIES, ChatOutputProcessor

__all__ = [
    "RETRIES",
    "Chat",
    "ChatOutputProcessor",
    "ChatPrompt",
    "ChatTemplate",
    "EncodedChat",
    "MalformedToolCall",
    "Media",
    "Piece",
    "Section",
    "SpecialTokens",
    "TextDelta",
    "ToolCall",
    "TurnParser",
    "check_options",
    "encode_chat",
]
