"""What goes wrong between a client and the server, and the status that each error has.

Invariant: every error of ours has one status; each API only writes it in its own form.
"""

from __future__ import annotations

from blockpress.errors import BlockpressError, EngineError, Overloaded, PromptTooLong, RequestError, TextError

RETRY_AFTER = 1
"""Seconds after which a refused client may ask again."""


class _FieldError(RequestError):
    """A field of a body that is wrong or cannot be honoured; `field` is its name."""

    def __init__(self, field: str, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        return _FieldError, (self.field, self.message, self.hint)


class _Refused(BlockpressError):
    """A call that is refused before its body is read; `status` says how."""

    def __init__(self, status: int, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.status = status


def _mistake() -> _Refused:
    """What a client is told when the server's own code failed."""
    return _Refused(500, "the server made a mistake of its own", "report it with the line of the server's log")


class _UnknownModel(RequestError):
    """A client asks for another model than the one that is served."""


class _ClientGone(Exception):  # not an error of anybody
    """The client left before its answer was whole."""


def status_of(error: BlockpressError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, _Refused):
        return error.status
    if isinstance(error, _UnknownModel):
        return 404
    if isinstance(error, Overloaded):
        return 429
    if isinstance(error, RequestError | TextError):
        return 400
    return 500


def kind_of(status: int) -> str:
    """The type of an error in OpenAI's words."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def code_of(error: BlockpressError) -> str | None:
    """OpenAI's code for an error, where it has one."""
    if isinstance(error, PromptTooLong):
        return "context_length_exceeded"
    if isinstance(error, _UnknownModel):
        return "model_not_found"
    if isinstance(error, Overloaded):
        return "queue_full"
    return "engine_error" if isinstance(error, EngineError) else None


def openai_error(error: BlockpressError, status: int | None = None) -> dict[str, object]:
    """An error as OpenAI's clients read it."""
    status = status_of(error) if status is None else status
    return {
        "error": {
            "message": str(error),
            "type": kind_of(status),
            "param": getattr(error, "field", None),
            "code": code_of(error),
        }
    }


ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(error: BlockpressError, status: int | None = None) -> dict[str, object]:
    """An error as Anthropic's clients read it."""
    status = status_of(error) if status is None else status
    kind = ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    # The words by which Claude Code knows that it must shorten the conversation.
    message = f"prompt is too long: {error}" if isinstance(error, PromptTooLong) else str(error)
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": None}


def ollama_error(error: BlockpressError) -> dict[str, object]:
    """An error as Ollama's clients read it."""
    return {"error": str(error)}


def error_body(path: str, error: BlockpressError, status: int | None = None) -> dict[str, object]:
    """An error in the form of the API that has the path."""
    if path.startswith("/v1/messages"):
        return anthropic_error(error, status)
    return ollama_error(error) if path.startswith("/api/") else openai_error(error, status)


def _object(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def error_schema(path: str) -> dict[str, object]:
    """The JSON schema of `error_body` for a path."""
    text, none = {"type": "string"}, {"type": "null"}
    maybe = {"anyOf": [text, none]}
    if path.startswith("/v1/messages"):
        return _object(type={"const": "error"}, error=_object(type=text, message=text), request_id=maybe)
    if path.startswith("/api/"):
        return _object(error=text)
    return _object(error=_object(message=text, type=text, param=maybe, code=maybe))
