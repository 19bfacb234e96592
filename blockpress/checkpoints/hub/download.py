"""Fetching a model from the hub into huggingface_hub's own cache, so that other tools share what was fetched.

    plan    one request: which files the model needs, their sizes and checksums, and what the cache holds of them
    fetch   a file after the other, small ones first; a branch's name is moved to the new commit when all are there

A file that the hub serves over plain HTTP goes to `blobs/ETAG.incomplete`, which a cut download leaves behind and the
next one continues; huggingface_hub itself starts every file anew in each process. Where it has its faster protocol
(xet), it fetches the file itself.

Invariant: a file gets its name in the cache only when its checksum is the hub's.

Run it:  blockpress pull google/diffusiongemma-26B-A4B-it
Source: https://huggingface.co/docs/hub/api (siblings, lfs.sha256); git's object names for files outside LFS.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blockpress.checkpoints.hub import cache as cached
from blockpress.checkpoints.hub.cache import HubName, home_of
from blockpress.checkpoints.hub.errors import translated
from blockpress.checkpoints.hub.selection import RemoteFile, choose
from blockpress.errors import HubError

Progress = Callable[[RemoteFile, int], None]
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
    files: tuple[RemoteFile, ...]
    left: tuple[RemoteFile, ...]

    @property
    def path(self) -> Path:
        """The snapshot's directory in the cache."""
        return home_of(self.name.repo) / "snapshots" / self.commit

    @property
    def bytes_left(self) -> int:
        """Bytes still to come, less what a cut download left."""
        return sum(file.size - _size(_partial(self.name.repo, file)) for file in self.left)


def plan(name: HubName, *, include: Sequence[str] = (), exclude: Sequence[str] = (), file: str | None = None) -> Plan:
    """Ask the hub for the files of a model, and compare with the cache.

    Args:
        include, exclude: patterns such as "*.json"; with `include` these files are taken, not what a model needs.
        file: the one GGUF file of a repository that has several.

    Raises:
        HubError: no such repository or revision, no right to it, no connection, or nothing in it that we can run.
    """
    from huggingface_hub import HfApi, constants

    with translated(name):
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=TIMEOUT)
    commit = info.sha
    if not commit:
        raise HubError(f"{constants.ENDPOINT} gave no commit for {name.repo}", hint="is HF_ENDPOINT a hub?")
    remote = [RemoteFile.of(sibling) for sibling in info.siblings or ()]
    files = choose(name.repo, remote, include=include, exclude=exclude, file=file)
    snapshot = home_of(name.repo) / "snapshots" / commit
    left = tuple(wanted for wanted in files if not _is_whole(snapshot / wanted.path, wanted))
    return Plan(name=name, commit=commit, files=files, left=left)


def check_room(plan: Plan) -> None:
    """Raises HubError: the disk has less room than the plan needs."""
    home = cached.cache_directory()
    existing = next(place for place in (home, *home.absolute().parents) if place.is_dir())
    free, needed = shutil.disk_usage(existing).free, plan.bytes_left + ROOM
    if plan.left and free < needed:
        raise HubError(
            f"{plan.name.repo} needs {needed / 1e9:.2f} GB of disk, and {str(existing)!r} has {free / 1e9:.2f} GB free",
            hint="free some (`blockpress ls`, `blockpress rm NAME`), or set HF_HOME to a larger disk",
        )


def fetch(plan: Plan, progress: Progress = lambda file, done: None) -> Path:
    """Fetch what is left of a plan; the snapshot's directory.

    A call that is cut, by Ctrl-C or by the network, is continued by the next one.

    Raises:
        HubError: the connection broke for good, the disk is full, or a file is not what the hub says it is.
    """
    for file in plan.left:
        report = _each_once(file, progress)
        report(_size(_partial(plan.name.repo, file)))
        with translated(plan.name, file.path):
            _fetch_file(plan, file, report)
        report(file.size)
    _name_commit(plan)
    return plan.path


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids connections."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _each_once(file: RemoteFile, progress: Progress) -> Callable[[int], None]:
    last: int | None = None

    def report(done: int) -> None:
        nonlocal last
        if done != last:
            last = done
            progress(file, done)

    return report


def _fetch_file(plan: Plan, file: RemoteFile, report: Callable[[int], None]) -> None:
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url

    repo, commit, token = plan.name.repo, plan.commit, get_token()
    (home_of(repo) / "blobs").mkdir(parents=True, exist_ok=True)
    metadata = get_hf_file_metadata(hf_hub_url(repo, file.path, revision=commit), token=token, timeout=TIMEOUT)
    blob = home_of(repo) / "blobs" / str(metadata.etag)
    if (plan.path / file.path).is_file():  # of another size, or it would not be asked for
        blob.unlink(missing_ok=True)
        (plan.path / file.path).unlink()
    if not blob.exists() and not (metadata.xet_file_data is not None and _has_xet()):
        with _locked(repo, str(metadata.etag)):
            _through_http(file, metadata.location, _partial(repo, file), report)
            _check(repo, file, _partial(repo, file))
            os.replace(_partial(repo, file), blob)
    fresh = not blob.exists()
    # Links the blob into the snapshot; where there is none yet, the library fetches it first.
    path = Path(
        hf_hub_download(repo, file.path, revision=commit, cache_dir=cached.cache_directory(), tqdm_class=_meter(report))
    )
    if fresh:
        try:
            _check(repo, file, path)
        except HubError:
            path.unlink(missing_ok=True)
            raise


def _through_http(file: RemoteFile, url: str, partial: Path, report: Callable[[int], None]) -> None:
    """Bring `partial` to the file's size, from where it stands."""
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get

    while True:
        if _size(partial) > file.size:
            partial.unlink()
        before = _size(partial)
        try:
            with partial.open("ab") as out:
                http_get(
                    url,
                    out,
                    resume_size=before,
                    headers=_headers(url),
                    expected_size=file.size,
                    displayed_filename=file.path,
                    tqdm_class=_meter(report),
                )
            return
        except errors.HfHubHTTPError:
            raise
        except errors.HTTPError:
            # The library resumes after some broken connections and not after others, such as a reset.
            if _size(partial) <= before:
                raise


def _headers(url: str) -> dict[str, str]:
    """The caller's token for the hub itself, and for nobody else that a file's address leads to."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import build_hf_headers

    home = url.startswith(constants.ENDPOINT.rstrip("/") + "/")
    return dict(build_hf_headers(token=get_token() if home else False))


def _check(repo: str, file: RemoteFile, path: Path) -> None:
    """Compare a fetched file with the hub's checksum, and remove what differs.

    Raises:
        HubError: another size or checksum.
    """
    size = path.stat().st_size
    said, found = (file.sha256, _sha256(path)) if file.sha256 else (file.git_name, _git_name(path, size))
    if size == file.size and (said is None or said == found):
        return
    blob = path.resolve()
    blob.unlink()
    raise HubError(
        f"{file.path} of {repo} arrived damaged: {size:,} bytes with checksum {found[:12]}…, the hub says "
        f"{file.size:,} bytes with {(said or 'none')[:12]}…",
        hint="the file was removed; pull again, and if it stays so, look for a proxy that changes downloads",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_name(path: Path, size: int) -> str:
    """The name that git gives to a file's content."""

    def start() -> Any:
        return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)

    with path.open("rb") as stream:
        return hashlib.file_digest(stream, start).hexdigest()


def _name_commit(plan: Plan) -> None:
    """Move the branch or tag to the commit, now that all of the plan is there; never from a whole model to a part."""
    if plan.name.revision == plan.commit or plan.commit.startswith(plan.name.revision):
        return
    older = cached.commit_of(plan.name.repo, plan.name.revision)
    if older is not None and cached.missing(plan.path) and not cached.missing(plan.path.with_name(older)):
        return
    ref = home_of(plan.name.repo) / "refs" / plan.name.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(plan.commit, encoding="utf-8")


@contextmanager
def _locked(repo: str, etag: str) -> Iterator[None]:
    """One process a file; the lock is the one that huggingface_hub takes."""
    from huggingface_hub.utils import WeakFileLock

    place = cached.cache_directory() / ".locks" / home_of(repo).name
    place.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(place / f"{etag}.lock"):
        yield


def _has_xet() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _partial(repo: str, file: RemoteFile) -> Path:
    return home_of(repo) / "blobs" / f"{file.sha256 or file.git_name or file.path.replace('/', '--')}.incomplete"


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _meter(report: Callable[[int], None]) -> type:
    """A class that the library fills as it would a tqdm bar: it hands on how many bytes are there."""

    class Meter:
        def __init__(self, *_: Any, initial: int = 0, total: int | None = None, **__: Any) -> None:
            self.n, self.total = initial, total

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: int | float | None = 1) -> None:
            self.n += int(n or 0)
            report(self.n)

        def update_transfer(self, n: int | float | None = 1) -> None:
            """Bytes off the network are not bytes of the file: the library compresses them."""

        def __getattr__(self, name: str) -> Any:  # what a bar can do else: nothing here
            return lambda *_, **__: None

    return Meter
