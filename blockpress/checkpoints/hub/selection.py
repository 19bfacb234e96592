"""Which files of a hub repository make a model: its weights once, in one format, and what goes with them.

Invariant: pickled weights (.bin, .pt) and other runtimes' copies (.onnx) are never chosen, and never two copies of the
same weights; where the choice is the caller's, it is asked for by name.

Run it:  python -m pytest tests/checkpoints/test_hub.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from blockpress.errors import HubError, RequestError

_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.tflite")
_BESIDE = ("*.json", "*.jinja", "tokenizer*")
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository: its size in bytes, and its checksum, of one kind or the other."""

    path: str
    size: int
    sha256: str | None = None
    git_name: str | None = None

    @classmethod
    def of(cls, sibling: Any) -> RemoteFile:
        """From an entry of `HfApi.model_info(files_metadata=True).siblings`."""
        lfs = sibling.lfs
        size = sibling.size if sibling.size is not None or lfs is None else lfs.size
        if size is None:
            raise HubError(f"the hub gives no size for {sibling.rfilename}", hint="is HF_ENDPOINT a whole hub?")
        return cls(path=sibling.rfilename, size=size, sha256=lfs.sha256 if lfs else None, git_name=sibling.blob_id)


def choose(
    repo: str,
    files: Sequence[RemoteFile],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    file: str | None = None,
) -> tuple[RemoteFile, ...]:
    """The files to fetch, small ones first, so that a download that is cut can say what it lacks.

    Raises:
        HubError: no weights that we read, several GGUF files and none named, or patterns that leave nothing.
        RequestError: `file` is not there, or no GGUF file.
    """
    if include and file is not None:
        raise RequestError("--include is given with --file", hint="--file takes one GGUF file by its name alone")
    safe = [entry for entry in files if not _matches(entry.path, _NEVER)]
    if include:
        chosen = [entry for entry in safe if _matches(entry.path, include)]
    else:
        chosen = _weights(repo, files, safe, file) + [entry for entry in safe if _is_beside(entry.path)]
    chosen = [entry for entry in chosen if not _matches(entry.path, exclude)]
    if not chosen:
        asked = ", ".join([*(f"--include {p}" for p in include), *(f"--exclude {p}" for p in exclude)])
        raise HubError(f"{asked} leaves no file of {repo}", hint=f"it has {_named(files)}")
    for entry in chosen:
        if entry.path.startswith("/") or ".." in entry.path.split("/"):
            raise HubError(f"{repo} lists the file {entry.path!r}", hint="no repository has one outside itself")
    # Weights last: what is there of them says how far a cut download came.
    return tuple(sorted(chosen, key=lambda entry: (_is_weights(entry.path), entry.size, entry.path)))


def _weights(repo: str, files: Sequence[RemoteFile], safe: Sequence[RemoteFile], file: str | None) -> list[RemoteFile]:
    """One copy of the weights: `file`, or the safetensors that `transformers` would read, or the only GGUF file."""
    ggufs = [entry for entry in safe if entry.path.endswith(".gguf") and not _base(entry.path).startswith("mmproj")]
    if file is not None:
        return [_gguf_named(repo, files, file)]
    tensors = [entry for entry in safe if entry.path.endswith(".safetensors") and "/" not in entry.path]
    single = [entry for entry in tensors if entry.path == "model.safetensors"]
    shards = [entry for entry in tensors if re.fullmatch(r"model-\d+-of-\d+\.safetensors", entry.path)]
    if tensors:
        return single or shards or tensors
    if len(ggufs) == 1 and not _PART.fullmatch(ggufs[0].path):
        return ggufs
    if ggufs:
        listed = ", ".join(f"{entry.path} ({entry.size / 1e9:.1f} GB)" for entry in ggufs)
        raise HubError(f"{repo} holds {len(ggufs)} GGUF files", hint=f"choose one with --file: {listed}")
    raise HubError(
        f"{repo} holds no weights that blockpress reads: neither safetensors nor GGUF", hint=f"it has {_named(files)}"
    )


def _gguf_named(repo: str, files: Sequence[RemoteFile], file: str) -> RemoteFile:
    found = next((entry for entry in files if entry.path == file), None)
    if not file.endswith(".gguf"):
        raise RequestError(f"--file is {file!r}", hint="--file names a GGUF file; for others there is --include")
    if found is None:
        ggufs = ", ".join(entry.path for entry in files if entry.path.endswith(".gguf")) or "none"
        raise RequestError(f"--file is {file!r}, which {repo} does not hold", hint=f"its GGUF files: {ggufs}")
    if _PART.fullmatch(file):
        raise RequestError(f"--file is {file!r}, one part of a split file", hint="split GGUF files are not read")
    return found


def _is_beside(path: str) -> bool:
    return "/" not in path and _matches(path, _BESIDE)


def _is_weights(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """As the `hf` command has it: a pattern that ends in / is a directory."""
    return any(fnmatch(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _named(files: Sequence[RemoteFile]) -> str:
    names = [entry.path for entry in files]
    return (", ".join(names[:8]) or "no files") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
