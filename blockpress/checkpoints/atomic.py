"""How a checkpoint is written into its directory: all at once, or not at all.

    directory/.saving-x/   everything is written here first, shard by shard, and flushed to the disk
    directory/             then the old weights go, the new files are renamed into place, config.json last

Invariant: until the last byte is written, an older checkpoint in the directory is unchanged. A save interrupted
between the renames leaves a directory without config.json, which is never loaded, and never a mix of two checkpoints.
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
from blockpress.hardware import flush, unwritable

SHARD_BYTES = 5_000_000_000
"""Default for the most bytes of tensors in one shard."""

REPORT = "quantization.json"

# Files that describe the weights next to them: they are removed together with those weights.
_WEIGHT_FILES = (SINGLE, INDEX, REPORT, HF_QUANT_CONFIG)
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
def staged(folder: Path, *, need: int = 0, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A new directory whose files replace those in `folder` when the block ends without an error.

    Args:
        need: bytes that the files take at least.
        replaces: names of files to remove with the older checkpoint, even where no new file replaces them.

    Raises:
        CheckpointError: the directory cannot be written, or its disk has less room than is needed.
    """
    staging, is_new = None, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        free = shutil.disk_usage(staging).free
        if need > free:
            raise CheckpointError(
                f"the checkpoint takes {need / 2**30:.1f} GiB ({need:,} bytes), and the disk under {str(folder)!r} has"
                f" {free / 2**30:.1f} GiB left ({free:,} bytes)",
                hint="free some room, or give a directory on another disk",
            )
        yield staging
        _flush(staging)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # another process may have put a file there
                    folder.rmdir()
        # safetensors raises its own error when the disk is full.
        if isinstance(error, OSError | SafetensorError):
            raise unwritable(folder, error, need) from error
        raise
    try:
        _swap(staging, folder, {*_WEIGHT_FILES, *replaces})
    except OSError as error:
        raise CheckpointError(
            f"the new files cannot be moved into {str(folder)!r}: {error}",
            hint=f"they are whole: move those that are left in {str(staging)!r} by hand, {CONFIG} last",
        ) from error


def in_shards(tensors: Iterable[Piece], shard_bytes: int) -> dict[str, list[Piece]]:
    """The tensors of each file by its name: one file, or shards where they exceed `shard_bytes`.

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
    """Write the index from tensor names to shards; a single file has none."""
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        total = sum(tensor.bytes for shard in shards.values() for tensor in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON. A float that is not finite, such as an infinite error, becomes null."""
    file.write_text(json.dumps(_finite(value), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flush(folder: Path) -> None:
    """Wait until the files are on disk: a rename may reach it before the data does."""
    for path in (*folder.iterdir(), folder):
        flush(path)


def _swap(staging: Path, folder: Path, replaces: set[str]) -> None:
    """Replace the old files by the staged ones; config.json goes first and comes last, so no mixture is ever loaded."""
    (folder / CONFIG).unlink(missing_ok=True)
    for old in list(folder.iterdir()):
        if old.name in replaces or _SHARD.fullmatch(old.name):
            old.unlink()
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: name == CONFIG)
    for name in names:
        os.replace(staging / name, folder / name)
    staging.rmdir()
