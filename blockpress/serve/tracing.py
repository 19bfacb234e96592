"""Spans of requests in OpenTelemetry's form, sent by OTLP (extra `otel`).

FastAPI begins a span for each request, whose parent is the caller's `traceparent`, and ends it with the last byte of
the answer; here it is given its exporter, and what an answer cost by the conventions for generative AI.

Invariant: no span holds a text of a client or of the model, nor the message of an error, which may quote one; an
exporter that fails or hangs is heard of in the log alone.
Source: https://github.com/open-telemetry/semantic-conventions-genai; the names of latencies are vLLM's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from blockpress import __version__
from blockpress.decoding import Reply
from blockpress.engine import Request
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
try:
    from opentelemetry import trace
except ImportError:  # an older FastAPI, which makes no spans
    trace = None  # type: ignore[assignment]

logger = logging.getLogger("blockpress.serve")

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/v1/fim/completions": "text_completion",
    "/infill": "text_completion",
    "/v1/edits": "text_completion",
    "/api/generate": "text_completion",
    "/v1/canvas": "generate_content",
    "/v1/decisions": "generate_content",
    "/v1/systemone": "generate_content",
}
"""The routes that answer by the model, and what the conventions call that."""
INSTALL = "pip install 'blockpress[otel]'"
PATIENCE = 2.0
"""Seconds that the last spans have when the server stops."""


def telemetry(provider: TracerProvider | None) -> TelemetryConfig:
    """FastAPI's settings: a span for each request that the model answers, and nothing else.

    Args:
        provider: what `tracer_provider` made; without one, what the program around has set by now.
    """
    around = trace is not None and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    return {
        "tracing": provider is not None or around,  # otherwise each request asks again
        "tracer_provider": provider,
        "metrics": False,
        "logs": False,  # it writes the values that a check has refused
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope.get("path") not in OPERATIONS or scope.get("method") != "POST",
    }


def tracer_provider(endpoint: str | None) -> TracerProvider | None:
    """What sends spans by `span_exporter`; None without one. Errors as there."""
    exporter = span_exporter(endpoint)
    if exporter is None:
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "blockpress"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # `stop` does it, and waits for nobody long
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def span_exporter(endpoint: str | None) -> SpanExporter | None:
    """What sends spans to `endpoint`; without one, to where the variables of the environment say.

    They are OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT; the other OTEL_ variables (headers,
    protocol, time limit and more) hold in both cases. None if there is no endpoint, or OTEL_TRACES_EXPORTER says none.

    Raises:
        RequestError: `endpoint` is no address, the protocol is not known, or a package is missing.
    """
    found = _first_set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if endpoint is None and (not found or os.environ.get("OTEL_TRACES_EXPORTER") not in (None, "", "otlp")):
        return None
    protocol = _first_set("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol not in ("http/protobuf", "grpc"):
        raise RequestError(f"the protocol of OTLP is {protocol!r:.80}", hint="it must be http/protobuf or grpc")
    try:
        import opentelemetry.sdk.trace  # noqa: F401

        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GRPCExporter

            return GRPCExporter(endpoint=endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=None if endpoint is None else _traces_url(endpoint))
    except ImportError as error:
        install = "pip install opentelemetry-exporter-otlp-proto-grpc" if protocol == "grpc" else INSTALL
        missing = f"the package {error.name}, which is not installed"
        if endpoint is None:  # the variable may be meant for other programs
            logger.warning("no spans are sent to %s: that needs %s: %s", found, missing, install)
            return None
        raise RequestError(f"--otlp-traces-endpoint needs {missing}", hint=install) from None


def _first_set(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _traces_url(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets that do not close, a port of letters
        right = False
    if not right:
        hint = "give an address, such as http://localhost:4318/v1/traces"
        raise RequestError(f"--otlp-traces-endpoint is {endpoint!r:.200}", hint=hint)
    return parts._replace(path="/v1/traces").geturl() if parts.path in ("", "/") else endpoint


def stop(provider: TracerProvider) -> None:
    """Send the last spans; what does not answer within `PATIENCE` gets none."""
    last = threading.Thread(target=provider.shutdown, name="blockpress-spans", daemon=True)
    last.start()
    last.join(PATIENCE)


def current_span() -> Span | None:
    """The span of the request that is answered here, if there is one that is kept."""
    span = None if trace is None else trace.get_current_span()
    return span if span is not None and span.is_recording() else None


def record_cost(span: Span | None, model: str, attributes: Mapping[str, Any], error: str | None = None) -> None:
    """Write what an answer of `model` cost into its span; an attribute that is None is left out. error: its kind."""
    if span is None or not span.is_recording():
        return
    path = (getattr(span, "attributes", None) or {}).get("url.path")
    operation = OPERATIONS.get(str(path), "generate_content")
    span.update_name(f"{operation} {model}")
    names = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "blockpress"}
    names |= {"gen_ai.request.model": model, "gen_ai.response.model": model}
    if error is not None:
        span.set_status(trace.StatusCode.ERROR)
        names["error.type"] = error.lstrip("_")
    span.set_attributes({**names, **{name: value for name, value in attributes.items() if value is not None}})


class AnswerSpan:
    """What the answers of one request cost, for the span in which they began; `end` writes it.

    Args:
        count: how many there are. requests: of each, where there is one.
    """

    def __init__(self, model: str, count: int, requests: Sequence[Request]) -> None:
        self._model, self._count, self._requests = model, count, requests
        self._span, self._began = current_span(), time.monotonic()
        self.replies: list[Reply] = []
        self.first_text: float | None = None
        self.error: Exception | None = None

    def end(self) -> None:
        """Write it, once; answers that have not ended were cancelled, or failed with `error`."""
        span, self._span = self._span, None
        if span is None:
            return
        usages = [reply.usage for reply in self.replies]
        ran = [each.first_run for each in self._requests if each.first_run is not None]
        ends = [str(reply.finish_reason) for reply in self.replies]
        ends += ["error" if self.error else "cancelled"] * (self._count - len(ends))
        cached = [each.num_cached_tokens for each in self._requests]
        attributes = {
            "gen_ai.usage.input_tokens": max((usage.prompt_tokens for usage in usages), default=None),
            "gen_ai.usage.cache_read.input_tokens": min(cached, default=None),
            "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
            "gen_ai.usage.reasoning.output_tokens": sum(usage.reasoning_tokens for usage in usages),
            "gen_ai.response.finish_reasons": ends,
            "gen_ai.response.time_to_first_chunk": self.first_text,
            "gen_ai.latency.time_to_first_token": self.first_text,
            "gen_ai.latency.time_in_queue": min(ran) - self._began if ran else None,
            "gen_ai.latency.e2e": time.monotonic() - self._began,
            "blockpress.steps": sum(usage.steps for usage in usages),
            "blockpress.forwards": sum(usage.forwards for usage in usages),
            "blockpress.canvases": sum(usage.canvases for usage in usages),
        }
        record_cost(span, self._model, attributes, None if self.error is None else type(self.error).__name__)
