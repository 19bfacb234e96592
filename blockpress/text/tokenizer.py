"""Text to token ids and back, with a checkpoint's own tokenizer files.

Why: a model reads token ids. Text must become exactly the ids it was trained on, and nothing may be lost silently.

Invariant: `encode` returns ids for all of the text or raises; `decode` returns text for all of the ids or raises.

Run: python -m pytest tests/text/test_tokenizer.py
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import tokenizers

from blockpress.errors import CheckpointError, DamagedFile, ModelNotFound, TextError
from blockpress.text.detokenizer import is_lossless, piece_for_display, token_bytes

__all__ = ["Tokenizer"]

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"


@final
class Tokenizer:
    """A tokenizer with its checkpoint's settings.

    `special_tokens`: from the config's names (`bos_token`, `eos_token`, ...) to their text; chat templates read them.
    `chat_template`: the source of the checkpoint's template, or None. `backend`: the wrapped `tokenizers.Tokenizer`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        source: Path | None = None,
    ) -> None:
        """Wrap `backend` and switch off its own truncation and padding: both change texts silently.

        `config`: the content of tokenizer_config.json. `source`: the directory that `save` copies from.
        Raises DamagedFile, which names a special token of the config that is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = _special_tokens(config or {})
        self.chat_template = chat_template
        self._config = dict(config or {})
        self._source = source
        self.vocab_size: int = backend.get_vocab_size()
        """The number of pieces, control tokens included."""
        self.bos = self._id_of("bos_token")
        self.eos = self._id_of("eos_token")
        self.pad = self._id_of("pad_token")
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(number for number, token in added.items() if token.special)
        """The control tokens that `decode` skips."""
        self._unknown = self._unknown_id()
        self._lossless = is_lossless(backend)
        self._pieces: list[bytes | None] | None = None
        self._add_bos = self._flag("add_bos_token", self.bos, "bos_token")
        self._add_eos = self._flag("add_eos_token", self.eos, "eos_token")
        self._adds_bos_itself = self.bos is not None and backend.encode("").ids[:1] == [self.bos]

    @classmethod
    def find(cls, path: str | Path) -> Tokenizer | None:
        """The tokenizer in directory `path`, or None if there is no tokenizer.json. Errors as `from_directory`."""
        return cls.from_directory(path) if (Path(path) / _TOKENIZER).is_file() else None

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, the config, special tokens and chat template next to it.

        The template is taken from chat_template.jinja, else chat_template.json, else the config's `chat_template` (of
        several named ones, `default`). Raises ModelNotFound without the directory, CheckpointError without
        tokenizer.json, DamagedFile for one that cannot be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ModelNotFound(
                f"there is no directory {str(folder)!r}", hint="give the directory that holds tokenizer.json"
            )
        file = folder / _TOKENIZER
        if not file.is_file():
            raise CheckpointError(
                f"there is no {_TOKENIZER} in {str(folder)!r}", hint="copy it from the model's repository"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        # The library raises bare Exception for every fault of a file.
        except Exception as error:
            raise DamagedFile(f"{str(file)!r} is not a tokenizer: {error}", hint="fetch the file again") from error
        config = {**_read_object(folder / _SPECIAL), **_read_object(folder / _CONFIG)}
        return cls(backend, config=config, chat_template=_find_template(folder, config), source=folder)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The ids of `text`.

        `add_special`: put `bos` in front (and `eos` at the end) if the tokenizer's own post-processor does so or its
        config has `add_bos_token` (`add_eos_token`). A text that already starts with `bos` gets no second one.

        Control tokens that are written out in the text, such as `<bos>` or `<|turn>`, become those control tokens: chat
        templates consist of them. Untrusted text that is put into a template can write them too.

        Raises TextError, which names the first character that the vocabulary cannot represent, with its line and column
        (both from 1). A tokenizer with a token for every byte represents all text except lone surrogates. What a
        normaliser rewrites does not count as lost.
        """
        encoding = self._encoding(text, add_special)
        if not self._lossless:
            lost = self._first_lost(text, encoding)
            if lost is not None:
                raise self._unrepresentable(text, lost)
        ids: list[int] = encoding.ids
        if add_special and self.bos is not None:
            if self._adds_bos_itself and ids[:2] == [self.bos, self.bos]:
                ids = ids[1:]
            elif self._add_bos and ids[:1] != [self.bos]:
                ids = [self.bos, *ids]
        if add_special and self._add_eos and self.eos is not None and ids[-1:] != [self.eos]:
            ids = [*ids, self.eos]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`, spaces unchanged; `skip_special` skips control tokens. TextError names an unknown id."""
        return self.backend.decode(self.checked_ids(ids), skip_special_tokens=skip_special)

    def token(self, id: int) -> str:
        """One token's text for a terminal, unprintable characters escaped. TextError names an unknown id."""
        return piece_for_display(self.backend, self.checked_ids([id])[0])

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token adds to a text; None for control tokens. TextError if it depends on others."""
        if self._pieces is None:  # a second or more for a large vocabulary
            self._pieces = token_bytes(self.backend)
        pieces = self._pieces
        if pieces is None:
            raise TextError(
                "what a token of this tokenizer writes depends on the tokens around it",
                hint="constraints need a byte-level decoder, or one that replaces and joins pieces",
            )
        return pieces

    def checked_ids(self, ids: Sequence[int]) -> list[int]:
        """`ids` as plain integers; TextError names the first that is not an integer or not in the vocabulary."""
        checked: list[int] = []
        for position, number in enumerate(ids):
            try:
                value = operator.index(number)
            except TypeError:
                raise TextError(
                    f"token id {number!r} at position {position} is no integer", hint="give integers"
                ) from None
            # The library takes unsigned 32-bit integers.
            if not 0 <= value < 2**32 or self.backend.id_to_token(value) is None:
                raise TextError(
                    f"token id {value} at position {position} is outside the vocabulary of {self.vocab_size} pieces",
                    hint=f"ids go from 0 to {self.vocab_size - 1}; were they made with another tokenizer?",
                )
            checked.append(value)
        return checked

    def save(self, directory: str | Path) -> None:
        """Write the files into `directory` (created if absent): copies of those it was read from, else new ones."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self._source is not None:
            names = (_TOKENIZER, _CONFIG, _SPECIAL, _TEMPLATE, _TEMPLATE_JSON)
            for file in [self._source / name for name in names if (self._source / name).is_file()]:
                if file.resolve() != (folder / file.name).resolve():
                    shutil.copyfile(file, folder / file.name)
            return
        (folder / _TOKENIZER).write_text(
            self.backend.to_str(pretty=True), encoding="utf-8"
        )  # `save` has its own errors
        (folder / _CONFIG).write_text(json.dumps(self._config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / _TEMPLATE).write_text(self.chat_template, encoding="utf-8", newline="")

    def _encoding(self, text: str, add_special: bool) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise TextError(f"{text!r:.80} is not text", hint="give a string")
        try:
            text.encode("utf-8")
            return self.backend.encode(text, add_special_tokens=add_special)
        except UnicodeEncodeError as error:
            raise self._unrepresentable(text, error.start) from None
        # A model without an unknown token refuses the whole text with a bare Exception.
        except Exception as error:
            refused = {char for char in set(text) if self._refuses(char)}
            if refused:
                position = next(position for position, char in enumerate(text) if char in refused)
                raise self._unrepresentable(text, position) from error
            raise TextError(f"the tokenizer refuses the text: {error}", hint="give text of the model's kind") from error

    def _refuses(self, char: str) -> bool:
        try:
            self.backend.encode(char)
        except Exception:
            return True
        return False

    def _first_lost(self, text: str, encoding: tokenizers.Encoding) -> int | None:
        """The index of the first character that became the unknown token or that no token covers."""
        reach = 0
        gap: int | None = None
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if start > reach and gap is None:
                gap = reach
            # The unknown token written out in the text is intended.
            if number == self._unknown and end > start and text[start:end] != self.backend.id_to_token(number):
                return start if gap is None else self._vanished(text, gap, start)
            reach = max(reach, end)
        if reach < len(text) and gap is None:
            gap = reach
        return None if gap is None else self._vanished(text, gap, None)

    def _vanished(self, text: str, gap: int, otherwise: int | None) -> int | None:
        # A space between words may have no token and yet be decoded, as some tokenizers put one between any two.
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.backend.decode(ids, skip_special_tokens=False) == text:
            return otherwise
        # After a dropped character some models report offsets that are too low, so the gap shows only that one is lost.
        dropped = {char for char in set(text) if not self.backend.encode(char, add_special_tokens=False).ids}
        return next((position for position, char in enumerate(text) if char in dropped), gap)

    def _unrepresentable(self, text: str, position: int) -> TextError:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        char = text[position]
        known = sorted(self.backend.get_vocab()) if self.vocab_size <= 64 else []
        hint = f"remove or replace it; the {self.vocab_size} pieces are {known}" if known else "remove or replace it"
        return TextError(
            f"the vocabulary has no token for {char!r} (U+{ord(char):04X}) at line {line}, column {column}",
            hint=hint,
        )

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        try:
            number = self.backend.token_to_id(token)
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            number = None
        if number is None:
            raise DamagedFile(
                f"{name}={token!r} is not in the vocabulary", hint=f"correct {_CONFIG} or take the right {_TOKENIZER}"
            )
        return number

    def _flag(self, flag: str, number: int | None, name: str) -> bool:
        value = self._config.get(flag) or False
        if value is not False and value is not True:
            raise DamagedFile(f"{flag}={value!r} in {_CONFIG} is neither true nor false", hint="correct the file")
        if value and number is None:
            raise DamagedFile(
                f"{_CONFIG} has {flag}=true but no {name}", hint=f"name the {name} or set {flag} to false"
            )
        return value

    def _unknown_id(self) -> int | None:
        model = self.backend.model
        if isinstance(model, tokenizers.models.Unigram):
            # The only model with the unknown token as an id, and only in its saved state.
            number: int | None = json.loads(model.__getstate__()).get("unk_id")
            return number
        token = model.unk_token
        return None if token is None else self.backend.token_to_id(token)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
        elif name in ("bos_token", "eos_token", "pad_token") and value is not None:
            raise DamagedFile(f"{name}={value!r} is not a token's text", hint=f"correct {_CONFIG}")
    return tokens


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    # RecursionError: JSON nested too deeply.
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{str(file)!r} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{str(file)!r} holds {type(value).__name__}, not an object", hint="fetch the file again")
    return value


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / _TEMPLATE
    if file.is_file():
        try:
            return file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedFile(f"{str(file)!r} is not UTF-8 text: {error}", hint="fetch the file again") from error
    value = _read_object(folder / _TEMPLATE_JSON).get("chat_template", config.get("chat_template"))
    if isinstance(value, list):
        named = {str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, Mapping)}
        value = named.get("default")
        if value is None:
            raise DamagedFile(
                f"the chat templates in {str(folder)!r} are named {sorted(named)}",
                hint="one must be named 'default'",
            )
    if value is not None and not isinstance(value, str):
        raise DamagedFile(
            f"chat_template in {str(folder)!r} is {type(value).__name__}, not text", hint="correct the file"
        )
    return value
