"""The tokenizer of a small chat model: a token for each character, the control tokens of a chat, and our own template."""

from __future__ import annotations

import tokenizers
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from blockpress.chat import ChatTemplate
from blockpress.text import Tokenizer

CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"]
CONTROLS += ["<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>']
VOCABULARY = [*CONTROLS, "<|image|>", "\n", *map(chr, range(32, 127))]


def backend() -> tokenizers.Tokenizer:
    """A token for each character, and the control tokens of a chat."""
    tokenizer = tokenizers.Tokenizer(WordLevel({p: n for n, p in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(p, special=True, normalized=False) for p in [*CONTROLS, "<|image|>"]]
    )
    return tokenizer


TOKENIZER = Tokenizer(
    backend(), config={"bos_token": "<bos>", "eos_token": "<eos>"}, chat_template=ChatTemplate.own().source
)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False)
