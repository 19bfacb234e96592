"""Fetching a model from the hub into huggingface_hub's own cache, so that other tools share what was fetched.

    plan    two requests: which files the model needs, their sizes and checksums, and what the cache holds of them
    fetch   a file after the other, small ones first; a branch's name is moved to the new commit when all are there

A file that comes over plain HTTP goes to `blobs/ETAG.incomplete`, which a cut download leaves there and the next one
continues; huggingface_hub itself starts every file anew in each process (ADR 0025 has what each of the two does, case
by case; `transfer.py` brings one file). Where it has its faster protocol (xet), it fetches the file itself.

Invariant: a file that is not what the hub's checksum says does not stay in the cache.

Run it:  blockpress pull google/diffusiongemma-26B-A4B-it
Source: https://huggingface.co/docs/hub/api (tree, lfs.oid); git's object names for files outside LFS.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpress.checkpoints.hub import cache as cached
from blockpress.checkpoints.hub.cache import HubName, home_of
from blockpress.checkpoints.hub.errors import hub_errors
from blockpress.checkpoints.hub.selection import select_files
from blockpress.checkpoints.hub.transfer import bring, check_sum, size_of
from blockpress.errors import HubError
from blockpress.hardware import replacing

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

Progress = Callable[["RepoFile", int], None]
"""Called with a file and how many of its bytes are on disk: first when it is begun, last when it is whole."""

TIMEOUT = 10.0
"""Seconds that the hub may take to answer before it counts as away."""

ROOM = 64 << 20
"""Bytes of disk that are left free."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to fetch: `files` of one commit, small ones first, and `left`, those that are not in the cache yet."""

    name: HubName
    commit: str
    files: tuple[RepoFile, ...]
    left: tuple[RepoFile, ...]

    @property
    def path(self) -> Path:
        """The snapshot's directory in the cache."""
        return home_of(self.name.repo) / "snapshots" / self.commit

    @property
    def bytes_left(self) -> int:
        """Bytes still to come, less what a cut download left."""
        return sum(file.size - size_of(_partial(self.name.repo, file)) for file in self.left)


def plan(name: HubName, *, include: Sequence[str] = (), exclude: Sequence[str] = (), file: str | None = None) -> Plan:
    """Ask the hub for the files of a model, and compare them with the cache.

    Args:
        include, exclude: patterns such as "*.json"; with `include` these files are taken, not what a model needs.
        file: the one GGUF file of a repository that has several.

    Raises:
        HubError: no such repository or revision, no right to it, no connection, or nothing in it that we can run.
    """
    from huggingface_hub import HfApi, constants

    with hub_errors(name):
        try:
            commit = HfApi().model_info(name.repo, revision=name.revision, timeout=TIMEOUT).sha
            if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{6,64}", commit):
                raise HubError(f"{constants.ENDPOINT} gave no commit for {name.repo}", hint="is HF_ENDPOINT a hub?")
            remote = _listed(name.repo, commit)
        # What the library makes of an answer that is not the hub's: a page of a proxy, an API of another kind.
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise HubError(
                f"{constants.ENDPOINT} does not answer as a hub about {name.repo}: {type(error).__name__}: {error}",
                hint="check HF_ENDPOINT, and whether a proxy answers in its place",
            ) from error
    files = select_files(name.repo, remote, include=include, exclude=exclude, file=file)
    snapshot = home_of(name.repo) / "snapshots" / commit
    left = tuple(wanted for wanted in files if not _is_whole(snapshot / wanted.path, wanted))
    return Plan(name=name, commit=commit, files=files, left=left)


def disk_room() -> tuple[Path, int]:
    """The directory of the cache, or the nearest above it that is there, and the free bytes of its disk."""
    home = cached.cache_directory().absolute()
    existing = next(place for place in (home, *home.parents) if place.is_dir())
    return existing, shutil.disk_usage(existing).free


def _listed(repo: str, commit: str) -> list[RepoFile]:
    """The files of a commit: from the tree, or where a mirror serves none, from the repository's own description."""
    from huggingface_hub import HfApi, RepoFile, errors

    try:
        tree = list(HfApi().list_repo_tree(repo, revision=commit, recursive=True))
        return [entry for entry in tree if isinstance(entry, RepoFile)]
    except (errors.EntryNotFoundError, TypeError, ValueError, LookupError, AttributeError):
        described = HfApi().model_info(repo, revision=commit, files_metadata=True, timeout=TIMEOUT).siblings
        files = [RepoFile(path=entry.rfilename, size=entry.size, oid=entry.blob_id) for entry in described or ()]
        for file, entry in zip(files, described or (), strict=True):
            file.lfs = entry.lfs
            if not isinstance(file.size, int) or not (file.lfs or file.blob_id):
                raise ValueError(f"{file.path} is listed without its size and checksum") from None
        if not files:
            raise
        return files


def check_room(plan: Plan) -> None:
    """Raises HubError: the disk has less room than the plan needs."""
    (place, free), needed = disk_room(), plan.bytes_left + ROOM
    if plan.left and free < needed:
        raise HubError(
            f"{plan.name.repo} needs {needed / 1e9:.2f} GB of disk, and {str(place)!r} has {free / 1e9:.2f} GB free",
            hint="free some (`blockpress ls`, `blockpress rm NAME`), or set HF_HOME to a larger disk",
        )


def fetch(plan: Plan, progress: Progress = lambda file, done: None) -> Path:
    """Fetch what is left of a plan; the snapshot's directory.

    A call that is cut, by Ctrl-C or by the network, is continued by the next one.

    Raises:
        HubError: the connection broke for good, the disk is full, or a file is not what the hub says it is.
    """
    for file in plan.left:
        meter = _meter(file, progress)
        meter.report(size_of(_partial(plan.name.repo, file)))
        with hub_errors(plan.name, file.path, file.size):
            _fetch_file(plan, file, meter)
        meter.report(file.size)
    _name_commit(plan)
    return plan.path


def _fetch_file(plan: Plan, file: RepoFile, meter: Any) -> None:
    blob, link = _blob(plan.name.repo, file), plan.path / file.path
    if _is_whole(link, file):  # by another process, since the plan was made
        return
    if link.is_file() and not _is_whole(link, file):  # of another size
        blob.unlink(missing_ok=True)
        link.unlink()
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not (file.xet_hash and _has_xet() and _through_xet(plan, file, meter)):
        _through_http(plan, file, meter)


def _through_xet(plan: Plan, file: RepoFile, meter: Any) -> bool:
    """Have the library fetch a file, unless its blob is there, and link it. False: the chunk store is out of reach."""
    from huggingface_hub import hf_hub_download

    repo, blob, link = plan.name.repo, _blob(plan.name.repo, file), plan.path / file.path
    checked = blob.resolve() if blob.exists() else None
    try:
        hf_hub_download(repo, file.path, revision=plan.commit, cache_dir=cached.cache_directory(), tqdm_class=meter)
    except (RuntimeError, ConnectionError, TimeoutError):  # a mirror lists it and does not have it
        return False
    if link.resolve() != checked:
        try:
            check_sum(repo, file, link)
        except HubError:
            link.unlink(missing_ok=True)
            raise
    return True


def _through_http(plan: Plan, file: RepoFile, meter: Any) -> None:
    """Bring a blob into the cache, unless it is there, and link it. One process a file, by the library's own lock."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import _create_symlink
    from huggingface_hub.utils import WeakFileLock

    repo, blob, partial = plan.name.repo, _blob(plan.name.repo, file), _partial(plan.name.repo, file)
    lock = cached.cache_directory() / ".locks" / home_of(repo).name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            bring(hf_hub_url(repo, file.path, revision=plan.commit), repo, file, partial, meter)
            os.replace(partial, blob)
        # Not `hf_hub_download`: it asks for the file's ETag, and fetches it again where a mirror has one of its own.
        if not _is_whole(plan.path / file.path, file):
            (plan.path / file.path).parent.mkdir(parents=True, exist_ok=True)
            _create_symlink(str(blob), str(plan.path / file.path), new_blob=True)


def _name_commit(plan: Plan) -> None:
    """Move the branch or tag to the commit, now that all of the plan is there; never from a whole model to a part."""
    if plan.name.revision == plan.commit or plan.commit.startswith(plan.name.revision):
        return
    older = cached.commit_of(plan.name.repo, plan.name.revision)
    if older is not None and cached.missing(plan.path) and not cached.missing(plan.path.with_name(older)):
        return
    ref = home_of(plan.name.repo) / "refs" / plan.name.revision
    with replacing(ref) as made:
        made.write_text(plan.commit, encoding="utf-8")


def _has_xet() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _blob(repo: str, file: RepoFile) -> Path:
    """Where the cache keeps a file: by its checksum, which the hub gives as its ETag."""
    return home_of(repo) / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)


def _partial(repo: str, file: RepoFile) -> Path:
    blob = _blob(repo, file)
    return blob.with_name(f"{blob.name}.incomplete")


def _is_whole(path: Path, file: RepoFile) -> bool:
    return path.is_file() and size_of(path) == file.size


def _meter(file: RepoFile, progress: Progress) -> Any:
    """A class that the library takes for a tqdm bar: it hands on how many bytes are there, each count once."""

    class Meter:
        last: int | None = None

        @classmethod
        def report(cls, done: int) -> None:
            if done != cls.last:
                cls.last = done
                progress(file, done)

        def __init__(self, *_: Any, initial: int = 0, total: int | None = None, **__: Any) -> None:
            self.n, self.total = initial, total

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: int | float | None = 1) -> None:
            self.n += int(n or 0)
            self.report(self.n)

        def update_transfer(self, n: int | float | None = 1) -> None:
            """Bytes off the network are not bytes of the file: the library compresses them."""

        def __getattr__(self, name: str) -> Any:  # what a bar can do else: nothing here
            return lambda *_, **__: None

    return Meter
