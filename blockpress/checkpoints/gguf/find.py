"""Whether a path means a GGUF file: the file itself, or a directory that holds one and no other weights.

Invariant: a directory with a config.json or safetensors is never taken for a GGUF file.

Run it:  python -m pytest tests/checkpoints/test_gguf.py -k find
"""

from __future__ import annotations

from pathlib import Path

from blockpress.errors import CheckpointError

SUFFIX = ".gguf"


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that `path` means, or None where it means something else.

    Raises:
        CheckpointError: a directory with several GGUF files and no other checkpoint.
    """
    place = Path(path).expanduser()
    try:
        if place.is_file():
            return place if place.suffix == SUFFIX else None
        if not place.is_dir() or (place / "config.json").exists() or any(place.glob("*.safetensors")):
            return None
        files = sorted(place.glob(f"*{SUFFIX}"))
    # A name that no file can have, or a directory that may not be read.
    except (OSError, ValueError):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{str(path)!r} holds {len(files)} GGUF files: {', '.join(file.name for file in files[:6])}",
            hint=f"give the path of one, such as {str(files[0])!r}",
        )
    return files[0] if files else None
