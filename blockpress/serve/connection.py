"""What a client may do with its connection: use it, or lose it. uvicorn alone would wait for ever.

    made --headers--> request --body (`Guard`)--> answer --taken--> next request, or the end

Each arrow has `patience` seconds in all, however slowly its bytes trickle. More connections than the system has file
descriptors for are told so, and closed.

Invariant: whatever a client does or leaves undone, its socket is closed in the end.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from functools import partial
from typing import Any, final

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from blockpress.serve.errors import _Refused
from blockpress.serve.guard import answer_refused
from blockpress.serve.options import ServeOptions

RESERVE = 128
"""File descriptors that are not for connections: files of the model, the log, images that are fetched."""
MOST_HEAD = 64 << 10
"""Bytes of a request that are not its body: its headers, or what follows the last piece of a body."""
BRIEFLY = 1.0
"""Seconds for a connection that is one too many."""
LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def uvicorn_config(app: Any, options: ServeOptions, **more: Any) -> uvicorn.Config:
    """How uvicorn serves `app`: requests are read by httptools, their headers are bounded here."""
    most = _open_files() - RESERVE
    connection = partial(_Connection, patience=options.patience, most=most)
    return uvicorn.Config(app, http=connection, access_log=False, server_header=False, **more)  # type: ignore[arg-type]


def _open_files() -> int:
    """How many files the process may have open; first raised as far as the system allows."""
    try:
        import resource
    except ImportError:  # on Windows, whose limit is another
        return 1 << 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError):  # macOS calls its limit infinite, and refuses it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    refused = _Refused(503, "too many connections are open", "send the request again later")
    await answer_refused(refused, scope["path"], send, close=True)


@final
class _Connection(HttpToolsProtocol):
    """uvicorn's connection, with an end to its patience. most: connections of the server."""

    def __init__(self, *args: Any, patience: float, most: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._patience, self._most = patience, most
        self._late: asyncio.TimerHandle | None = None
        self._untaken: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        """The request that is answered now, or was last; more of them may wait in `pipeline`."""
        self._in_body = False
        self._head = 0
        """Bytes since the last headers or piece of a body ended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self.app, self._patience = _full, min(BRIEFLY, self._patience)
        self._late = self.loop.call_later(self._patience, self._give_up)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a machine that has vanished takes nothing, and says nothing
            with suppress(OSError, AttributeError):
                peer = transport.get_extra_info("socket")
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._patience))

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self._head > MOST_HEAD and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")
        self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = max(1, self._head)

    def on_headers_complete(self) -> None:
        self._head, self._in_body = 0, True
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head, self._in_body = 0, False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answering = self.pipeline[-1][0]
        super().on_response_complete()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()

    @property
    def _answered(self) -> bool:
        return self._answering is None or self._answering.response_complete

    def _watch(self) -> None:
        """Count the time of what the client has begun and not ended, from its first byte on."""
        unfinished = self._answered and (self._head > 0 or self._in_body)
        if not (unfinished or self.transport.is_closing()):
            _cancel(self._late)
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(self._patience, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        if self._head and self._answered and not (self._in_body or self.transport.is_closing()):
            self.transport.write(LATE)
            self.transport.close()
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken = self.loop.call_later(self._patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._untaken)

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._late)
        _cancel(self._untaken)
        if self._answering is not None and self._answering is not self.cycle:  # uvicorn tells the last in line alone
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
