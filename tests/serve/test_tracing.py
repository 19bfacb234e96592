"""Spans of requests, as a collector gets them by OTLP."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

import blockpress
from blockpress import sudoku
from blockpress.cli.main import main
from blockpress.errors import RequestError
from blockpress.serve import ServeOptions, tracing
from blockpress.serve.tracing import OPERATIONS, span_exporter
from tests.builders.chats import obedient_model, save_seeing
from tests.builders.server import Served, serving

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PUZZLE = sudoku.layout(sudoku.generate_puzzle(seed=5, givens=45).puzzle)
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "the launch code is 000000"


class Collector:
    """Keeps what exporters send. status: what it answers them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        bodies, paths = self.bodies, self.paths

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                paths.append(self.path)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self, served: Served) -> list[dict[str, Any]]:
        """All spans since the last call, with their attributes as a dictionary."""
        assert served.service.tracer_provider is not None
        time.sleep(0.05)  # the last byte goes out before its span ends
        served.service.tracer_provider.force_flush()
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                assert values(resource.resource.attributes)["service.name"] == "blockpress"
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    found.append({"span": span, **values(span.attributes)})
        self.bodies.clear()
        return found


def values(attributes: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {each.key: plain(each.value) for each in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = Thread(target=collector.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        collector.server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[Served]:
    options = ServeOptions(otlp_traces_endpoint=collector.url)
    with serving(blockpress.load("sudoku-nano"), "sudoku-nano", options) as served:
        yield served


@pytest.fixture(scope="module")
def told(collector: Collector) -> Iterator[Served]:
    """A model that says what it is told."""
    options = ServeOptions(otlp_traces_endpoint=collector.url)
    with serving(obedient_model(), "chatty", options, reference=True) as served:
        yield served


def post(served: Served, path: str, **body: Any) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=60, trust_env=False)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_request_is_one_span_below_the_caller_s_with_what_it_cost(traced: Served, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    body = {"messages": chat(PUZZLE), "seed": 0}
    answer = httpx.post(f"{traced.url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)
    usage = answer.json()["usage"]
    [found] = collector.spans(traced)
    span = found["span"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, CALLER)
    assert (span.name, span.kind) == ("chat sudoku-nano", span.SPAN_KIND_SERVER)
    assert span.status.code == span.status.STATUS_CODE_UNSET
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "sudoku-nano",
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": ["stop"],
        "blockpress.steps": usage["diffusion"]["steps"],
        "blockpress.forwards": usage["diffusion"]["forwards"],
        "blockpress.canvases": usage["diffusion"]["canvases"],
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
    }
    assert {name: found[name] for name in expected} == expected
    whole = found["gen_ai.latency.e2e"]
    assert 0 <= found["gen_ai.latency.time_in_queue"] <= found["gen_ai.latency.time_to_first_token"] <= whole
    assert whole <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": chat(PUZZLE), "n": 2, "stream": True}),
        ("/v1/completions", {"prompt": PUZZLE, "stream": True}),
        ("/v1/messages", {"model": "sudoku-nano", "messages": chat(PUZZLE), "max_tokens": 200}),
        ("/v1/messages", {"model": "sudoku-nano", "messages": chat(PUZZLE), "max_tokens": 200, "stream": True}),
        ("/v1/responses", {"input": PUZZLE}),
        ("/v1/responses", {"input": PUZZLE, "stream": True}),
        ("/api/chat", {"model": "sudoku-nano", "messages": chat(PUZZLE)}),
        ("/api/generate", {"model": "sudoku-nano", "prompt": PUZZLE, "stream": False}),
        ("/v1/canvas", {"prompt": PUZZLE}),
        ("/v1/fim/completions", {"prompt": "12", "suffix": "4", "max_tokens": 1}),
    ],
    ids=lambda given: given if isinstance(given, str) else "stream" if given.get("stream") else "",
)
def test_every_api_has_its_span(path: str, body: dict[str, Any], traced: Served, collector: Collector) -> None:
    answer = post(traced, path, **body)
    assert answer.status_code == 200, answer.text
    [found] = collector.spans(traced)
    assert found["gen_ai.operation.name"] == OPERATIONS[path] and found["url.path"] == path
    assert set(found["gen_ai.response.finish_reasons"]) <= {"stop", "length"}
    assert len(found["gen_ai.response.finish_reasons"]) == body.get("n", 1)
    assert found["blockpress.forwards"] > 0


def test_decisions_have_a_span(collector: Collector, tmp_path: Path) -> None:
    save_seeing(tmp_path)
    question = {"type": "predicate", "instructions": "is it?"}
    with serving(blockpress.load(tmp_path), "seeing", ServeOptions(otlp_traces_endpoint=collector.url)) as served:
        answer = post(served, "/v1/decisions", model="seeing", input="it is", questions=[question])
        [found] = collector.spans(served)
    assert found["span"].name == "generate_content seeing"
    assert found["gen_ai.usage.input_tokens"] == answer.json()["usage"]["input_tokens"] > 0


def test_neither_texts_nor_errors_that_quote_them_leave_the_server(told: Served, collector: Collector) -> None:
    answer = post(told, "/v1/chat/completions", messages=chat(SECRET))
    assert SECRET in answer.json()["choices"][0]["message"]["content"]
    wrong: list[dict[str, Any]] = [
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": chat(SECRET), "temperature": SECRET},
        {"messages": chat(SECRET), "model": SECRET},
        {"messages": chat(SECRET), "stop": [SECRET] * 99, "n": -1},
    ]
    for body in wrong:
        refused = post(told, "/v1/chat/completions", **body)
        assert refused.status_code in (400, 404)
    raw = b"".join(collector.bodies)
    found = collector.spans(told)
    raw += b"".join(each["span"].SerializeToString() for each in found)
    assert len(found) == 5 and {each["http.response.status_code"] for each in found} == {200, 400, 404}
    assert b"launch" not in raw


def test_what_the_model_does_not_answer_has_no_span(traced: Served, collector: Collector) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/props", "/"):
        assert httpx.get(traced.url + path, trust_env=False).status_code == 200
    assert post(traced, "/tokenize", prompt="12").status_code == 200
    assert collector.spans(traced) == []


def test_a_client_that_leaves_is_told_from_answers_that_ended(traced: Served, collector: Collector) -> None:
    body = {"messages": chat(PUZZLE), "stream": True, "mode": "autoregressive", "n": 8}
    with httpx.stream("POST", f"{traced.url}/v1/chat/completions", json=body, trust_env=False) as answer:
        next(answer.iter_lines())
    assert traced.idle()
    [found] = collector.spans(traced)
    assert found["gen_ai.response.finish_reasons"] == ["cancelled"] * 8


def test_a_collector_that_hangs_hurts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        options = ServeOptions(otlp_traces_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with serving(blockpress.load("sudoku-nano"), "sudoku-nano", options) as served:
            assert post(served, "/v1/completions", prompt=PUZZLE).status_code == 200
            began = time.monotonic()
        assert 0.3 < time.monotonic() - began < 5.3, "the server waits for it at its end"


def test_the_environment_says_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    assert span_exporter(None) is None
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with serving(blockpress.load("sudoku-nano"), "sudoku-nano") as served:
            assert post(served, "/v1/completions", prompt=PUZZLE).status_code == 200
            [found] = collector.spans(served)
        assert found["gen_ai.operation.name"] == "text_completion"
        assert collector.paths == ["/v1/traces"]
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
        assert span_exporter(None) is None and span_exporter(collector.url) is not None


@pytest.mark.parametrize(
    ("endpoint", "protocol", "named", "hint"),
    [
        ("localhost:4318", "", "'localhost:4318'", "http://localhost:4318/v1/traces"),
        ("ftp://host", "", "'ftp://host'", "http://"),
        ("http://", "", "'http://'", "http://"),
        ("http://[::1", "", "'http://[::1'", "http://"),
        ("http://host:port", "", "'http://host:port'", "http://"),
        ("", "", "''", "http://"),
        ("http://host:4318", "smoke", "'smoke'", "http/protobuf or grpc"),
        ("http://host:4317", "grpc", "grpc", "pip install opentelemetry-exporter-otlp-proto-grpc"),
    ],
)
def test_what_cannot_be_sent_to_is_refused(
    endpoint: str, protocol: str, named: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(RequestError) as refused:
        span_exporter(endpoint)
    assert named in refused.value.message and hint in refused.value.hint


def test_without_the_extra_the_option_is_refused_and_the_environment_is_noted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(RequestError) as refused:
        span_exporter("http://localhost:4318")
    assert refused.value.hint == "pip install 'blockpress[otel]'"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://localhost:4318/v1/traces")
    assert span_exporter(None) is None
    assert "no spans are sent to http://localhost:4318/v1/traces" in caplog.text and "blockpress[otel]" in caplog.text


def test_the_command_refuses_a_wrong_address_before_it_reads_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "no-such-model", "--otlp-traces-endpoint", "localhost:4318"]) == 2
    assert "--otlp-traces-endpoint is 'localhost:4318'" in capsys.readouterr().err
