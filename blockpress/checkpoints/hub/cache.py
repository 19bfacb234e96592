"""Models in the cache of huggingface_hub, which other tools share: what is there, whether it is whole, and removing it.

    HF_HUB_CACHE/models--OWNER--NAME/
        refs/main                  a branch's or tag's commit
        snapshots/COMMIT/FILE      links to blobs
        blobs/ETAG                 the files, each once;  blobs/ETAG*.incomplete   downloads that were cut

Invariant: nothing here opens a connection, and nothing outside the cache's directory is ever removed.

Run it:  python -c "from blockpress.checkpoints.hub.cache import list_cached; print(list_cached())"
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpress.checkpoints.files import CONFIG, INDEX, SINGLE, read_object
from blockpress.checkpoints.identify import CheckpointInfo, identify
from blockpress.errors import CheckpointError, DamagedFile, ModelNotFound

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, DeleteCacheStrategy

MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{6,40}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LONGEST = 96
"""Characters of a repository's name, the hub's own limit; a revision and a file have more in the name of a file."""


@dataclass(frozen=True, kw_only=True)
class HubName:
    """`owner/name[@revision]`, or `owner/name/FILE.gguf[@revision]`."""

    repo: str
    revision: str = MAIN
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """The name in `text`, or None where it cannot be one.

        >>> HubName.parse("google/some-model@v2")
        HubName(repo='google/some-model', revision='v2', file=None)
        >>> HubName.parse("me/some-GGUF/some-Q4_K_M.gguf").file
        'some-Q4_K_M.gguf'
        >>> HubName.parse("sudoku-nano"), HubName.parse("../outside"), HubName.parse("a/b/c")
        (None, None, None)
        """
        path, _, revision = text.partition("@")
        repo, file = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        good = _NAME.fullmatch(repo) and not re.search(r"\.\.|--|[.-](/|$)", repo)
        good = good and len(repo) <= LONGEST and max(map(len, text.split("/"))) <= 255
        good = good and (not file or (file.endswith(".gguf") and ".." not in file and "\0" not in file))
        if not good or ("@" in text and not _is_revision(revision)):
            return None
        return cls(repo=repo, revision=revision or MAIN, file=file or None)


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """One cached model: a snapshot, or one GGUF file of it. Bytes on disk; `missing` says what it lacks to be whole."""

    name: str
    revision: str
    refs: tuple[str, ...]
    path: Path
    kind: CheckpointInfo
    bytes: int
    last_used: float
    missing: str | None


@dataclass(frozen=True, kw_only=True)
class Located:
    """A checkpoint's directory or GGUF file; and its index, where it was read to know that all shards are there."""

    path: Path
    index: Mapping[str, Any] | None = None


def cache_directory() -> Path:
    """Where huggingface_hub keeps its files: HF_HUB_CACHE, or HF_HOME/hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def home_of(repo: str) -> Path:
    """The directory of one repository in the cache, whether it is there or not."""
    return cache_directory() / f"models--{repo.replace('/', '--')}"


def locate(name: HubName) -> Located | None:
    """The snapshot of that name, or its GGUF file; None where the cache holds nothing of that repository.

    Raises:
        ModelNotFound: another revision is there.
        CheckpointError: the download was cut, or there are several GGUF files.
    """
    home = home_of(name.repo)
    if not home.is_dir():
        return None
    commit = commit_of(name.repo, name.revision)
    if commit is None:
        _say_what_there_is(name, home)
        return None
    snapshot = home / "snapshots" / commit
    if name.file is not None:
        return Located(path=_gguf_named(name, snapshot))
    is_sharded = (snapshot / CONFIG).is_file() and not (snapshot / SINGLE).is_file() and (snapshot / INDEX).is_file()
    index = read_object(snapshot / INDEX) if is_sharded else None
    reason = missing(snapshot, index)
    if reason is not None:
        raise _incomplete(name, reason)
    ggufs = _ggufs(snapshot)
    if (snapshot / CONFIG).is_file() and not (ggufs and not _has_weights(snapshot)):
        return Located(path=snapshot, index=index)
    if len(ggufs) > 1:
        names = ", ".join(f"{name.repo}/{file.relative_to(snapshot).as_posix()}" for file in ggufs)
        raise CheckpointError(f"the cache holds {len(ggufs)} GGUF files of {name.repo}", hint=f"give one of {names}")
    return Located(path=ggufs[0])


def commit_of(repo: str, revision: str) -> str | None:
    """The cached commit that a branch, a tag, a commit or the beginning of one (6 digits or more) stands for."""
    home = home_of(repo)
    snapshots = home / "snapshots"
    ref = home / "refs" / revision
    if ref.is_file():
        commit = ref.read_text(encoding="utf-8").strip()
        # Empty where the process that wrote it was killed: that would be the directory of all snapshots.
        return commit if commit and (snapshots / commit).is_dir() else None
    if not _COMMIT.fullmatch(revision) or not snapshots.is_dir():
        return None
    found = [entry.name for entry in snapshots.iterdir() if entry.name.startswith(revision)]
    return found[0] if len(found) == 1 else None


def missing(snapshot: Path, index: Mapping[str, Any] | None = None) -> str | None:
    """What a snapshot lacks to be a model that loads, in words; None where it is whole.

    The index of a sharded checkpoint says which files belong to it; a GGUF file is whole by itself. `index` is what the
    index holds, if it was read.
    """
    if _ggufs(snapshot) and not (snapshot / INDEX).is_file():
        return None
    if not (snapshot / CONFIG).is_file():
        return f"there is no {CONFIG}"
    if (snapshot / SINGLE).is_file():
        return None
    if not (snapshot / INDEX).is_file():
        return "there are no weights"
    shards = (read_object(snapshot / INDEX) if index is None else index).get("weight_map")
    names = sorted({str(file) for file in shards.values()}) if isinstance(shards, dict) else []
    lost = [name for name in names if not (snapshot / name).is_file()]
    if not lost:
        return None
    return f"{len(lost)} of {len(names)} shards are missing ({lost[0]}{' and others' * (len(lost) > 1)})"


def list_cached() -> list[CachedModel]:
    """Every cached model of a family that blockpress runs, sorted by name; partial downloads among them."""
    from huggingface_hub import scan_cache_dir

    if not cache_directory().is_dir():
        return []
    found = [
        entry
        for repo in scan_cache_dir(cache_directory()).repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        for entry in _entries(repo, revision)
    ]
    return sorted(found, key=lambda entry: (entry.name, entry.revision))


def bytes_of(repo: str, commit: str | None = None) -> int:
    """Bytes that removing a repository, or one of its commits, frees.

    Blobs that another commit needs stay, and downloads that were cut go with the last commit.
    """
    deletion = _deletion(repo, commit)
    freed = 0 if deletion is None else deletion.expected_freed_size
    if _goes_as_a_whole(repo, commit):
        uncounted = (home_of(repo) / "blobs").glob("*" if deletion is None else "*.incomplete")
        freed += sum(blob.lstat().st_size for blob in uncounted)
    return freed


def remove(repo: str, commit: str | None = None) -> int:
    """Remove a repository, or one of its commits, from the cache; the bytes that this freed.

    Raises:
        ModelNotFound: the cache does not hold it. CheckpointError: its files cannot be removed.
    """
    home = home_of(repo)
    if not (home if commit is None else home / "snapshots" / commit).is_dir():
        raise ModelNotFound(f"the cache does not hold {repo}", hint="`blockpress ls` lists what it holds")
    if home.is_symlink():
        raise CheckpointError(f"{str(home)!r} is a link, and cannot be removed", hint="remove what it leads to")
    freed, deletion = bytes_of(repo, commit), _deletion(repo, commit)
    place = home if _goes_as_a_whole(repo, commit) else home / "snapshots" / str(commit)
    try:
        if deletion is not None:
            deletion.execute()
        if place.is_dir():  # the library's scan passes it over, or has no right to remove it, which it only logs
            shutil.rmtree(place)
    except OSError as error:
        raise CheckpointError(f"{str(place)!r} cannot be removed: {error}", hint="check its rights") from error
    return freed


def _goes_as_a_whole(repo: str, commit: str | None) -> bool:
    """Whether no other commit is there."""
    return commit is None or [entry.name for entry in (home_of(repo) / "snapshots").glob("*")] == [commit]


def _deletion(repo: str, commit: str | None) -> DeleteCacheStrategy | None:
    """The library's plan to remove a repository or one of its commits; None where its scan finds no whole snapshot."""
    from huggingface_hub import scan_cache_dir

    scan = scan_cache_dir(cache_directory())
    found = [entry for entry in scan.repos if entry.repo_type == "model" and entry.repo_id == repo]
    if not found:
        return None
    commits = [revision.commit_hash for revision in found[0].revisions] if commit is None else [commit]
    # Of this repository alone: a copy of it has commits of the same name.
    return replace(scan, repos=frozenset(found)).delete_revisions(*commits)


def _entries(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> Iterator[CachedModel]:
    snapshot = Path(revision.snapshot_path)
    places: list[tuple[str, Path, int]] = []
    if (snapshot / CONFIG).is_file() and not (_ggufs(snapshot) and not _has_weights(snapshot)):
        places.append((repo.repo_id, snapshot, revision.size_on_disk))
    for file in _ggufs(snapshot):
        places.append((f"{repo.repo_id}/{file.relative_to(snapshot).as_posix()}", file, file.stat().st_size))
    used = max((file.blob_last_accessed for file in revision.files), default=repo.last_accessed)
    for name, path, size in places:
        try:
            kind = identify(path)
            lacks = None if path.is_file() else missing(snapshot)
        except DamagedFile as error:  # it must not hide the rest, nor itself
            kind, lacks = CheckpointInfo(family="unreadable", format="?"), error.message
        except CheckpointError:  # a kind of file that only others read
            continue
        if kind.runs or kind.family == "unreadable":
            yield CachedModel(
                name=name,
                revision=revision.commit_hash,
                refs=tuple(sorted(revision.refs)),
                path=path,
                kind=kind,
                bytes=size,
                last_used=used,
                missing=lacks,
            )


def _say_what_there_is(name: HubName, home: Path) -> None:
    """Say what there is of a repository whose revision is not there; nothing where there is nothing."""
    commits = sorted(entry.name for entry in (home / "snapshots").glob("*"))
    if not commits:
        return
    whole = [commit[:12] for commit in commits if missing(home / "snapshots" / commit) is None]
    if not whole:
        raise _incomplete(name, missing(home / "snapshots" / commits[0]))
    raise ModelNotFound(
        f"the cache does not hold revision {name.revision!r} of {name.repo}",
        hint=f"run `{_pull(name)}`, or take one that is there: {', '.join(f'{name.repo}@{c}' for c in whole)}",
    )


def _incomplete(name: HubName, reason: str | None) -> CheckpointError:
    return CheckpointError(
        f"the download of {name.repo} is not complete: {reason}", hint=f"run `{_pull(name)}` again: it goes on"
    )


def _gguf_named(name: HubName, snapshot: Path) -> Path:
    assert name.file is not None
    if not (snapshot / name.file).is_file():
        raise ModelNotFound(
            f"the cache does not hold {name.file} of {name.repo}",
            hint=f"run `{_pull(name)} --file {name.file}`",
        )
    return snapshot / name.file


def _ggufs(snapshot: Path) -> list[Path]:
    """The GGUF files of a snapshot that are a language model; `mmproj` is a vision tower for llama.cpp."""
    return sorted(file for file in snapshot.rglob("*.gguf") if file.is_file() and not file.name.startswith("mmproj"))


def _has_weights(snapshot: Path) -> bool:
    return (snapshot / SINGLE).is_file() or (snapshot / INDEX).is_file()


def _pull(name: HubName) -> str:
    return f"blockpress pull {name.repo}" + ("" if name.revision == MAIN else f" --revision {name.revision}")


def _is_revision(text: str) -> bool:
    return bool(re.fullmatch(r"[\w][\w./-]*", text)) and ".." not in text
