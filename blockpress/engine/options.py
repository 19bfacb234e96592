"""The limits of an engine: how many requests, how much memory, how large a forward.

Invariant: an `EngineOptions` that exists is valid; no option changes a token of an answer, except
`soft_embedding="sparse"`.
Run it:  python -m pytest tests/engine/test_sizing.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from blockpress.config.checks import is_count, value_text
from blockpress.costs import CHUNK
from blockpress.errors import RequestError

SoftEmbedding = Literal["exact", "sparse"]
MOST_RUNNING = 2**16
"""Of the requests in one forward; a GPU is busy with a few hundred."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Limits of an engine.

    max_running: most requests in one forward. max_waiting: most requests in the queue; further ones are refused as
    `Overloaded`. memory: bytes for pages; None: half of what is free on the device, at most what `max_running` full
    contexts need. chunk: most tokens of one request's prefill in one forward, unless an image is longer.
    prefill_tokens: most prefill tokens of all requests in one forward; canvases and commits always run.
    reuse_prefixes: whether a request reuses pages that already hold the beginning of its context.
    soft_embedding: the self-conditioning embedding, "exact" as the reference rounds it, or "sparse" without the least
    likely tokens.
    """

    max_running: int = 32
    max_waiting: int = 1024
    memory: int | None = None
    chunk: int = CHUNK
    prefill_tokens: int = 2048
    reuse_prefixes: bool = True
    soft_embedding: SoftEmbedding = "exact"

    def __post_init__(self) -> None:
        self._need(
            is_count(self.max_running, 1, MOST_RUNNING), "max_running", f"a whole number from 1 to {MOST_RUNNING}"
        )
        for name in ("max_waiting", "chunk", "prefill_tokens"):
            self._need(is_count(getattr(self, name)), name, "a whole number of at least 1")
        self._need(self.memory is None or is_count(self.memory), "memory", "a number of bytes above 0, or None")
        for name in ("max_running", "max_waiting", "chunk", "prefill_tokens", "memory"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        self._need(isinstance(self.reuse_prefixes, bool), "reuse_prefixes", "True or False")
        self._need(self.soft_embedding in get_args(SoftEmbedding), "soft_embedding", "'exact' or 'sparse'")

    def _need(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            raise RequestError(
                f"engine option {name} is {value_text(getattr(self, name))}", hint=f"{name} must be {what}"
            )
