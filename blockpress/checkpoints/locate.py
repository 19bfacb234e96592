"""From a name that a user types to a checkpoint's directory or GGUF file.

Invariant: the result is a directory with a `config.json`, or a file that ends in `.gguf`; a model's name is looked up
in the shipped models and the cache of huggingface_hub only, and finding it never opens a connection.

Run it:  python -c "from blockpress.checkpoints import shipped; print(shipped())"
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from blockpress.checkpoints.files import CONFIG, checkpoint_directory, expanded, find_gguf
from blockpress.checkpoints.hub.cache import HubName, Located, locate
from blockpress.errors import ModelNotFound


def shipped() -> dict[str, Path]:
    """The checkpoints that come with the package: their names and directories, sorted by name."""
    home = Path(str(resources.files("blockpress"))) / "models"
    if not home.is_dir():
        return {}
    return {entry.name: entry for entry in sorted(home.iterdir()) if (entry / CONFIG).is_file()}


def resolve(name: str | Path) -> Path:
    """The checkpoint's directory, or the GGUF file, of that name. Errors as `find_model`."""
    return find_model(name).path


def find_model(name: str | Path) -> Located:
    """The model of that name on this machine; nothing is downloaded.

    In this order: a checkpoint's directory, a GGUF file, a shipped model, and a model in the cache of huggingface_hub,
    as `owner/name`, `owner/name@revision` or `owner/name/FILE.gguf`.

    Raises:
        CheckpointError: a file of another kind, a directory without config.json, or an incomplete download.
        ModelNotFound: no model of that name; the hint says how to download it.
    """
    path = expanded(name)
    if os.path.isfile(path / CONFIG) or (path.suffix == ".gguf" and os.path.isfile(path)):
        return Located(path=path)
    models = shipped()
    if str(name) in models:
        return Located(path=models[str(name)])
    # isdir and isfile, unlike Path's methods, return False for a name that no file can have.
    if str(name) and (os.path.isdir(path) or os.path.isfile(path)):
        return Located(path=find_gguf(path) or checkpoint_directory(path))
    on_hub = HubName.parse(str(name))
    located = None if on_hub is None else locate(on_hub)
    if located is not None:
        return located
    known = ", ".join(models) or "none"
    if on_hub is None:
        hint = f"shipped models: {known}; download one of the hub by `blockpress pull owner/name`, and give that name"
    else:
        file = "" if on_hub.file is None else f" --file {on_hub.file}"
        revision = "" if on_hub.revision == "main" else f" --revision {on_hub.revision}"
        hint = f"download it by `blockpress pull {on_hub.repo}{revision}{file}`; shipped models: {known}"
    raise ModelNotFound(f"there is no model or directory {str(name)!r}", hint=hint)
