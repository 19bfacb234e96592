"""A client's download of a model from the hub, told in the words of Ollama's `/api/pull`.

Invariant: one at a time; a client that leaves ends it, and the next one goes on where it was.
Run it:  blockpress serve --allow-pull
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from blockpress.checkpoints.hub import download
from blockpress.checkpoints.hub.cache import HubName
from blockpress.errors import HubError
from blockpress.serve.service import Service

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

PROGRESS = 0.2
"""Seconds between two looks at how far a download is."""


async def pulled(service: Service, wanted: HubName) -> AsyncIterator[dict[str, Any]]:
    """The states of a download, in Ollama's words. Where the client leaves it stops, and the next one goes on.

    Raises:
        HubError: the hub does not have it, does not answer, or the disk is too full.
    """
    done: dict[str, dict[str, Any]] = {}  # by path
    gone = threading.Event()

    def progress(file: RepoFile, count: int) -> None:
        if gone.is_set():
            raise HubError(f"{wanted.repo} is no longer wanted", hint="pull it again to go on")
        digest = f"sha256:{file.lfs.sha256}" if file.lfs else f"sha1:{file.blob_id}"
        state = {"status": f"pulling {digest.partition(':')[2][:12]}", "digest": digest}
        done[file.path] = {**state, "total": file.size, "completed": count}

    yield {"status": "pulling manifest"}
    async with service.pulling:
        plan = await anyio.to_thread.run_sync(partial(download.plan, wanted, file=wanted.file))
        download.check_room(plan)
        fetching = asyncio.ensure_future(asyncio.to_thread(download.fetch, plan, progress))
        try:
            said: dict[str, dict[str, Any]] = {}
            while not fetching.done() or said != done:
                for path, state in list(done.items()):
                    if said.get(path) != state:
                        said[path] = state
                        yield state
                await asyncio.wait({fetching}, timeout=PROGRESS)
            fetching.result()
        finally:
            gone.set()
            await asyncio.gather(fetching, return_exceptions=True)
    for status in ("verifying sha256 digest", "writing manifest", "success"):
        yield {"status": status}
