"""A checkpoint as one object, whether it is a directory of files or one GGUF file, opened once and passed on.

    name --resolve--> path --Checkpoint--> config, quantization, generation, kind, tensors, tokenizer
                                |
                                +--> load_network, load_vision, survey, convert_checkpoint, blockpress.load

Why: code that loads, describes or quantises a model should not care how it is stored; and what each needs (a config, an
index, a GGUF header with a large vocabulary, which takes most of a second) should not be read again for each of them.

Invariant: each file that describes the checkpoint is read when it is first needed and never again; one that cannot be
read or is invalid is an error that names it. Weights are read by whoever the checkpoint is passed to.

Run it:  python -c "from blockpress.checkpoints import open_checkpoint; print(open_checkpoint('sudoku-nano').config)"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from blockpress.checkpoints.files import (
    CONFIG,
    GENERATION,
    GGUF_SUFFIX,
    HF_QUANT_CONFIG,
    checkpoint_directory,
    expanded,
    read_object,
)
from blockpress.checkpoints.identify import CheckpointInfo, config_kind, gguf_kind, main_type
from blockpress.checkpoints.index import StoredTensor, read_index
from blockpress.checkpoints.locate import find_model
from blockpress.config import GenerationConfig, ModelConfig
from blockpress.config.quantization import Quantization
from blockpress.errors import ConfigError

if TYPE_CHECKING:
    from blockpress.checkpoints.gguf.header import Header
    from blockpress.checkpoints.gguf.load import Gguf
    from blockpress.text import Tokenizer


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The directory or GGUF file at `path`. Constructing one reads nothing: see `open_checkpoint`, `opened_at`.

    `index` is the content of its safetensors index, where finding the checkpoint has already read it.
    """

    path: Path
    index: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def directory(self) -> Path:
        """The directory. ModelNotFound, CheckpointError: it does not exist, or holds no config.json."""
        return checkpoint_directory(self.path)

    @cached_property
    def is_gguf(self) -> bool:
        """Whether it is one file whose name ends in .gguf."""
        file = expanded(self.path)
        return file.suffix == GGUF_SUFFIX and file.is_file()

    @cached_property
    def header(self) -> Header | None:
        """The header of a GGUF file, of any architecture; None for a directory. Errors as `read_header`."""
        if not self.is_gguf:
            return None
        from blockpress.checkpoints.gguf.header import read_header

        return read_header(expanded(self.path))

    @cached_property
    def gguf(self) -> Gguf | None:
        """The GGUF file as a model that we run; None for a directory. Errors as `open_gguf`."""
        if self.header is None:
            return None
        from blockpress.checkpoints.gguf.load import understand

        return understand(self.header)

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """A directory's config.json as a JSON object. DamagedFile, CheckpointError: it cannot be read."""
        return read_object(self.directory / CONFIG)

    @cached_property
    def hf_quant_config(self) -> Mapping[str, Any] | None:
        """The content of ModelOpt's hf_quant_config.json; None where there is no such file."""
        file = self.directory / HF_QUANT_CONFIG
        return read_object(file) if file.is_file() else None

    @cached_property
    def config(self) -> ModelConfig:
        """The shape of the network, however its weights are packed.

        Raises:
            DamagedFile: config.json is not JSON. ConfigError: another family, or something the stack does not compute.
        """
        if self.gguf is not None:
            return self.gguf.config
        document = self.document
        with _config_errors(self.directory / CONFIG):
            return ModelConfig.from_dict(document)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the weights are packed, by config.json or ModelOpt's hf_quant_config.json; None: they are not, or it is a
        GGUF file.

        Raises:
            ConfigError: a scheme that is not supported.
        """
        if self.is_gguf:
            return None
        text = self.document.get("text_config")
        section, file = self.document.get("quantization_config"), CONFIG
        section = text.get("quantization_config") if section is None and isinstance(text, dict) else section
        if section is None:
            section, file = self.hf_quant_config, HF_QUANT_CONFIG
        if section is None:
            return None
        with _config_errors(self.directory / file):
            return Quantization.from_dict(section)

    @cached_property
    def generation(self) -> GenerationConfig:
        """The checkpoint's own sampling settings and stop ids. Errors as `load_generation`."""
        return load_generation(self.directory, self.config) if self.gguf is None else self.gguf.generation

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of a directory's safetensors files, from the index and the headers. Errors as `read_index`."""
        return read_index(self.directory, self.index)

    @cached_property
    def kind(self) -> CheckpointInfo:
        """Its family and format, also for a model that we do not run. Errors as `identify`, `read_index`."""
        if self.header is not None:
            return gguf_kind(self.header)
        return config_kind(self.document, lambda: self.hf_quant_config, self._main_type)

    def _main_type(self) -> str | None:
        tensors = list(self.tensors.values())
        return main_type(tensor.dtype for tensor in tensors if tensor.file == tensors[0].file)

    def checked(self) -> Checkpoint:
        """Itself, after its configs have been read and found valid. Errors as `open_checkpoint`."""
        _ = load_config(self), self.generation
        return self

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` returns one, as far as that is known without building it."""
        if self.header is not None:
            return "tokenizer.ggml.tokens" in self.header.metadata
        return (self.directory / "tokenizer.json").is_file()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where the checkpoint has none. Raises CheckpointError: one that cannot be read."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        if self.gguf is not None:
            return self.gguf.tokenizer()
        from blockpress.text import Tokenizer

        return Tokenizer.find(self.directory)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """The checkpoint of that name on this machine: nothing is downloaded, and no weight is read.

    Raises:
        ModelNotFound, CheckpointError: nothing there, or files that cannot be used.
        ConfigError: a config that this package does not run, or weights packed in a way that it does not read.
    """
    return find_checkpoint(name).checked()


def find_checkpoint(name: str | Path) -> Checkpoint:
    """The same, with nothing checked yet. Raises ModelNotFound, CheckpointError: nothing there, or incomplete."""
    located = find_model(name)
    return Checkpoint(path=located.path, index=located.index)


def opened_at(source: str | Path | Checkpoint) -> Checkpoint:
    """A checkpoint for a directory or a GGUF file; one that is already open is returned as it is."""
    return source if isinstance(source, Checkpoint) else Checkpoint(path=Path(source))


def load_config(path: str | Path | Checkpoint) -> ModelConfig:
    """Read a checkpoint's `config.json`, or the same from a GGUF file's metadata.

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
        ModelNotFound, CheckpointError, DamagedFile: as `load_config`. ConfigError: an invalid value.
    """
    file = checkpoint_directory(path) / GENERATION
    data = read_object(file) if file.is_file() else {}
    with _config_errors(file):
        return GenerationConfig.from_dict(data, config)


@contextmanager
def _config_errors(file: Path) -> Iterator[None]:
    """Any exception from parsing a value is the file's fault: it becomes a ConfigError that names the file."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{str(file)!r} is not understood: {error}", hint="fetch the file again") from error
