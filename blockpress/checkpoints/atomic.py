"""How a checkpoint comes into its directory: all at once, or not at all.

    directory/.saving-x/   everything is written here first, shard by shard, and flushed to the disk
    directory/             then the old weights go, the new files are renamed into place, config.json last

Invariant: until the last byte is written, an older checkpoint in the directory is as it was; one that is cut off
between the renames leaves a directory without config.json, which nobody loads, and never two checkpoints mixed.
A process that is killed leaves its .saving-* directory behind; it can be deleted.

Run it:  python -m pytest tests/checkpoints/test_save.py tests/quantize/test_convert.py
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from safetensors import SafetensorError

from blockpress.checkpoints.files import CONFIG, HF_QUANT_CONFIG, INDEX, SINGLE
from blockpress.errors import CheckpointError, RequestError

SHARD_BYTES = 5_000_000_000
"""Most bytes of a shard's tensors, where nobody says otherwise."""

REPORT = "quantization.json"

# What speaks of the weights in a directory and of no others: it goes with them.
_OF_THE_WEIGHTS = (SINGLE, INDEX, REPORT, HF_QUANT_CONFIG)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@runtime_checkable
class Sized(Protocol):
    """A tensor that will be written."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...


Piece = TypeVar("Piece", bound=Sized)


@contextmanager
def staged(folder: Path, *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A fresh directory whose files take the place of those in `folder`, if nothing goes wrong until then.

    Args:
        replaces: names of files that go with the older checkpoint, even where no new one takes their place.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    staging, fresh = None, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        yield staging
        _flush(staging)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
            if fresh:
                with suppress(OSError):  # somebody else may have put a file there
                    folder.rmdir()
        # safetensors has an error of its own for a disk that is full.
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(
                f"{str(folder)!r} cannot be written: {error}",
                hint="check the path, its rights and the room on the disk",
            ) from error
        raise
    try:
        _swap(staging, folder, {*_OF_THE_WEIGHTS, *replaces})
    except OSError as error:
        raise CheckpointError(
            f"the new files cannot be moved into {str(folder)!r}: {error}",
            hint=f"they are whole: move those that are left in {str(staging)!r} by hand, {CONFIG} last",
        ) from error


def check_disk_space(staging: Path, need: int) -> None:
    """Raises CheckpointError: the disk under a directory that `staged` gave has less room than `need` bytes."""
    free = shutil.disk_usage(staging).free
    if need > free:
        raise CheckpointError(
            f"the checkpoint takes {need / 2**30:.1f} GiB, and the disk under {str(staging.parent)!r} has"
            f" {free / 2**30:.1f} GiB left",
            hint="free some room, or give a directory on another disk",
        )


def in_shards(tensors: Iterable[Piece], shard_bytes: int) -> dict[str, list[Piece]]:
    """The tensors of each file by its name: one file, or shards where there are more than `shard_bytes`.

    Raises:
        RequestError: `shard_bytes` is no whole number from 1.
    """
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise RequestError(f"shard_bytes is {shard_bytes!r}", hint="shard_bytes must be a whole number of at least 1")
    shards: list[list[Piece]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    return dict(zip(names, shards, strict=True))


def write_index(folder: Path, shards: Mapping[str, Sequence[Sized]]) -> None:
    """Write the index that says in which shard a tensor is; of a single file there is none."""
    if len(shards) > 1:
        places = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        total = sum(tensor.bytes for shard in shards.values() for tensor in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an object as people read it. A figure that is no number, such as an infinite error, becomes null."""
    file.write_text(json.dumps(_finite(value), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flush(folder: Path) -> None:
    """Wait until the disk has the files: a rename may be on it before what was written."""
    # Elsewhere a file that is open for reading, or a directory, cannot be flushed.
    if os.name != "posix":
        return
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(staging: Path, folder: Path, replaces: set[str]) -> None:
    """Put the staged files into the place of the old ones; without config.json nobody takes the mixture for a model."""
    (folder / CONFIG).unlink(missing_ok=True)
    for old in list(folder.iterdir()):
        if old.name in replaces or _SHARD.fullmatch(old.name):
            old.unlink()
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: name == CONFIG)
    for name in names:
        os.replace(staging / name, folder / name)
    staging.rmdir()
