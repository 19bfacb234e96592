"""The names of a checkpoint's files, and how a directory and a JSON object in it are read, whatever they mean.

Why: every module of `checkpoints` uses these names. This one imports none of them, so that no two need each other for a
name.

Invariant: what cannot be read is an error of ours that names the file; nothing here interprets a file's content.

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


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedFile: it is not UTF-8, not JSON, or no object.
        CheckpointError: it cannot be read at all.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read: {error.strerror}", hint="check the file's rights"
        ) from error
    # RecursionError: JSON nested too deeply, which no checkpoint has.
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{str(file)!r} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{str(file)!r} holds {type(value).__name__}, not an object", hint="fetch the file again")
    return value
