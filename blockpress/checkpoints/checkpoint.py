"""A checkpoint as one thing, whether it is a directory of files or one GGUF file, opened once and handed on.

    name --resolve--> path --Checkpoint--> config, quantization, generation, kind, tensors, tokenizer
                                |
                                +--> load_network, load_vision, survey, convert_checkpoint, blockpress.load

Why: who loads a model, shows it or makes it smaller should not care how it is kept; and what each of them asks of it
(a config, an index, a GGUF header of a big vocabulary, which takes most of a second) is not to be read again for each.

Invariant: a file that says what the checkpoint is gets read when something of it is first asked for, and then never
again; what cannot be read or meant is an error that names the file. Weights are read by who is handed the checkpoint.

Run it:  python -c "from blockpress.checkpoints import open_checkpoint; print(open_checkpoint('sudoku-nano').config)"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

from blockpress.checkpoints.files import (
    CONFIG,
    GENERATION,
    HF_QUANT_CONFIG,
    checkpoint_directory,
    expanded,
    read_object,
)
from blockpress.checkpoints.gguf import Gguf, understand
from blockpress.checkpoints.gguf.find import SUFFIX
from blockpress.checkpoints.gguf.header import Header, read_header
from blockpress.checkpoints.identify import CheckpointInfo, config_kind, gguf_kind, main_type
from blockpress.checkpoints.index import StoredTensor, read_index
from blockpress.checkpoints.locate import find_model
from blockpress.config import GenerationConfig, ModelConfig
from blockpress.config.quantization import Quantization
from blockpress.errors import ConfigError
from blockpress.text import Tokenizer


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What lies at `path`, a directory or a GGUF file. Making one reads nothing: see `open_checkpoint`, `opened_at`.

    `index` is what its index holds, where who found it has read that.
    """

    path: Path
    index: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def directory(self) -> Path:
        """The directory. ModelNotFound, CheckpointError: it is none, or holds no config.json."""
        return checkpoint_directory(self.path)

    @cached_property
    def is_gguf(self) -> bool:
        """Whether it is one file, of the name of a GGUF file."""
        file = expanded(self.path)
        return file.suffix == SUFFIX and file.is_file()

    @cached_property
    def header(self) -> Header | None:
        """The header of a GGUF file, whatever model it is of; None of a directory. Errors as `read_header`."""
        return read_header(expanded(self.path)) if self.is_gguf else None

    @cached_property
    def gguf(self) -> Gguf | None:
        """The GGUF file as one of ours; None of a directory. Errors as `open_gguf`."""
        return None if self.header is None else understand(self.header)

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """A directory's config.json as it stands. DamagedFile, CheckpointError: it cannot be read."""
        return read_object(self.directory / CONFIG)

    @cached_property
    def hf_quant_config(self) -> Mapping[str, Any] | None:
        """What ModelOpt wrote beside config.json, as it stands; None: nothing."""
        file = self.directory / HF_QUANT_CONFIG
        return read_object(file) if file.is_file() else None

    @cached_property
    def config(self) -> ModelConfig:
        """The shape of the network, whatever its weights are packed in.

        Raises:
            DamagedFile: config.json is not JSON. ConfigError: another family, or what the stack does not compute.
        """
        if self.gguf is not None:
            return self.gguf.config
        document = self.document
        with _understood(self.directory / CONFIG):
            return ModelConfig.from_dict(document)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the weights are packed, by config.json or by the file that ModelOpt writes beside it; None: they are not,
        or in the way of GGUF.

        Raises:
            ConfigError: in a way that is not read here.
        """
        if self.is_gguf:
            return None
        text = self.document.get("text_config")
        said, file = self.document.get("quantization_config"), CONFIG
        said = text.get("quantization_config") if said is None and isinstance(text, dict) else said
        if said is None:
            said, file = self.hf_quant_config, HF_QUANT_CONFIG
        if said is None:
            return None
        with _understood(self.directory / file):
            return Quantization.from_dict(said)

    @cached_property
    def generation(self) -> GenerationConfig:
        """How it wants to be sampled, and where it stops. Errors as `load_generation`."""
        return load_generation(self.directory, self.config) if self.gguf is None else self.gguf.generation

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of a directory's safetensors files, from the index and the headers. Errors as `read_index`."""
        return read_index(self.directory, self.index)

    @cached_property
    def kind(self) -> CheckpointInfo:
        """Its family and format, of a checkpoint that nothing here runs as well. Errors as `identify`, `read_index`."""
        if self.header is not None:
            return gguf_kind(self.header)
        return config_kind(self.document, lambda: self.hf_quant_config, self._main_type)

    def _main_type(self) -> str | None:
        tensors = list(self.tensors.values())
        return main_type(tensor.dtype for tensor in tensors if tensor.file == tensors[0].file)

    def checked(self) -> Checkpoint:
        """Itself, once all that it says of itself has been read and found good. Errors as `open_checkpoint`."""
        _ = load_config(self), self.generation
        return self

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` gives one, as far as can be said without building it."""
        if self.header is not None:
            return "tokenizer.ggml.tokens" in self.header.metadata
        return (self.directory / "tokenizer.json").is_file()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where the checkpoint has none. Raises CheckpointError: one that cannot be read."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return Tokenizer.find(self.directory) if self.gguf is None else self.gguf.tokenizer()


def open_checkpoint(name: str | Path) -> Checkpoint:
    """The checkpoint that goes by that name on this machine: nothing is fetched, and no weight is read.

    Raises:
        ModelNotFound, CheckpointError: nothing there, or files that cannot be used.
        ConfigError: a config that this package does not run, or weights packed in a way that it does not read.
    """
    return find_checkpoint(name).checked()


def find_checkpoint(name: str | Path) -> Checkpoint:
    """The same before any of it is checked. Raises ModelNotFound, CheckpointError: nothing there, or not the whole."""
    found = find_model(name)
    return Checkpoint(path=found.path, index=found.index)


def opened_at(place: str | Path | Checkpoint) -> Checkpoint:
    """The checkpoint of a directory or a GGUF file, which is opened now, or one that is open already."""
    return place if isinstance(place, Checkpoint) else Checkpoint(path=Path(place))


def load_config(path: str | Path | Checkpoint) -> ModelConfig:
    """Read a checkpoint's `config.json`, or what stands for it in a GGUF file.

    Raises:
        ModelNotFound, CheckpointError: no checkpoint there.
        DamagedFile: the file is not JSON.
        ConfigError: it is not a config that this package runs, or weights are packed in a way that it does not read.
    """
    checkpoint = opened_at(path)
    config, _ = checkpoint.config, checkpoint.quantization
    return config


def load_generation(path: str | Path, config: ModelConfig) -> GenerationConfig:
    """Read a checkpoint's `generation_config.json`; without one, the defaults and `config`'s stop ids.

    Raises:
        ModelNotFound, CheckpointError, DamagedFile: as `load_config`. ConfigError: a value that cannot be meant.
    """
    file = checkpoint_directory(path) / GENERATION
    data = read_object(file) if file.is_file() else {}
    with _understood(file):
        return GenerationConfig.from_dict(data, config)


@contextmanager
def _understood(file: Path) -> Iterator[None]:
    """A value of a type that nobody foresaw is the file's fault all the same."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{str(file)!r} is not understood: {error}", hint="fetch the file again") from error
