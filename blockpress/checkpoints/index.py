"""The safetensors files of a checkpoint: which file holds which tensor, and reading one tensor at a time.

Files are read with pread, not mapped into memory: mapped pages stay resident until the file is closed, which would
keep a whole shard in memory as well as the weights, and truncating a mapped file kills the process.

Invariant: the catalogue holds every tensor of every shard exactly once, and opens no file outside the directory.

Run it:  python -m pytest tests/checkpoints/test_index.py
Source: https://huggingface.co/docs/safetensors (the header; every byte of data belongs to one tensor).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from blockpress.checkpoints.files import INDEX, SINGLE, fetch_hint, read_object
from blockpress.errors import CheckpointError, DamagedFile, MissingWeights

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types a weight may be stored in: torch's names by the format's own codes."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor on disk; `dtype` is the format's code, such as BF16."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes on disk: a code has its bits in its name, but for BOOL."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def read_index(directory: Path, index: Mapping[str, Any] | None = None) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by its published name, in the order of the files; only headers are read.

    `model.safetensors` is used where it exists, else the shards of `model.safetensors.index.json`, as in
    `transformers`.

    Args:
        index: the content of model.safetensors.index.json, if it has been read already.

    Raises:
        MissingWeights: no weights, a missing shard, or a tensor that is not in the shard that the index names.
        DamagedFile: a truncated or unreadable file, or a tensor that two shards hold.
    """
    weight_map: dict[str, str] = {}
    if (directory / SINGLE).is_file():
        files = [SINGLE]
    elif (directory / INDEX).is_file():
        weight_map = _weight_map(directory / INDEX, read_object(directory / INDEX) if index is None else index)
        files = sorted(set(weight_map.values()))
    else:
        raise MissingWeights(
            f"there are no weights in {str(directory)!r}: neither {SINGLE} nor {INDEX}",
            hint="fetch the checkpoint again; blockpress reads safetensors only",
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if not (directory / name).is_file():
            raise MissingWeights(
                f"the shard {name} is not in {str(directory)!r}", hint=f"{INDEX} names it: fetch the file"
            )
        for tensor in _headers(directory / name):
            if tensor.name in tensors:
                raise DamagedFile(
                    f"the tensor {tensor.name} is in both {tensors[tensor.name].file.name} and {name}",
                    hint="the shards come from different saves: fetch or save the checkpoint again",
                )
            tensors[tensor.name] = tensor
    for tensor_name, file in weight_map.items():
        if tensor_name not in tensors or tensors[tensor_name].file.name != file:
            raise MissingWeights(
                f"{INDEX} puts the tensor {tensor_name} into {file}, which does not hold it",
                hint="index and shards come from different saves: fetch or save the checkpoint again",
            )
    return tensors


@contextmanager
def open_safetensors(file: Path, framework: str = "pt") -> Iterator[Any]:
    """An open safetensors file; `get_tensor(name)` returns a tensor that owns its memory.

    Args:
        framework: "numpy" to read the header alone, which needs no torch.

    Raises:
        DamagedFile: the file is truncated or no safetensors file. CheckpointError: it cannot be read at all.
    """
    try:
        with safe_open(file, framework=framework, backend="pread") as shard:
            yield shard
    except SafetensorError as error:
        raise DamagedFile(f"{str(file)!r} is damaged or cut short: {error}", hint=fetch_hint(file)) from error
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}", hint="check the file and its rights") from error


def _headers(file: Path) -> list[StoredTensor]:
    with open_safetensors(file, "numpy") as shard:
        slices = ((name, shard.get_slice(name)) for name in shard.offset_keys())
        return [StoredTensor(name=n, file=file, shape=tuple(s.get_shape()), dtype=s.get_dtype()) for n, s in slices]


def _weight_map(file: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The index's map from a tensor's name to its shard's, which must be in the index's own directory."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFile(f"{str(file)!r} has no weight_map", hint="fetch the file again")
    for tensor, shard in weight_map.items():
        # Both separators on every system: a checkpoint may be copied to another one.
        valid = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
        if not valid:
            raise DamagedFile(
                f"{str(file)!r} puts the tensor {tensor} into {shard!r}",
                hint="a shard must be a .safetensors file in the checkpoint's own directory",
            )
    return weight_map
