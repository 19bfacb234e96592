"""The limits and rules of a server.

Invariant: a `ServeOptions` that exists is valid; its defaults serve this machine alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockpress.config.checks import is_count, is_number, value_text
from blockpress.errors import RequestError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server treats its clients.

    api_keys: one of them must come with every call; none: no key is asked for. origins: pages of these origins may call
    (CORS); none: only pages of this server. hosts: names in a Host header beside loopback names and addresses.
    max_body: bytes of a request. max_images: images of a request. max_choices: most `n`. max_streams: requests answered
    or waiting at once; further ones get status 429. keep_alive: seconds after which a silent stream gets a comment.
    patience: seconds that a body may take to arrive, that a client may take to read an event, and that answers are
    given to end when the server stops. lenient: fields that cannot be honoured are listed in `warnings`, not refused.
    allow_pull: clients may fetch models from the hub into the cache of this machine.
    fetch_images: image addresses (http, https) are fetched, but never from private ranges. log_prompts: prompts and
    answers go into the log, too. otlp_traces_endpoint: where spans of requests are sent; None: where the OTEL_
    variables of the environment say, if they do.
    """

    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 32 * MIB
    max_images: int = 16
    max_choices: int = 128
    max_streams: int = 1024
    keep_alive: float = 15.0
    patience: float = 30.0
    lenient: bool = False
    allow_pull: bool = False
    fetch_images: bool = False
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_body", "max_choices", "max_streams"):
            self._need(is_count(getattr(self, name), 1), name, "a whole number of at least 1")
        self._need(is_count(self.max_images, 0), "max_images", "a whole number of at least 0")
        for name in ("keep_alive", "patience"):
            value = getattr(self, name)
            self._need(is_number(value) and value > 0, name, "a number of seconds above 0")
        self._need(all(key.strip() for key in self.api_keys), "api_keys", "keys that are not empty")

    def _need(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            raise RequestError(f"serve option {name} is {value_text(getattr(self, name))}", hint=f"it must be {what}")
