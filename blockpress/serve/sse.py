"""Streams: server-sent events and lines of JSON, kept alive, and ended when something goes wrong in the middle.

Invariant: a stream that has begun ends with its API's last event or with an error event; a client that leaves, or does
not take what is sent, ends the work behind it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, final

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT
from starlette.types import Receive, Scope, Send

from blockpress.errors import BlockpressError, EngineError, one_line
from blockpress.serve.errors import _ClientGone, _mistake, error_body, ollama_error, openai_error
from blockpress.serve.options import ServeOptions

if TYPE_CHECKING:
    from blockpress.serve.service import Running

Made = TypeVar("Made")
logger = logging.getLogger("blockpress.serve")

DONE = "[DONE]"
_SURROGATE = re.compile("[\ud800-\udfff]")
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


to_json = json.JSONEncoder(ensure_ascii=False).encode
"""JSON as all streams have it."""


def encoded(text: str) -> bytes:
    """JSON whose lone surrogates, which no UTF-8 has, are written as escapes: a client or a model may have sent one."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


class JSONAnswer(JSONResponse):
    """A body of JSON, whatever its texts hold."""

    def render(self, content: Any) -> bytes:
        return encoded(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


@final
class _Stream(StreamingResponse):
    """A body that is sent as it comes. Pieces that are there at once leave at once: each way to the socket costs.

    Args:
        running: whose events the pieces are made of; None: each piece leaves by itself.
        alive: sent when nothing else was for `options.keep_alive` seconds; b"": nothing is.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        media_type: str,
        options: ServeOptions,
        running: Running | None,
        alive: bytes = b"",
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers=UNBUFFERED)
        self._options, self._alive, self._running = options, alive, running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        # A task of its own: what wakes it need not go through all that is around a route.
        sending, leaving = asyncio.ensure_future(self._send_all(send)), asyncio.ensure_future(leave())
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:
            logger.info("%s: the client takes nothing, and its stream is ended", scope["path"])
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self.body_iterator.aclose()  # type: ignore[attr-defined]

    async def _send_all(self, send: Send) -> None:
        """Raises TimeoutError: the client does not take a piece in time."""
        there: list[bytes] = []
        ended = False

        async def flush() -> None:
            if there or ended:
                body = b"".join(there)
                there.clear()
                watch.sends()
                await send({"type": "http.response.body", "body": body, "more_body": not ended})
                watch.waits()

        async def keep_alive() -> None:
            there.append(self._alive)
            await flush()

        async with asyncio.timeout(None) as limit:
            watch = _Watch(keep_alive, self._options.keep_alive, limit, self._options.patience)
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                watch.waits()
                if self._running is not None:
                    self._running.before_waiting = flush
                async for piece in self.body_iterator:
                    there.append(piece)  # type: ignore[arg-type]
                    if self._running is None:
                        await flush()
                ended = True
                await flush()
            finally:
                watch.end()


@final
class _Watch:
    """One timer for the whole of a stream, as one for each piece would cost more than the piece.

    Args:
        alive: run whenever nothing was sent for `silence` seconds.
        limit: is made to end when a piece was not taken within `patience` seconds.
    """

    def __init__(
        self, alive: Callable[[], Coroutine[Any, Any, None]], silence: float, limit: asyncio.Timeout, patience: float
    ) -> None:
        self._alive, self._silence, self._limit, self._patience = alive, silence, limit, patience
        self._loop = asyncio.get_running_loop()
        self._living: asyncio.Task[None] | None = None
        self.sends()
        self._timer = self._loop.call_later(min(silence, patience), self._look)

    def sends(self) -> None:
        """A piece is sent from now on."""
        self._since, self._sending = self._loop.time(), True

    def waits(self) -> None:
        """It was taken, and the next one is waited for."""
        self._since, self._sending = self._loop.time(), False

    def end(self) -> None:
        self._timer.cancel()
        if self._living is not None:
            self._living.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        left = self._since + (self._patience if self._sending else self._silence) - now
        if left <= 0 and self._sending:
            self._limit.reschedule(now)
            return
        if left <= 0:
            self._living, left = self._loop.create_task(self._alive()), self._silence
        self._timer = self._loop.call_later(min(left, self._patience), self._look)


async def _ending(
    chunks: AsyncIterator[Any], written: Callable[[Any], bytes], error: Callable[[BlockpressError], bytes]
) -> AsyncIterator[bytes]:
    """The chunks as they are written; what fails becomes `error`'s last one."""
    try:
        async for chunk in chunks:
            yield written(chunk)
    except BlockpressError as failure:
        yield error(failure)
    except Exception as failure:
        logger.error("a stream failed: %s", one_line(failure), exc_info=failure)
        yield error(_mistake())
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


def event_stream(
    http: Request,
    running: Running | None,
    chunks: AsyncIterator[str | bytes],
    error: Callable[[BlockpressError], bytes] = lambda error: _event(json.dumps(openai_error(error))),
    alive: bytes = KEEPALIVE_COMMENT,
) -> Response:
    """A response that sends each chunk as an event (a text is its data); what fails becomes `error`'s event.

    running: whose events the chunks are made of. alive: what keeps a silent stream alive.
    """
    pieces = _ending(chunks, _event, error)
    return _Stream(pieces, "text/event-stream", http.app.state.service.options, running, alive)


def _event(chunk: str | bytes) -> bytes:
    return chunk if isinstance(chunk, bytes) else encoded(f"data: {chunk}\n\n")


def named(kind: str, body: Mapping[str, Any]) -> bytes:
    """An event with a name, as Anthropic's and OpenAI's newer APIs have them."""
    return encoded(f"event: {kind}\ndata: {to_json(body)}\n\n")


def ndjson_stream(http: Request, running: Running | None, chunks: AsyncIterator[Mapping[str, Any]]) -> Response:
    """A response that sends each chunk as a line of JSON, as Ollama does; what fails is a line with an `error`."""
    lines = _ending(chunks, _line, lambda failure: _line(ollama_error(failure)))
    return _Stream(lines, "application/x-ndjson", http.app.state.service.options, running)


def _line(body: Mapping[str, Any]) -> bytes:
    return encoded(f"{to_json(body)}\n")


def cut_off(path: str, media_type: str, sent: int) -> bytes:
    """How a stream ends whose process was lost, in the form of the API that has the path; empty for other answers.

    Args:
        sent: how many events went out before, at most.
    """
    error = EngineError("the replica that answered was lost", hint="send the request again")
    body = error_body(path, error)
    if media_type.startswith("application/x-ndjson"):
        return _line(body)
    if not media_type.startswith("text/event-stream"):
        return b""
    if path.startswith("/v1/messages"):
        return named("error", body)
    if path.startswith("/v1/responses"):
        said = {"code": "server_error", "message": str(error), "param": None, **body}
        return named("error", {**said, "type": "error", "sequence_number": sent})
    return named("canvas.error", body) if path.startswith("/v1/canvas") else _event(json.dumps(body))


@final
class _Waker:
    """Wakes an event loop from other threads, once for all that a forward has made."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[asyncio.Event] = deque()
        self._woken = False

    def wake(self, there: asyncio.Event) -> None:
        """Set an event of the loop, soon."""
        self._waiting.append(there)
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop has closed, and nobody waits
                self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._woken = False  # before the events are set: what arrives from now on wakes the loop again
        while self._waiting:
            self._waiting.popleft().set()


async def unless_gone(work: Coroutine[Any, Any, Made], http: Request) -> Made:
    """Await `work`, but cancel it when the client closes its connection. Raises _ClientGone: it has."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
