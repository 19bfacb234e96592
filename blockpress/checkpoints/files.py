"""The names of a checkpoint's files, which path refers to a GGUF file, and how a JSON object is read.

Why: every module of `checkpoints` uses these names. This one imports none of them, so that no two need each other for a
name.

Invariant: what cannot be read is an error of ours that names the file; nothing here interprets a file's content. A
directory with a config.json or safetensors is never treated as a GGUF file.

Run it:  python -m pytest tests/checkpoints/test_locate.py tests/checkpoints/test_load.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from blockpress.errors import CheckpointError, DamagedFile, ModelNotFound

CONFIG = "config.json"
GENERATION = "generation_config.json"

HF_QUANT_CONFIG = "hf_quant_config.json"
"""Where ModelOpt records how it packed the weights; newer versions record it in config.json as well."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GGUF_SUFFIX = ".gguf"


def expanded(path: str | Path) -> Path:
    """The path with a leading `~` expanded."""
    return Path(os.path.expanduser(path))


def checkpoint_directory(path: str | Path) -> Path:
    """`path` as it is, where it is a directory with a config.json.

    Raises:
        ModelNotFound: there is nothing at that path.
        CheckpointError: it is a file, or a directory without config.json.
    """
    directory = expanded(path)
    if os.path.isfile(directory):
        raise CheckpointError(
            f"{str(path)!r} is a file, not a checkpoint", hint=f"give the directory that holds {CONFIG} and the weights"
        )
    if not os.path.isdir(directory):
        raise ModelNotFound(f"there is no directory {str(path)!r}", hint="check the path, or download the checkpoint")
    if not os.path.isfile(directory / CONFIG):
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint: there is no {CONFIG} in it",
            hint=f"give the directory that holds {CONFIG} and the weights; was the download or the save cut short?",
        )
    return directory


def fetch_hint(file: Path) -> str:
    """What to do about a damaged file: a clone without Git LFS has a pointer of three lines in its place."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(24) == b"version https://git-lfs."
    except OSError:
        is_pointer = False
    return "it is a pointer of Git LFS: run `git lfs pull` in its directory" if is_pointer else "fetch the file again"


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedFile: it is not UTF-8, not JSON, or no object.
        CheckpointError: it cannot be read at all.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read: {error.strerror}", hint="check the file's rights"
        ) from error
    # RecursionError: JSON nested too deeply, which no checkpoint has.
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{str(file)!r} is not JSON: {error}", hint=fetch_hint(file)) from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{str(file)!r} holds {type(value).__name__}, not an object", hint="fetch the file again")
    return value


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that `path` refers to, or None where it is something else.

    Raises:
        CheckpointError: a directory with several GGUF files and no other checkpoint.
    """
    location = Path(path).expanduser()
    try:
        if location.is_file():
            return location if location.suffix == GGUF_SUFFIX else None
        if not location.is_dir() or (location / CONFIG).exists() or any(location.glob("*.safetensors")):
            return None
        files = sorted(location.glob(f"*{GGUF_SUFFIX}"))
    # A name that no file can have, or a directory that may not be read.
    except (OSError, ValueError):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{str(path)!r} holds {len(files)} GGUF files: {', '.join(file.name for file in files[:6])}",
            hint=f"give the path of one, such as {str(files[0])!r}",
        )
    return files[0] if files else None
