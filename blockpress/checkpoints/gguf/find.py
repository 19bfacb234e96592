"""Whether a path refers to a GGUF file: the file itself, or a directory that holds one and no other weights.

Invariant: a directory with a config.json or safetensors is never treated as a GGUF file.

Run it:  python -m pytest tests/checkpoints/test_gguf.py -k find
"""

from __future__ import annotations

from pathlib import Path

from blockpress.errors import CheckpointError

SUFFIX = ".gguf"


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that `path` refers to, or None where it is something else.

    Raises:
        CheckpointError: a directory with several GGUF files and no other checkpoint.
    """
    location = Path(path).expanduser()
    try:
        if location.is_file():
            return location if location.suffix == SUFFIX else None
        if not location.is_dir() or (location / "config.json").exists() or any(location.glob("*.safetensors")):
            return None
        files = sorted(location.glob(f"*{SUFFIX}"))
    # A name that no file can have, or a directory that may not be read.
    except (OSError, ValueError):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{str(path)!r} holds {len(files)} GGUF files: {', '.join(file.name for file in files[:6])}",
            hint=f"give the path of one, such as {str(files[0])!r}",
        )
    return files[0] if files else None
