"""Server-sent events: how a stream is written, kept alive, and ended when something goes wrong in the middle.

Invariant: a stream that has begun ends with its API's last event or with an error event; a client that leaves ends the
work behind it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from blockpress.errors import BlockpressError
from blockpress.serve.errors import openai_error

DONE = "[DONE]"

AppStatus.disable_automatic_graceful_drain()  # a server that stops lets streams go on for a while: `Service.drain`


def event_stream(
    http: Request,
    chunks: AsyncIterator[str | ServerSentEvent],
    error: Callable[[BlockpressError], str | ServerSentEvent] = lambda error: json.dumps(openai_error(error)),
) -> EventSourceResponse:
    """A response that sends each chunk as an event (a text is its data); what fails becomes `error`'s event."""
    options = http.app.state.service.options

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            async for chunk in chunks:
                yield ServerSentEvent(chunk) if isinstance(chunk, str) else chunk
        except BlockpressError as failure:
            last = error(failure)
            yield ServerSentEvent(last) if isinstance(last, str) else last
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    return EventSourceResponse(
        events(),
        ping=options.keep_alive,
        ping_message_factory=lambda: ServerSentEvent(comment="ping"),
        send_timeout=options.patience,
        sep="\n",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def named(kind: str, body: Mapping[str, Any]) -> ServerSentEvent:
    """An event with a name, as Anthropic's and OpenAI's newer APIs have them."""
    return ServerSentEvent(json.dumps(body, ensure_ascii=False), event=kind)
