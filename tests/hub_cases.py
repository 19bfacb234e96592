"""What huggingface_hub itself does where `blockpress pull`, `ls` and `rm` promise something: the table of ADR 0025.

Where a newer version of the library does better, code of `checkpoints/hub/` may go. Run by hand, not by pytest.

Run it:  python -m tests.hub_cases
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from tests.builders.hub_server import Hub, Repository, in_its_place

REPO, WEIGHTS = "me/some-model", "model.safetensors"
BYTES = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(256)) * 4
BREAKS = [0] * 30


def tried(call: Callable[[], object] = lambda: snapshot_download(REPO)) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return type(error).__name__
    return "ends well" + (", with a warning" if caught else "")


def home() -> Path:
    return Path(constants.HF_HUB_CACHE) / "models--me--some-model"


def ranges(hub: Hub) -> list[str | None]:
    return [request.range for request in hub.of(WEIGHTS)]


def ended_early(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    hub.cut[WEIGHTS] = [10_500, 4_200]
    return f"{tried()}; ranges {ranges(hub)}"


def reset(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    hub.resets = True
    return ended_early(hub, patch)


def cut_and_again(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    hub.cut[WEIGHTS] = [20_000, *BREAKS]
    first, left = tried(), [file.name for file in home().glob("blobs/*.incomplete")]
    hub.cut.clear()
    hub.requests.clear()
    return f"{first}, leaves {left}; again: {tried()}, ranges {ranges(hub)}"


def damaged(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    hub.repositories[REPO].claims[WEIGHTS] = "ab" * 32
    return tried()


def cut_short_in_the_cache(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    path = Path(snapshot_download(REPO)) / WEIGHTS
    path.resolve().write_bytes(b"x")
    return f"{tried()}; {path.stat().st_size} of {len(BYTES)} bytes"


def cut_update(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    old = Path(snapshot_download(REPO)).name
    hub.repositories[REPO].files[WEIGHTS] = BYTES[::-1]
    hub.cut[WEIGHTS] = list(BREAKS)
    return f"{tried()}; main is the {'old' if (home() / 'refs/main').read_text() == old else 'new, partial'} commit"


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    hub.cut[WEIGHTS] = list(BREAKS)
    tried()
    return tried(lambda: snapshot_download(REPO, local_files_only=True))


def refused(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    said = []
    for status, code in ((401, "GatedRepo"), (403, ""), (404, "RepoNotFound"), (404, "RevisionNotFound"), (503, "")):
        hub.repositories[REPO].refuse = (status, code)
        said.append(f"{status} {code}: {tried()}")
    return "; ".join(said)


def full_disk(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    return tried()


def chosen(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    return ", ".join(sorted(file.name for file in Path(snapshot_download(REPO)).iterdir()))


def at_once(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    with ThreadPoolExecutor(4) as pool:
        said = set(pool.map(lambda _: tried(), range(4)))
    return f"{said}, the weights fetched {len(hub.of(WEIGHTS))} times"


def listed(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    snapshot_download(REPO)
    (home() / "refs/main").write_text("")
    scan = scan_cache_dir(constants.HF_HUB_CACHE)
    return f"{len(scan.repos)} repositories, {len(scan.warnings)} warnings"


def removed(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    def denied(*_: object) -> None:
        raise PermissionError

    commit = Path(snapshot_download(REPO)).name
    patch.setattr(shutil, "rmtree", denied)
    return tried(lambda: scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(commit).execute()) + (
        f"; still there: {home().is_dir()}"
    )


CASES: dict[str, Callable[[Hub, pytest.MonkeyPatch], str]] = {
    "the line ends early, twice": ended_early,
    "the line is reset": reset,
    "cut for good, then asked again": cut_and_again,
    "a file of another checksum": damaged,
    "a file cut short in the cache": cut_short_in_the_cache,
    "an update is cut": cut_update,
    "offline, of a partial snapshot": offline,
    "refusals": refused,
    "a disk with no room": full_disk,
    "the files of a repository": chosen,
    "four at once": at_once,
    "listing, where a ref is empty": listed,
    "removing without the right to": removed,
}


def main() -> None:
    logging.disable(logging.CRITICAL)
    disable_progress_bars()
    print(f"huggingface_hub {huggingface_hub.__version__}")
    files = {"config.json": b"{}", WEIGHTS: BYTES, "consolidated.safetensors": b"twice", "pytorch_model.bin": b"pickle"}
    for name, case in CASES.items():
        with (
            tempfile.TemporaryDirectory() as directory,
            pytest.MonkeyPatch.context() as patch,
            in_its_place(patch, Path(directory)) as hub,
        ):
            hub.repositories[REPO] = Repository(dict(files))
            print(f"{name}: {case(hub, patch)}")


if __name__ == "__main__":
    main()
