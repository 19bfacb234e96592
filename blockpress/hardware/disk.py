"""How a single file is written, and where those lie that can be made again.

Invariant: a reader finds the old file, the new one or none, never a part of one, whoever else writes at the same time.
What is cached is checked by its reader, and made anew where it is damaged.

Run it:  python -m pytest tests/test_caches.py tests/test_disk.py
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blockpress.errors import BlockpressError, CheckpointError


def cache_folder() -> Path:
    """The directory of blockpress's own caches: XDG_CACHE_HOME/blockpress, or ~/.cache/blockpress where that is not set
    or no absolute path, which its specification says to ignore.

    Raises:
        OSError: there is no home directory: no HOME, and no entry for this user among the system's accounts.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "blockpress"
    except RuntimeError as error:
        raise FileNotFoundError(f"this user has no home directory, and XDG_CACHE_HOME is not set ({error})") from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write, which is flushed and replaces `file` when the block ends; folders are made where missing.

    Raises:
        OSError: it cannot be written; what was there is unchanged, and no part of the new is left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=file.parent) as folder:
        made = Path(folder) / file.name
        yield made
        flush(made)
        os.replace(made, file)


@contextmanager
def whole_file(file: Path, *, need: int = 0, kind: Callable[..., BlockpressError] = CheckpointError) -> Iterator[Path]:
    """As `replacing`, for a file that somebody asked for. `need`: the bytes that it takes, if they are known.

    Raises:
        CheckpointError, or `kind`: it cannot be written.
    """
    try:
        with replacing(file) as made:
            yield made
    except OSError as error:
        raise unwritable(file, error, need, kind) from error


def append_line(file: Path, line: str, *, kind: Callable[..., BlockpressError] = CheckpointError) -> None:
    """Append a whole line to a text file, or nothing.

    Raises:
        CheckpointError, or `kind`: it cannot be written.
    """
    content = line.encode() + b"\n"
    try:
        with file.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                if stream.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                stream.truncate(before)
                raise
    except OSError as error:
        raise unwritable(file, error, len(content), kind) from error


def unwritable(
    path: Path, error: Exception, need: int = 0, kind: Callable[..., BlockpressError] = CheckpointError
) -> BlockpressError:
    """What to raise where writing a file or a directory has failed: with the bytes that it takes, and those free."""
    place = next((place for place in (path, *path.absolute().parents) if place.is_dir()), Path.cwd())
    free = shutil.disk_usage(place).free
    reason = "the disk is full" if need > free else getattr(error, "strerror", None) or error
    takes = f"it takes {need:,} bytes, and " if need else ""
    return kind(
        f"{path} cannot be written: {reason}; {takes}{free:,} bytes are free there",
        hint="check the path, its rights and the room on the disk",
    )


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk: a rename may reach it before the data does."""
    # Other systems cannot flush a directory, or a file that is open for reading.
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
