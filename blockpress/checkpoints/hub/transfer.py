"""One file over plain HTTP into a partial file, which is continued where the last download was cut.

Mirrors answer a Range with all of the file, with the rest but not the status of a rest, with other bytes than were
asked for, or with a refusal. What was put together from several answers and is not the file is dropped, and fetched
once more in one piece.

Invariant: a partial file stays only where the next download can go on with it: after a broken connection, not after an
answer that cannot be continued or a file that is not what the hub's checksum says.

Run it:  python -m pytest tests/checkpoints/test_hub.py -k Mirror
Source: RFC 9110, section 14 (range requests); ADR 0025.
"""

from __future__ import annotations

import functools
import hashlib
import io
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpress.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_ELSEWHERE = "what had arrived was removed; pull again, and if it stays so, take another mirror (HF_ENDPOINT) or none"

_NO_RANGES = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.NOT_IMPLEMENTED,
}
"""How servers without ranges refuse one, besides 416. A 403 or 404 is said of the file itself."""


def bring(url: str, repo: str, file: RepoFile, partial: Path, meter: Any) -> None:
    """Bring `partial` to the file that the hub lists.

    Raises:
        HubError: what the server sends is not that file, or it was cut and the server does not continue it. What
            huggingface_hub raises where the server cannot be reached or refuses: the partial file stays.
    """
    for last in (False, True):
        starts: list[int] = []
        try:
            _fetch(url, repo, file, partial, meter, starts)
            check_sum(repo, file, partial)
            return
        except HubError:
            partial.unlink(missing_ok=True)
            if last or not any(starts):
                raise


def _fetch(url: str, repo: str, file: RepoFile, partial: Path, meter: Any, starts: list[int]) -> None:
    """Ask for what is missing until nothing is; redirected elsewhere, the token stays behind. Errors as `bring`.

    Args:
        starts: gets the byte from which each answer was asked for.
    """
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if size_of(partial) > file.size:
        partial.unlink()
    partial.touch()
    while (before := size_of(partial)) < file.size:
        if before <= max(starts, default=-1):
            raise _stuck(repo, file, before)
        starts.append(before)
        try:
            with _Part(repo, file, partial) as out:
                # It is not told the size, which it would compare with what one answer says.
                http_get(
                    url,
                    out,
                    resume_size=before,
                    headers=build_hf_headers(),
                    displayed_filename=file.path,
                    tqdm_class=meter,
                )
        except errors.HfHubHTTPError as error:
            status, has_part = error.response.status_code, size_of(partial) > 0
            if status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and not (has_part and status in _NO_RANGES):
                raise
            starts.append(size_of(partial))  # the library asked for a range by itself, after a break
            raise _stuck(repo, file, starts[-1]) from error
        except errors.HTTPError:
            # The library resumes after some broken connections and not after others, such as a reset.
            if size_of(partial) <= before:
                raise
        except OSError as error:
            if error.errno is not None:  # else "Consistency check failed": the answer was shorter than it said itself
                raise


class _Part(io.BufferedWriter):
    """A partial file that does not become longer than the file, and is begun anew once at most: a server may send
    without end, or break off each time and never continue, to which the library has no limit."""

    def __init__(self, repo: str, file: RepoFile, path: Path) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.repo, self.file, self.restarted = repo, file, False

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.file.size:
            raise HubError(
                f"the server sends more than the {self.file.size:,} bytes that the hub lists for {self.file.path} of "
                f"{self.repo}",
                hint=_ELSEWHERE,
            )
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        """The library calls it where an answer to a range is not the rest."""
        if self.restarted:
            raise _stuck(self.repo, self.file, self.tell())
        self.restarted = True
        return super().truncate(size)


def _stuck(repo: str, file: RepoFile, size: int) -> HubError:
    return HubError(
        f"{file.path} of {repo} broke off at {size:,} bytes, the hub says {file.size:,} bytes, and the server does not "
        "continue it",
        hint=_ELSEWHERE,
    )


def check_sum(repo: str, file: RepoFile, path: Path) -> None:
    """Compare a fetched file with the hub's checksum, and remove what differs.

    Raises:
        HubError: another size or checksum.
    """
    size = path.stat().st_size
    expected = file.lfs.sha256 if file.lfs else file.blob_id
    git = functools.partial(hashlib.sha1, f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256" if file.lfs else git).hexdigest()
    if found == expected:
        return
    path.resolve().unlink()
    raise HubError(
        f"{file.path} of {repo} arrived damaged: {size:,} bytes with checksum {found[:12]}…, the hub says "
        f"{file.size:,} bytes with {expected[:12]}…",
        hint=_ELSEWHERE,
    )


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none, or none any more, since another process has moved it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
