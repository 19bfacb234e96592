"""What is checked before a body is read: the Host and Origin headers, the key, and the size.

A page of another site may make a browser send requests to this machine. It cannot choose the Host header's name without
owning that name (DNS rebinding), nor hide its Origin; so names other than this machine's own, and foreign origins, are
refused. Keys are compared in constant time.

Invariant: what is refused here costs no work of the model.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import time
from functools import lru_cache
from typing import final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockpress.serve.errors import RETRY_AFTER, _Refused, error_body
from blockpress.serve.options import ServeOptions

logger = logging.getLogger("blockpress.serve")

OPEN = ("/health", "/ping", "/")
"""Paths that need no key, as well as the page's files."""
LOOPBACK = frozenset({"localhost", "localhost.localdomain"})


@final
class Guard:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options
        self._names = LOOPBACK | {socket.gethostname().lower()} | {name.lower() for name in options.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, status, began = Headers(scope=scope), 0, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                seconds = time.monotonic() - began
                logger.info("%s %s: %d after %.3f s", scope["method"], scope["path"], status, seconds)
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(headers, receive), sending)
        except _Refused as refused:
            if status:
                raise
            await answer_refused(refused, scope["path"], sending)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if len(headers.getlist("host")) > 1:
            raise _Refused(400, "there are two Host headers", "send one")
        host = _host(headers.get("host", ""))
        if host not in self._names and not _is_address(host) and "*" not in self._names:
            raise _Refused(
                403, f"the Host header names {host!r:.100}", "ask by address or localhost, or start with --allow-host"
            )
        origin = headers.get("origin")
        if origin is not None and not self._own(origin, headers.get("host", "")):
            raise _Refused(403, f"the Origin is {origin!r:.100}", "start the server with --allow-origin for that page")
        if self._options.api_keys and not self._is_open(scope) and not self._has_key(headers):
            raise _Refused(401, "the API key is missing or wrong", "send Authorization: Bearer KEY, or x-api-key: KEY")

    def _own(self, origin: str, host: str) -> bool:
        allowed = self._options.origins
        return "*" in allowed or origin in allowed or origin.partition("://")[2] == host

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        return path in OPEN or path.startswith("/page/") or scope["method"] == "OPTIONS"

    def _has_key(self, headers: Headers) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self._options.api_keys]
        return any(matches)

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        most, length = self._options.max_body, headers.get("content-length", "")
        too_large = _Refused(413, f"the body has more than {most} bytes", "send less, or start with --max-body")
        if length.isdigit() and int(length) > most:
            raise too_large
        seen, whole = 0, False
        until = asyncio.get_running_loop().time() + self._options.patience

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise _Refused(408, "the body did not arrive in time", "send it faster") from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > most:
                raise too_large
            return message

        return limited


def _host(header: str) -> str:
    """The Host header without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


@lru_cache(maxsize=256)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def answer_refused(refused: _Refused, path: str, send: Send, *, close: bool = False) -> None:
    """The whole answer to a request that no route sees. close: the connection, too."""
    body = json.dumps(error_body(path, refused)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER).encode()))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
