"""A hub on this machine: as much of its protocol as huggingface_hub asks for, and the faults that a real one has.

It serves the files of its repositories at one commit each, and keeps every request that it got.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Files by path. Those of LFS have a sha256, as weights have on the hub; the others are in git itself."""

    files: dict[str, bytes]
    refuse: tuple[int, str] | None = None  # status and X-Error-Code
    claims: dict[str, str] = field(default_factory=dict)  # sha256 other than the content's
    xet: set[str] = field(default_factory=set)  # files that the listing says are in the chunk store

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps({k: git_name(v) for k, v in sorted(self.files.items())}).encode()).hexdigest()

    def sha256(self, path: str) -> str | None:
        if not path.endswith((".safetensors", ".gguf", ".bin", "tokenizer.json")):
            return None
        return self.claims.get(path) or hashlib.sha256(self.files[path]).hexdigest()

    def etag(self, path: str) -> str:
        return self.sha256(path) or git_name(self.files[path])

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for path, content in sorted(self.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_name(content)}
            if sha256 := self.sha256(path):
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            if path in self.xet:
                entry["xetHash"] = "ab" * 32
            entries.append(entry)
        return entries

    def siblings(self) -> list[dict[str, Any]]:
        """The same as the repository's description has it."""
        return [
            {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
            | ({"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {})
            for entry in self.tree()
        ]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


class Hub:
    """The server's state. `cut[path]` is how many bytes of that file the next answers give before the line breaks.

    `resets` makes it break by a reset instead of an early end, which HTTP clients tell apart. `redirects` sends those who
    ask for a file of LFS to another host, as the real hub does. `ranges` is how it answers those who ask for the rest of a
    file, and `tree` whether it lists a commit's files apart from the repository's description, which some mirrors do not;
    `etags` makes it call files by names of its own.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cut: dict[str, list[int]] = {}
        self.resets = False
        self.redirects = False
        self.ranges = "the rest, 206"
        self.tree = True
        self.etags = False
        self.url = ""

    def of(self, ending: str, method: str = "GET") -> list[Request]:
        return [request for request in self.requests if request.method == method and request.path.endswith(ending)]


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            asked = Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
            hub.requests.append(asked)
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision/)?(.+))?", path)
            file = re.fullmatch(r"(?:/elsewhere)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not (match := api or file):
                return self.refuse(404, "")
            repository = hub.repositories.get(match[1])
            if repository is None:
                return self.refuse(404 if asked.authorization else 401, "RepoNotFound")
            if repository.refuse is not None:
                return self.refuse(*repository.refuse)
            if match[2] == f"tree/{repository.commit}" and hub.tree:
                return self.give(json.dumps(repository.tree()).encode(), {"Content-Type": "application/json"}, body)
            if match[2] not in (None, f"tree/{repository.commit}", "main", "v1", repository.commit):
                return self.refuse(404, "RevisionNotFound")
            if api:
                described = {"id": match[1], "sha": repository.commit, "siblings": repository.siblings()}
                content = json.dumps(described).encode()
                return self.give(content, {"Content-Type": "application/json"}, body)
            if match[3] not in repository.files:
                return self.refuse(404, "EntryNotFound")
            elsewhere = hub.url.replace("127.0.0.1", "localhost") + "/elsewhere" + path
            to = elsewhere if hub.redirects and repository.sha256(match[3]) and "/elsewhere" not in path else None
            self.give_file(repository, match[3], body, to)

        def give_file(self, repository: Repository, path: str, body: bool, to: str | None) -> None:
            content, etag = repository.files[path], repository.etag(path)
            etag = f"own-{etag[:8]}" if hub.etags else etag
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            if repository.sha256(path):
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            if to is not None:
                return self.give(b"", headers | {"Location": to}, body, 302)
            status = 200
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start = int(asked[1])
                if hub.ranges.isdecimal():
                    return self.refuse(int(hub.ranges), "")
                what, named = hub.ranges.split(", ")
                first = {"the rest": start, "all": 0, "other bytes": start // 2, "nothing": len(content)}[what]
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                content, status = content[first:], int(named)
            stop = None
            if body and hub.cut.get(path):
                stop = hub.cut[path].pop(0)
            self.give(content, headers, body, status, stop)

        def give(
            self, content: bytes, headers: dict[str, str], body: bool, status: int = 200, stop: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content if stop is None else content[:stop])
            if stop is not None:
                if hub.resets:  # closing with a linger of 0 seconds sends a reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    time.sleep(0.05)  # what was written is read before the reset overtakes it
                    os.close(self.connection.detach())
                self.close_connection = True

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = (
            128  # several pulls at once connect by dozens, and who finds no place asks again after seconds
        )

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def in_its_place(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """The hub of this process is the local one, and its cache a fresh directory; no token is known."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        # The library writes ten megabytes at a time; the files here are smaller than that.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # It waits a little still: this is everybody's `sleep`, and who waits for a lock would take the core from who holds it.
        pause = time.sleep
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: pause(min(seconds, 0.001)))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield hub
        close_session()
