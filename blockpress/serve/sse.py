"""Streams: server-sent events and lines of JSON, kept alive, and ended when something goes wrong in the middle.

Invariant: a stream that has begun ends with its API's last event or with an error event; a client that leaves, or does
not take what is sent, ends the work behind it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, final

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.types import Receive, Scope, Send

from blockpress.errors import BlockpressError, EngineError, one_line
from blockpress.serve.errors import _mistake, error_body, ollama_error, openai_error
from blockpress.serve.options import ServeOptions

logger = logging.getLogger("blockpress.serve")

DONE = "[DONE]"
_SURROGATE = re.compile("[\ud800-\udfff]")
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def whole_characters(text: str) -> str:
    """JSON whose lone surrogates, which no UTF-8 has, are written as escapes: a client or a model may have sent one."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class JSONAnswer(JSONResponse):
    """A body of JSON, whatever its texts hold."""

    def render(self, content: Any) -> bytes:
        return whole_characters(
            json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        ).encode()


@final
class _Stream(StreamingResponse):
    """A body that is sent as it comes. Pieces that are there at once leave at once: each way to the socket costs.

    Args:
        alive: sent when nothing else was for `options.keep_alive` seconds; b"": nothing is.
    """

    def __init__(
        self, pieces: AsyncIterator[bytes], media_type: str, options: ServeOptions, alive: bytes = b""
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers=UNBUFFERED)
        self._options, self._alive = options, alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        there, waiting = asyncio.Event(), list[bytes]()

        async def collect() -> None:
            async for piece in self.body_iterator:
                waiting.append(piece)  # type: ignore[arg-type]
                there.set()

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(leave())
        for task in tasks:
            task.add_done_callback(lambda _: there.set())
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            ended = False
            while not (ended or leaving.done()):
                try:
                    async with asyncio.timeout(self._options.keep_alive):
                        await there.wait()
                except TimeoutError:
                    waiting.append(self._alive)
                there.clear()
                ended, body = collecting.done(), b"".join(waiting)
                waiting.clear()
                async with asyncio.timeout(self._options.patience):
                    await send({"type": "http.response.body", "body": body, "more_body": not ended})
        except TimeoutError:
            logger.info("%s: the client takes nothing, and its stream is ended", scope["path"])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


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
    chunks: AsyncIterator[str | bytes],
    error: Callable[[BlockpressError], bytes] = lambda error: _event(json.dumps(openai_error(error))),
    alive: bytes = KEEPALIVE_COMMENT,
) -> Response:
    """A response that sends each chunk as an event (a text is its data); what fails becomes `error`'s event.

    alive: what keeps a silent stream alive.
    """
    return _Stream(_ending(chunks, _event, error), "text/event-stream", http.app.state.service.options, alive)


def _event(chunk: str | bytes) -> bytes:
    return chunk if isinstance(chunk, bytes) else format_sse_event(data_str=whole_characters(chunk))


def named(kind: str, body: Mapping[str, Any]) -> bytes:
    """An event with a name, as Anthropic's and OpenAI's newer APIs have them."""
    return format_sse_event(data_str=whole_characters(json.dumps(body, ensure_ascii=False)), event=kind)


def ndjson_stream(http: Request, chunks: AsyncIterator[Mapping[str, Any]]) -> Response:
    """A response that sends each chunk as a line of JSON, as Ollama does; what fails is a line with an `error`."""
    lines = _ending(chunks, _line, lambda failure: _line(ollama_error(failure)))
    return _Stream(lines, "application/x-ndjson", http.app.state.service.options)


def _line(body: Mapping[str, Any]) -> bytes:
    return (whole_characters(json.dumps(body, ensure_ascii=False)) + "\n").encode()


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
