"""Server-sent events: how a stream is written, kept alive, and ended when something goes wrong in the middle.

Invariant: a stream that has begun ends with its API's last event or with an error event; a client that leaves ends the
work behind it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Message, Send

from blockpress.errors import BlockpressError
from blockpress.serve.errors import ollama_error, openai_error

DONE = "[DONE]"
_SURROGATE = re.compile("[\ud800-\udfff]")
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

AppStatus.disable_automatic_graceful_drain()  # a server that stops lets streams go on for a while: `Service.drain`


def whole_characters(text: str) -> str:
    """JSON whose lone surrogates, which no UTF-8 has, are written as escapes: a client or a model may have sent one."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class JSONAnswer(JSONResponse):
    """A body of JSON, whatever its texts hold."""

    def render(self, content: Any) -> bytes:
        return whole_characters(
            json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        ).encode()


def event_stream(
    http: Request,
    chunks: AsyncIterator[str | ServerSentEvent],
    error: Callable[[BlockpressError], str | ServerSentEvent] = lambda error: json.dumps(openai_error(error)),
    ping: Callable[[], ServerSentEvent] = lambda: ServerSentEvent(comment="ping", sep="\n"),
) -> EventSourceResponse:
    """A response that sends each chunk as an event (a text is its data); what fails becomes `error`'s event.

    ping: what a silent stream is kept alive by.
    """
    options = http.app.state.service.options

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            async for chunk in chunks:
                yield ServerSentEvent(whole_characters(chunk), sep="\n") if isinstance(chunk, str) else chunk
        except BlockpressError as failure:
            last = error(failure)
            yield ServerSentEvent(last, sep="\n") if isinstance(last, str) else last
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    return EventSourceResponse(
        events(),
        ping=options.keep_alive,
        ping_message_factory=ping,
        send_timeout=options.patience,
        sep="\n",
        headers=dict(UNBUFFERED),
    )


def named(kind: str, body: Mapping[str, Any]) -> ServerSentEvent:
    """An event with a name, as Anthropic's and OpenAI's newer APIs have them."""
    return ServerSentEvent(whole_characters(json.dumps(body, ensure_ascii=False)), event=kind, sep="\n")


class _LineResponse(StreamingResponse):
    """A stream of lines, each of which the client must take within `patience` seconds."""

    patience = 30.0

    async def stream_response(self, send: Send) -> None:
        async def patient(message: Message) -> None:
            await asyncio.wait_for(send(message), self.patience)

        await super().stream_response(patient)


def ndjson_stream(http: Request, chunks: AsyncIterator[Mapping[str, Any]]) -> Response:
    """A response that sends each chunk as a line of JSON, as Ollama does; what fails is a line with an `error`."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield whole_characters(json.dumps(chunk, ensure_ascii=False)) + "\n"
        except BlockpressError as failure:
            yield json.dumps(ollama_error(failure), ensure_ascii=False) + "\n"
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    response = _LineResponse(lines(), media_type="application/x-ndjson", headers=dict(UNBUFFERED))
    response.patience = http.app.state.service.options.patience
    return response
