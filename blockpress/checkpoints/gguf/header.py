"""The header of a GGUF file: its metadata and the offset of each tensor; and reading one tensor's bytes.

    "GGUF" | version u32 | tensors u64 | keys u64 | keys: name, type, value | tensors: name, dims, type, offset | data

The reader of the `gguf` package maps the whole file into memory and trusts its counts: one flipped byte in an array's
length makes it allocate without limit. So the header is read here, in 200 lines, and the package is used only for block
layouts that `ops.blocks` does not have.

Invariant: whatever the bytes, reading a header gives offsets within the file or one error, and takes no more memory
than a small multiple of `MOST_HEADER`. Every byte after the header belongs to one tensor or is padding.

Run it:  python -m pytest tests/checkpoints/test_gguf_damage.py
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import numpy.typing
import torch
from jaxtyping import UInt8
from torch import Tensor

from blockpress.checkpoints.files import fetch_hint
from blockpress.checkpoints.gguf.types import GgmlType, ggml_type
from blockpress.errors import CheckpointError, DamagedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_HEADER = 1 << 28
"""Most bytes of a header; the largest published one (262,144 tokens, 514,906 merges) takes 16 MiB."""
PIECE = 1 << 24
"""Bytes that are read and compared at once."""
MOST_TENSORS, MOST_KEYS, MOST_DIMS, MOST_NAME = 1 << 16, 1 << 16, 4, 1 << 16

# The format's value types by their codes; 7 is a boolean, 8 a string, 9 an array.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLAG, _TEXT, _ARRAY = 7, 8, 9


@dataclass(frozen=True, kw_only=True)
class StoredBlocks:
    """One tensor on disk. `shape` has the outermost axis first, as torch has it; the file has it last."""

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    start: int
    bytes: int

    def memory(self, itemsize: int) -> int:
        """Bytes that it takes in a network whose floats take `itemsize` bytes."""
        return self.bytes if self.kind.dtype is None else math.prod(self.shape) * itemsize

    def pieces(self) -> Iterator[StoredBlocks]:
        """The same bytes in pieces of at most `PIECE`, in order."""
        for start in range(0, self.bytes, PIECE):
            yield replace(self, start=self.start + start, bytes=min(PIECE, self.bytes - start))


@dataclass(frozen=True, kw_only=True)
class Header:
    """What precedes the data of a GGUF file. Arrays of numbers are numpy arrays, arrays of strings are lists."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredBlocks]


def read_header(file: Path) -> Header:
    """Read the metadata and the list of tensors.

    Raises:
        DamagedFile: no GGUF file, a truncated one, or one with impossible values.
        CheckpointError: it cannot be read, or is a version of GGUF that is not supported.
    """
    try:
        with file.open("rb") as stream:
            return _HeaderReader(file, stream).header()
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}", hint="check the file and its rights") from error


def read_bytes(stream: BinaryIO, tensor: StoredBlocks, file: Path) -> UInt8[Tensor, " bytes"]:
    """A tensor's bytes in newly allocated memory.

    Raises:
        DamagedFile: the file was truncated after its header was read.
    """
    data = torch.empty(tensor.bytes, dtype=torch.uint8)
    view = data.numpy().data
    stream.seek(tensor.start)
    done = 0
    while done < tensor.bytes:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise DamagedFile(
                f"{str(file)!r} ends within the tensor {tensor.name}", hint="fetch the file again and compare its size"
            )
        done += count
    return data


@final
class _HeaderReader:
    """Parses a header front to back. `remaining` counts the bytes it may still take, so that no length is trusted."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.size = file.stat().st_size
        self.remaining = min(self.size, MOST_HEADER)

    def header(self) -> Header:
        if self.take(4, "the magic number") != MAGIC:
            raise self.damaged("it does not begin with GGUF")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{str(self.file)!r} is GGUF of version {version}",
                hint="versions 2 and 3 in little-endian order are read; convert the file with a current llama.cpp",
            )
        tensors, keys = self.number("Q", "the tensor count"), self.number("Q", "the key count")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise self.damaged(f"it announces {tensors} tensors and {keys} keys")
        metadata = {}
        for _ in range(keys):
            name = self.text("a key", MOST_NAME)
            if name in metadata:
                raise self.damaged(f"it has the key {name} twice")
            metadata[name] = self.value(name)
        return Header(file=self.file, metadata=metadata, tensors=self.tensors(tensors, metadata))

    def tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, StoredBlocks]:
        entries = [self.entry() for _ in range(count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment not in [1 << bit for bit in range(3, 17)]:
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two from 8 to 65536")
        start = _padded(self.stream.tell(), alignment)
        end, stored = start, {}
        for name, shape, kind, offset in entries:
            size = _bytes(shape, kind)
            # Tensors follow each other without gaps, as ggml demands: this finds a wrong offset or size.
            if start + offset != end:
                raise self.damaged(f"the tensor {name} is at {offset}, where the one before it ends at {end - start}")
            if end + size > self.size:
                raise self.damaged(f"the tensor {name} ends at byte {end + size} of {self.size}")
            if name in stored:
                raise self.damaged(f"it has the tensor {name} twice")
            stored[name] = StoredBlocks(name=name, shape=shape, kind=kind, start=end, bytes=size)
            end = _padded(end + size, alignment)
        return stored

    def entry(self) -> tuple[str, tuple[int, ...], GgmlType, int]:
        name = self.text("a tensor's name", MOST_NAME)
        dims = self.number("I", f"the axes of {name}")
        if not 1 <= dims <= MOST_DIMS:
            raise self.damaged(f"the tensor {name} has {dims} axes")
        shape = tuple(reversed([self.number("Q", f"the shape of {name}") for _ in range(dims)]))
        kind = ggml_type(self.number("I", f"the type of {name}"), name)
        if shape[-1] % kind.values or not all(shape):
            raise self.damaged(f"the tensor {name} of type {kind.name} has the shape {list(shape)}")
        return name, shape, kind, self.number("Q", f"the offset of {name}")

    def value(self, name: str) -> Any:
        code = self.number("I", f"the type of {name}")
        if code == _TEXT:
            return self.text(name)
        if code != _ARRAY:
            return _plain(self.numbers(code, 1, name)[0])
        inner, count = self.number("I", f"the type of {name}"), self.number("Q", f"the length of {name}")
        if inner != _TEXT:
            return self.numbers(inner, count, name)
        # A wrong count ends in an error at the end of the header: the list grows string by string.
        return [self.text(name) for _ in range(count)]

    def numbers(self, code: int, count: int, name: str) -> np.typing.NDArray[Any]:
        if code != _FLAG and code not in _SCALARS:
            raise self.damaged(f"{name} has values of type {code}")
        dtype = np.dtype(_SCALARS.get(code, "<u1"))
        values = np.frombuffer(self.take(count * dtype.itemsize, name), dtype=dtype)
        if code == _FLAG:
            if (values > 1).any():
                raise self.damaged(f"{name} is a truth value of {values.max()}")
            return values.astype(bool)
        return values

    def text(self, what: str, most: int = MOST_HEADER) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.damaged(f"{what} announces {length} bytes of text")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def number(self, form: str, what: str) -> int:
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize(form), what))
        return int(value)

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining:
            raise self.damaged(f"the header ends within {what}")
        self.remaining -= count
        data = self.stream.read(count)
        if len(data) != count:
            raise self.damaged(f"the header ends within {what}")
        return data

    def damaged(self, what: str) -> DamagedFile:
        return DamagedFile(f"{str(self.file)!r} is damaged or no GGUF file: {what[:300]}", hint=fetch_hint(self.file))


def _plain(value: Any) -> Any:
    """A Python value. For a float32 the shortest decimal: 0.1 stored in four bytes is read as 0.1."""
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _bytes(shape: tuple[int, ...], kind: GgmlType) -> int:
    return math.prod(shape) // kind.values * kind.bytes
