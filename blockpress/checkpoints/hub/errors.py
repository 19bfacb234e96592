"""What the hub and the network refuse, in words that say what to do.

Invariant: of what goes wrong between this machine and the hub, everything that is not our own mistake leaves as a
HubError with a hint; the hub's own page of text never reaches the reader.

Run it:  python -m pytest tests/checkpoints/test_hub.py
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blockpress.checkpoints.hub import cache as cached
from blockpress.checkpoints.hub.cache import HubName
from blockpress.errors import HubError


@contextmanager
def hub_errors(name: HubName, file: str = "", size: int = 0) -> Iterator[None]:
    """Raises HubError in the place of what huggingface_hub and its HTTP client raise; `size`: bytes of the file."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        # The library wraps what it met while it asked for the file.
        raise _explained(name, file, size, error.__cause__ or error) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError, OSError) as error:
        raise _explained(name, file, size, error) from error


def _explained(name: HubName, file: str, size: int, error: BaseException) -> HubError:
    from huggingface_hub import constants, errors

    what = f"{file} of {name.repo}" if file else name.repo
    page = f"{constants.ENDPOINT}/{name.repo}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it", hint="unset HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.GatedRepoError):
        login = "log in by `hf auth login`, and " if _status(error) == 401 else ""
        return HubError(
            f"{name.repo} is gated: the hub answered {_status(error)}", hint=f"{login}accept its licence at {page}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{name.repo} has no revision {name.revision!r}", hint=f"see its branches and tags at {page}/tree/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"there is no repository {name.repo} at {constants.ENDPOINT}, or it is private",
            hint="check the name; for a private one log in by `hf auth login`",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{what} is not there any more", hint="the repository has just changed: pull again")
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(what, page, _status(error))
    if isinstance(error, errors.HTTPError):
        reason = str(error) or type(error).__name__
        return HubError(
            f"{constants.ENDPOINT} cannot be reached for {what}: {reason}",
            hint="check the network and HF_ENDPOINT; what has arrived is kept, and pulling again goes on",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        home = cached.cache_directory()
        takes = f", which takes {size:,} bytes," if size else ""
        return HubError(
            f"the disk is full: {what}{takes} did not fit, and {home} has {shutil.disk_usage(home).free:,} bytes free",
            hint="free some room, or set HF_HOME to a larger disk; what has arrived is kept, and pulling again goes on",
        )
    return HubError(
        f"{what} could not be fetched: {error}", hint="check the cache's directory and its rights (HF_HOME)"
    )


def _by_status(what: str, page: str, status: int) -> HubError:
    if status in (401, 403):
        return HubError(
            f"the hub refuses {what} with {status}", hint=f"log in by `hf auth login` with a token that may read {page}"
        )
    when = "wait a minute, then pull again" if status == 429 or status >= 500 else "check the name and HF_ENDPOINT"
    return HubError(f"the hub answered {status} for {what}", hint=f"{when}; what has arrived is kept")


def _status(error: Any) -> int:
    return int(error.response.status_code)
