"""The tokenizer of our own small models, built in code: one character, one token.

Why: the shipped sudoku models use digits and newlines only. A vocabulary of sixteen ids, defined only here, keeps the
training data, the shipped files and the tests on the same ids.

Invariant: ids never change: 0 `<pad>`, 1 `<eos>`, 2 `<bos>`, 3 `<unk>`, 4 newline, 5 to 14 the digits 0 to 9, 15
`<|image|>`.

Run: python -c "from blockpress.text.builder import digits_tokenizer as t; print(t().encode('53').ids)"  ->  [2, 10, 8]
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

DIGITS_VOCABULARY: tuple[str, ...] = ("<pad>", "<eos>", "<bos>", "<unk>", "\n", *"0123456789", "<|image|>")
"""The pieces in the order of their ids."""

DIGITS_CONTROLS: tuple[str, ...] = ("<pad>", "<eos>", "<bos>", "<unk>", "<|image|>")
"""The pieces that are control tokens: written out in a text they become one token, and decoding skips them."""

DIGITS_MAX_LENGTH = 256
"""The context length in tokens that tokenizer_config.json names for these models."""


def digits_tokenizer() -> Tokenizer:
    """The character-level tokenizer of sudoku-nano: 16 ids, `<bos>` in front, anything unknown becomes `<unk>`.

    `encode(text, add_special_tokens=False)` omits `<bos>`. Decoding joins without spaces.
    """
    ids = {piece: number for number, piece in enumerate(DIGITS_VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    # `.` does not match a newline in this regex dialect, hence the class of all characters.
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in DIGITS_CONTROLS])
    return tokenizer


def write_digits_tokenizer(directory: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`, created if absent; old ones are replaced.

    `transformers.PreTrainedTokenizerFast.from_pretrained` and `blockpress.text.Tokenizer.from_directory` both read the
    result.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(digits_tokenizer().to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": DIGITS_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
