"""Safetensors files of any size, read and written piece by piece.

    header      every tensor's type, shape and offsets; written first, since it follows from the shapes alone
    tensors     each filled in pieces, in any order, at its own offset; read in slices of its first axis

The library writes a file from tensors that are all in memory, and reads a slice through the whole tensor: without
mapping the file, one expert of the published model costs it the 1 GB of its stack.

Invariant: a writer that ends without an error has filled every byte of every tensor exactly once; a reader reads the
requested bytes and no others.

Run it:  python -m pytest tests/checkpoints/test_stream.py
Source: https://huggingface.co/docs/safetensors (the header; the data has no holes).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from blockpress.checkpoints.atomic import SHARD_BYTES, in_shards, write_index
from blockpress.errors import CheckpointError, DamagedFile

CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""The format's names of dtypes."""

_TYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A tensor that will be written; `code` is the format's name of its type."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        bits = re.search(r"\d+", self.code)
        return max(1, (int(bits[0]) if bits else 8) // 8)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.itemsize


class StreamReader:
    """Reads slices of one file's tensors; its header was checked by `read_index`. A context manager."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb")
        size = int.from_bytes(self._file.read(8), "little")
        self._entries: dict[str, dict[str, Any]] = json.loads(self._file.read(size))
        self._data = 8 + size

    def __enter__(self) -> StreamReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of the tensor's first axis, in newly allocated memory; None: to its end.

        Raises:
            DamagedFile: the file was truncated after its header was read. CheckpointError: it cannot be read.
        """
        entry = self._entries[name]
        slot = Slot(name=name, code=entry["dtype"], shape=tuple(entry["shape"]))
        shape = slot.shape
        if shape:
            shape = ((shape[0] if stop is None else min(stop, shape[0])) - start, *shape[1:])
        row = math.prod(shape[1:]) * slot.itemsize
        data = bytearray(math.prod(shape) * slot.itemsize)
        try:
            self._file.seek(self._data + entry["data_offsets"][0] + start * row)
            count = self._file.readinto(data)
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name!r} cannot be read: {error}", hint="check the disk that it is on"
            ) from error
        if count != len(data):
            raise DamagedFile(f"{self._file.name!r} is cut short: it lacks rows of {name}", hint="fetch the file again")
        return torch.frombuffer(data, dtype=_TYPES[slot.code]).view(shape)


@dataclass
class _Extent:
    """A tensor's range in its file, from the first byte that is not written yet."""

    file: BinaryIO
    start: int
    end: int


@dataclass
class StreamWriter:
    """Writes tensors in pieces; see `streamed`, which creates and finishes it."""

    extents: dict[str, _Extent] = field(default_factory=dict)

    def write(self, name: str, piece: Tensor) -> None:
        """Append a piece to the tensor of that name: the rows that follow those already written, or all of it."""
        extent = self.extents[name]
        data = piece.detach().contiguous().flatten().view(torch.uint8).numpy()
        assert extent.start + len(data) <= extent.end, f"{name} is given more bytes than it has room for"
        extent.file.seek(extent.start)
        extent.file.write(data.data)
        extent.start += len(data)


@contextmanager
def streamed(folder: Path, slots: Iterable[Slot], shard_bytes: int = SHARD_BYTES) -> Iterator[StreamWriter]:
    """A writer of one file, or of shards and their index where `slots` exceed `shard_bytes`.

    Raises:
        RequestError: `shard_bytes` is not a whole number of at least 1.
    """
    shards = in_shards(slots, shard_bytes)
    writer = StreamWriter()
    with ExitStack() as files:
        for name, shard in shards.items():
            file = files.enter_context((folder / name).open("wb"))
            writer.extents |= _begin(file, shard)
        yield writer
    unfilled = [name for name, extent in writer.extents.items() if extent.start != extent.end]
    assert not unfilled, f"{len(unfilled)} tensors are not whole, {unfilled[0]} among them"
    write_index(folder, shards)


def _begin(file: BinaryIO, shard: list[Slot]) -> dict[str, _Extent]:
    """Write the header, reserve space for the data, and return the extent of each tensor."""
    extents: dict[str, _Extent] = {}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest values first, so that each tensor is aligned to its values' size, as readers that map files need.
    for slot in sorted(shard, key=lambda slot: -slot.itemsize):
        assert slot.name not in extents, f"two tensors are called {slot.name}"
        start, end = end, end + slot.bytes
        header[slot.name] = {"dtype": slot.code, "shape": list(slot.shape), "data_offsets": [start, end]}
        extents[slot.name] = _Extent(file=file, start=start, end=end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for extent in extents.values():
        extent.start, extent.end = extent.start + 8 + len(text), extent.end + 8 + len(text)
    file.truncate(8 + len(text) + end)
    return extents
