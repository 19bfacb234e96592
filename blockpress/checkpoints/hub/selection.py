"""Which files of a hub repository make a model: its weights once, in one format, and what goes with them.

Invariant: pickled weights (.bin, .pt) and other runtimes' copies (.onnx) are never chosen, and never two copies of the
same weights; where the choice is the caller's, it is asked for by name.

Run it:  python -m pytest tests/checkpoints/test_hub.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockpress.errors import HubError, RequestError

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.tflite")
_WITH_WEIGHTS = ("*.json", "*.jinja", "tokenizer*")
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")


def select_files(
    repo: str,
    files: Sequence[RepoFile],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    file: str | None = None,
) -> tuple[RepoFile, ...]:
    """The files to fetch, small ones first, so that a download that is cut can say what it lacks.

    Raises:
        HubError: no weights that we read, several GGUF files and none named, or patterns that leave nothing.
        RequestError: `file` is not there, or no GGUF file.
    """
    if include and file is not None:
        raise RequestError("--include is given with --file", hint="--file takes one GGUF file by its name alone")
    safe = _matching(files, ignore=_NEVER)
    if include:
        chosen = _matching(safe, allow=include)
    else:
        at_the_top = [entry for entry in safe if "/" not in entry.path]
        chosen = _weights(repo, files, safe, file) + _matching(at_the_top, allow=_WITH_WEIGHTS)
    chosen = _matching(chosen, ignore=exclude)
    if not chosen:
        asked = ", ".join([*(f"--include {p}" for p in include), *(f"--exclude {p}" for p in exclude)])
        raise HubError(f"{asked} leaves no file of {repo}", hint=f"it has {_named(files)}")
    for entry in chosen:
        if entry.path.startswith("/") or ".." in entry.path.split("/"):
            raise HubError(f"{repo} lists the file {entry.path!r}", hint="no repository has one outside itself")
    # Weights last: what is there of them says how far a cut download came.
    return tuple(sorted(chosen, key=lambda entry: (_is_weights(entry.path), entry.size, entry.path)))


def _weights(repo: str, files: Sequence[RepoFile], safe: Sequence[RepoFile], file: str | None) -> list[RepoFile]:
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
        raise HubError(
            f"{repo} holds {len(ggufs)} GGUF files", hint=f"choose one with --file, or by {repo}/FILE: {listed}"
        )
    raise HubError(
        f"{repo} holds no weights that blockpress reads: neither safetensors nor GGUF", hint=f"it has {_named(files)}"
    )


def _gguf_named(repo: str, files: Sequence[RepoFile], file: str) -> RepoFile:
    found = next((entry for entry in files if entry.path == file), None)
    if not file.endswith(".gguf"):
        raise RequestError(f"--file is {file!r}", hint="--file names a GGUF file; for others there is --include")
    if found is None:
        ggufs = ", ".join(entry.path for entry in files if entry.path.endswith(".gguf")) or "none"
        raise RequestError(f"--file is {file!r}, which {repo} does not hold", hint=f"its GGUF files: {ggufs}")
    if _PART.fullmatch(file):
        raise RequestError(f"--file is {file!r}, one part of a split file", hint="split GGUF files are not read")
    return found


def _matching(
    files: Sequence[RepoFile], allow: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> list[RepoFile]:
    """By the rules of the `hf` command's --include and --exclude."""
    from huggingface_hub.utils import filter_repo_objects

    patterns = None if allow is None else list(allow)
    return list(filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=list(ignore), key=lambda f: f.path))


def _is_weights(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _named(files: Sequence[RepoFile]) -> str:
    names = [entry.path for entry in files]
    return (", ".join(names[:8]) or "no files") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
