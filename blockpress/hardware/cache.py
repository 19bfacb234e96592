"""Files that can be made again: where they lie, and how one is written.

Invariant: a reader finds the old file, the new one or none, never a part of one, whoever else writes at the same time.
What is found is checked by its reader, and made anew where it is damaged.

Run it:  python -m pytest tests/test_caches.py
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """The directory of blockpress's own caches: XDG_CACHE_HOME/blockpress, or ~/.cache/blockpress.

    Raises:
        OSError: there is no home directory: no HOME, and no entry for this user among the system's accounts.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "blockpress"
    except RuntimeError as error:
        raise FileNotFoundError(f"this user has no home directory, and XDG_CACHE_HOME is not set ({error})") from error


def put_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file elsewhere, and rename it to `file` once it is whole; folders are made where missing.

    Raises:
        OSError: it cannot be written there; what was there is unchanged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=file.parent) as folder:
        made = Path(folder) / file.name
        write(made)
        os.replace(made, file)
