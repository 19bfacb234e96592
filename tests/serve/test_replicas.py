"""Several servers behind one address, by processes or by Ray Serve: who gets which request, and what a loss looks like."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Thread
from types import SimpleNamespace
from typing import Any

import httpx
import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from blockpress.errors import RequestError
from blockpress.serve import ServeOptions, replicas
from blockpress.serve.ray import PrefixRouter, app, ray_options
from blockpress.serve.replicas import (
    KEY_LENGTH,
    SLACK,
    TOGETHER,
    Replica,
    create_front,
    joined_answer,
    joined_figures,
    rendezvous,
    routing_key,
)
from blockpress.serve.sse import cut_off
from tests.builders.server import Served, fronting

NAMES = st.sets(st.text("abcdef0123456789", min_size=1, max_size=8), min_size=1, max_size=8)


@given(NAMES, st.binary(max_size=40), st.data())
def test_a_lost_replica_moves_its_own_requests_only(names: set[str], key: bytes, data: st.DataObject) -> None:
    order = rendezvous(key, dict.fromkeys(names, 0))
    lost = data.draw(st.sampled_from(sorted(names)))
    assert rendezvous(key, dict.fromkeys(names - {lost}, 0)) == [name for name in order if name != lost]


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 20), min_size=1), st.binary(max_size=9))
def test_busier_replicas_come_last(load: dict[str, int], key: bytes) -> None:
    order = rendezvous(key, load)
    busy = [load[name] > min(load.values()) + SLACK for name in order]
    assert sorted(order) == sorted(load) and busy == sorted(busy)


def test_keys_spread_over_replicas() -> None:
    first = [rendezvous(f"conversation {number}".encode(), {"a": 0, "b": 0, "c": 0})[0] for number in range(300)]
    assert all(70 < first.count(name) < 130 for name in "abc")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "first"}]},
        {"system": "S", "messages": [{"role": "user", "content": "first"}]},
        {"prompt": "once upon a time"},
        {"prompt": [5, 6, 7]},
        {"input": [{"role": "user", "content": "first"}], "instructions": "S"},
        {"input_prefix": "def f(", "input_suffix": ")"},
        {"state": {"day": 1}, "questions": {}},
        {"prompt": "half a character: \ud800"},
    ],
)
def test_the_key_is_the_beginning_of_the_prompt_alone(body: dict[str, Any]) -> None:
    key = routing_key(json.dumps(body).encode())
    assert 0 < len(key) <= 4 * KEY_LENGTH
    more = {**body, "seed": 7, "model": "m"}
    if "messages" in more and len(more["messages"]) > 1:
        more["messages"] = [*more["messages"], {"role": "assistant", "content": "yes"}]
    assert routing_key(json.dumps(more).encode()) == key


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"[" * 200_000, b"\xff\xfe", b"null"])
def test_what_is_no_prompt_has_a_key_too(body: bytes) -> None:
    assert len(routing_key(body)) <= KEY_LENGTH


def test_figures_of_replicas_are_one_page_of_prometheus(nano: Served) -> None:
    text = httpx.get(f"{nano.url}/metrics").text
    joined = joined_figures({"a": text, "b": text})
    families = list(text_string_to_metric_families(joined))
    assert len({family.name for family in families}) == len(families) > 10
    alone = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for name in "ab":
        labelled = [sample for family in families for sample in family.samples if sample.labels["replica"] == name]
        assert [(each.name, each.value) for each in labelled] == [(each.name, each.value) for each in alone]


@pytest.mark.parametrize("path", TOGETHER)
def test_what_replicas_say_together_has_the_form_of_one_server(nano: Served, path: str) -> None:
    alone = httpx.get(f"{nano.url}{path}")
    joined = joined_answer(path, {"a": alone.content, "b": alone.content})
    assert (joined.status_code, joined.headers["content-type"]) == (200, alone.headers["content-type"])
    if path == "/metrics":
        return
    one, two = alone.json(), json.loads(bytes(joined.body))
    if path == "/slots":
        assert [slot["replica"] for slot in two] == ["a"] * len(one) + ["b"] * len(one)
        assert [slot["id"] for slot in two] == [*range(2 * len(one))]
        assert [slot["n_ctx"] for slot in two] == [slot["n_ctx"] for slot in one * 2]
    else:
        ([mine], [ours]) = ([one], [two]) if path != "/api/ps" else (one["models"], two["models"])
        sums = {"server_load", "total_slots", "kv_cache_bytes", "size", "size_vram"}
        assert ours == {name: 2 * value if name in sums else value for name, value in mine.items()}
        assert sums & ours.keys()
    assert joined_answer(path, {}).status_code == 503


@pytest.mark.slow
def test_two_replicas_tell_what_both_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are held open until both replicas have one; then every path that tells of a server counts both."""
    monkeypatch.setenv("BLOCKPRESS_API_KEY", "right")
    with (
        fronting("sudoku-nano", "--max-running", "3") as front,
        httpx.Client(base_url=front, headers={"x-api-key": "right"}, timeout=60) as client,
    ):
        assert httpx.get(f"{front}/slots").status_code == 401
        tells_what_both_do(client)


def tells_what_both_do(client: httpx.Client) -> None:
    idle, small = client.get("/slots").json(), client.get("/api/ps").json()["models"]
    assert [(slot["id"], slot["is_processing"]) for slot in idle] == [(number, False) for number in range(6)]
    assert {slot["replica"] for slot in idle} == {"0", "1"} and client.get("/load").json() == {"server_load": 0}
    assert client.get("/props").json()["total_slots"] == 6
    assert [model["name"] for model in small] == ["sudoku-nano:latest"]
    endless = {"steps": 1_000_000, "confidence": 0, "entropy_bound": 1e-9, "frames": True}
    with ExitStack() as streams:
        homes, held = list[str](), list[Iterator[str]]()  # a stream is closed with its iterator
        for family in range(32):
            puzzle = {"role": "user", "content": f"{family:081d}"}
            body = {"model": "", "messages": [puzzle], "stream": True, "diffusion": endless}
            answer = streams.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
            homes.append(answer.headers["x-blockpress-replica"])
            held.append(answer.iter_lines())
            assert any('"canvas"' in line for line in held[-1])  # its first frame: it runs
            if len(set(homes)) == 2:
                break
        assert len(homes) <= 6, "they all run, and none waits"
        busy = [slot["replica"] for slot in client.get("/slots").json() if slot["is_processing"]]
        assert sorted(busy) == sorted(homes) and {*busy} == {"0", "1"}
        assert client.get("/load").json() == {"server_load": len(homes)}
        figures = text_string_to_metric_families(client.get("/metrics").text)
        running = {
            sample.labels["replica"]: sample.value
            for family in figures
            for sample in family.samples
            if sample.name == "vllm:num_requests_running"
        }
        assert running == {name: homes.count(name) for name in "01"}
    until = time.monotonic() + 10
    while client.get("/load").json()["server_load"]:
        assert time.monotonic() < until, "streams that were left still run"


def answering(library: Any, answer: bytes) -> Any:
    """A client of a server that answers every request with this stream."""
    headers = {"content-type": "text/event-stream"}
    transport = library.MockTransport(lambda request: library.Response(200, content=answer, headers=headers))
    return library.Client(transport=transport)


def read_openai(end: bytes) -> None:
    client = openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=answering(httpx, end), max_retries=0)
    list(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True))


def read_responses(end: bytes) -> None:
    client = openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=answering(httpx, end), max_retries=0)
    list(client.responses.create(model="m", input="x", stream=True))


def read_anthropic(end: bytes) -> None:
    import anthropic  # not at the top: it takes more than a second, and every process of pytest collects all files

    client = anthropic.Anthropic(api_key="k", base_url="http://x", http_client=answering(httpx2, end), max_retries=0)
    list(client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "x"}], stream=True))


@pytest.mark.parametrize(
    ("path", "read", "library"),
    [
        ("/v1/chat/completions", read_openai, "openai"),
        ("/v1/responses", read_responses, "openai"),
        pytest.param("/v1/messages", read_anthropic, "anthropic", marks=pytest.mark.slow),  # loads that library
    ],
)
def test_clients_read_that_the_replica_was_lost(path: str, read: Callable[[bytes], None], library: str) -> None:
    with pytest.raises(importlib.import_module(library).APIError, match="was lost"):
        read(cut_off(path, "text/event-stream; charset=utf-8", 3))


def test_each_api_has_its_last_event() -> None:
    assert cut_off("/v1/canvas", "text/event-stream", 3).startswith(b'event: canvas.error\ndata: {"error": {"message"')
    assert json.loads(cut_off("/api/chat", "application/x-ndjson", 3))["error"].startswith("the replica")
    assert b'"sequence_number": 3' in cut_off("/v1/responses", "text/event-stream", 3)
    assert cut_off("/v1/chat/completions", "application/json", 3) == b""


@pytest.fixture
def dying() -> Iterator[int]:
    """The port of a server that begins a stream and is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve_one() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                connection.sendall(head + b"a\r\ndata: {}\n\n\r\n")

        thread = Thread(target=serve_one, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def test_a_stream_whose_process_dies_ends_with_an_error(dying: int) -> None:
    front = create_front(["false"], 2, ServeOptions())
    lost, living = front.state.front.replicas
    lost.port, lost.ready = dying, True
    client = TestClient(front, base_url="http://localhost")  # without its lifespan, which starts processes
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    answer = client.post("/v1/messages", json=body)
    assert answer.text.startswith("data: {}\n\nevent: error\n") and answer.headers["x-blockpress-replica"] == "0"
    assert (lost.open, living.open) == (0, 0)


BREAKING = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
states = ["warming up", "ok", "ok"]
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        state = states.pop(0) if states else "broken"
        self.send_response(200 if state == "ok" else 503)
        self.end_headers()
        self.wfile.write(json.dumps({"status": state}).encode())
    def log_message(self, *about): pass
HTTPServer(("127.0.0.1", int(sys.argv[2])), Health).serve_forever()
"""


def test_a_replica_whose_engine_has_broken_is_ended_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas, "CHECK_EVERY", 0.01)
    replica = Replica(0, [sys.executable, "-c", BREAKING])

    async def first_and_second() -> tuple[int, int]:
        running = asyncio.create_task(replica.keep_running())
        while not replica.ready:
            await asyncio.sleep(0.01)
        first = replica.port
        while replica.ready or replica.port == first:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return first, replica.port

    first, second = asyncio.run(asyncio.wait_for(first_and_second(), 30))
    assert first != second
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "the engine of replica 0 has broken"
    ]
    assert replica.process is not None and replica.process.returncode is not None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"modle": "x"}, "modle is 'x'"),
        ({"min_replicas": "many"}, "min_replicas is 'many'"),
        ({"min_replicas": -1}, "min_replicas is -1"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2"),
        ({"max_running": 0}, "max_running is 0"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests is 0"),
        ({"lenient": "perhaps"}, "lenient is 'perhaps'"),
        ({"num_cpus": "nan"}, "num_cpus is 'nan'"),
        ({"target_ongoing_requests": "inf"}, "target_ongoing_requests is 'inf'"),
    ],
)
def test_arguments_of_ray_s_application_are_checked(given: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as refused:
        ray_options(given)
    assert refused.value.message.startswith(named)


def test_arguments_come_as_texts_from_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"min_replicas": "2", "max_body": "1", "allow_host": "a.example,b.example", "lenient": "true"}
    monkeypatch.setenv("BLOCKPRESS_API_KEY", "one,two")
    options = ray_options(given)
    monkeypatch.delenv("BLOCKPRESS_API_KEY")  # a replica elsewhere has another environment
    rules = options.rules()
    assert (options.min_replicas, options.max_replicas) == (2, 2)
    assert (rules.max_body, rules.hosts, rules.lenient) == (1 << 20, ("a.example", "b.example"), True)
    assert rules.api_keys == ("one", "two") and ray_options({"api_key": "k"}).rules().api_keys == ("k",)


def test_ray_s_router_ranks_by_the_key_and_by_what_is_open() -> None:
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"]
    pending = SimpleNamespace(metadata=SimpleNamespace(session_id="key"), routing_context=SimpleNamespace())

    def ranked(**load: int) -> list[str]:
        router = SimpleNamespace(replica_queue_len_cache=SimpleNamespace(get=lambda each: load.get(each.unique_id)))
        ranks = asyncio.run(PrefixRouter.choose_replicas(router, replicas, pending))  # type: ignore[arg-type]
        return [each.replica_id.unique_id for [each] in ranks]

    first, second, third = ranked()
    assert [first, second, third] == rendezvous(b"key", dict.fromkeys("abc", 0))
    assert ranked(**{first: SLACK}) == [first, second, third]
    assert ranked(**{first: SLACK + 1}) == [second, third, first]
    assert pending.routing_context.should_backoff


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_its_application_says_how_to_install_it() -> None:
    with pytest.raises(RequestError, match=r"pip install 'blockpress\[ray\]'"):
        app({})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_ray_keeps_prompt_families_apart_and_a_killed_replica_costs_its_streams_alone() -> None:
    command = [sys.executable, "-m", "tests.serve.ray", "--clients", "8", "--seconds", "20"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
