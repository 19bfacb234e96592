"""From what people type to a checkpoint's directory, and the JSON files in it.

Invariant: what comes back is a directory with a `config.json`; a name never leads outside the shipped models.

Run it:  python -c "from blockpress.weights import shipped; print(shipped())"
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from blockpress.errors import CheckpointError, DamagedFile, ModelNotFound

CONFIG = "config.json"
GENERATION = "generation_config.json"


def shipped() -> dict[str, Path]:
    """The checkpoints that come with the package: their names and directories, sorted by name."""
    home = Path(str(resources.files("blockpress"))) / "models"
    if not home.is_dir():
        return {}
    return {entry.name: entry for entry in sorted(home.iterdir()) if (entry / CONFIG).is_file()}


def resolve(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself where it is one, else the shipped model of that name.

    Raises:
        CheckpointError: `name` is a file, or a directory without config.json.
        ModelNotFound: nothing goes by that name; the hint lists the shipped models.
    """
    path = _expanded(name)
    if os.path.isfile(path / CONFIG):
        return path
    models = shipped()
    if str(name) in models:
        return models[str(name)]
    # isdir and isfile, unlike Path's methods, answer False for a name that no file can have.
    if str(name) and (os.path.isdir(path) or os.path.isfile(path)):
        return checkpoint_directory(path)
    known = ", ".join(models) or "none"
    raise ModelNotFound(
        f"there is no model or directory {str(name)!r}",
        hint=f"shipped models: {known}; anything else must be downloaded first, e.g. by `hf download NAME "
        "--local-dir DIR`, and is then loaded by its directory DIR",
    )


def checkpoint_directory(path: str | Path) -> Path:
    """`path` as it is, where it is a directory with a config.json.

    Raises:
        ModelNotFound: there is nothing at that path.
        CheckpointError: it is a file, or a directory without config.json.
    """
    directory = _expanded(path)
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
    # RecursionError: brackets without end, which no checkpoint has.
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{str(file)!r} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{str(file)!r} holds {type(value).__name__}, not an object", hint="fetch the file again")
    return value


def _expanded(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))
