"""Clients that are slow, endless, half gone, too many or malicious: each loses its connection, and others are served."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import blockpress
from blockpress.serve import ServeOptions, connection
from blockpress.serve.fields import LARGE
from tests.builders.chats import save_seeing
from tests.builders.server import Served, serving

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LONG = {"steps": 1_000_000, "confidence": 0, "entropy_bound": 1e-9}
CLIENT = httpx.Client(verify=False, trust_env=False, timeout=30)
"""One for all: each would read the system's certificates."""
ASK = {"messages": [{"role": "user", "content": "1"}], "diffusion": {"steps": 1}}


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    with CLIENT:
        yield


@pytest.fixture(scope="module")
def hasty() -> Iterator[Served]:
    options = ServeOptions(patience=0.4, max_body=2000, keep_alive=0.1)
    with serving(blockpress.load("sudoku-nano"), "sudoku-nano", options) as served:
        yield served


def connect(served: Served) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
    made.settimeout(10)
    return made


def trickle(served: Served, first: bytes, piece: bytes) -> tuple[bytes, float]:
    """Send `first`, then `piece` again and again: what comes back until the server ends it, and after how long."""
    began, came = time.monotonic(), b""
    with connect(served) as slow:
        slow.sendall(first)
        slow.setblocking(False)
        while time.monotonic() < began + 10:
            try:
                slow.send(piece)
                got = slow.recv(10_000)
                came += got
                if not got:
                    break
            except BlockingIOError:
                pass
            except OSError:
                break
            time.sleep(0.02)
    return came, time.monotonic() - began


def soon(true: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it becomes true within that time."""
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.002)
    return true()


def still_answers(served: Served) -> None:
    answer = CLIENT.post(f"{served.url}/v1/chat/completions", json=ASK)
    assert answer.status_code == 200, answer.text
    assert served.idle()


@pytest.mark.parametrize(
    ("first", "piece", "status"),
    [
        (b"", b"", b""),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\n", b"x", b" 408 "),
        (HEAD + b"content-length: 1000\r\n\r\n", b" ", b" 408 "),
        pytest.param(HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n", b" 408 ", marks=pytest.mark.slow),
        pytest.param(HEAD + b"content-length: 5000\r\n\r\n", b" ", b" 413 ", marks=pytest.mark.slow),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"7d0\r\n" + b" " * 2000 + b"\r\n", b"1\r\n \r\n", b" 413 "),
        (HEAD + b"host: evil.example\r\ncontent-length: 1000\r\n\r\n", b" ", b" 40"),
    ],
    ids=["nothing", "headers", "body", "chunks", "declared too large", "too large in the end", "refused"],
)
def test_what_never_ends_is_ended(hasty: Served, first: bytes, piece: bytes, status: bytes) -> None:
    came, seconds = trickle(hasty, first, piece)
    assert status in came.partition(b"\r\n")[0], came
    assert seconds < 5
    still_answers(hasty)


def test_a_second_request_on_a_connection_must_also_be_whole(hasty: Served) -> None:
    came, seconds = trickle(hasty, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea", b"l")
    assert came.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in came
    assert seconds < 5


def test_a_stream_that_nobody_reads_ends_with_its_request(hasty: Served) -> None:
    body = json.dumps({"prompt": "1", "diffusion": LONG}).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", int(hasty.url.rpartition(":")[2])))
        head = b"POST /v1/canvas HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        deaf.sendall(head % len(body) + body)
        assert soon(lambda: hasty.service.open_requests == 1)
        assert hasty.idle(60), "the frames of a canvas fill the socket, and then its patience ends"
    still_answers(hasty)


def test_who_leaves_inside_a_long_prefill_frees_its_pages_at_once(tmp_path: Path) -> None:
    save_seeing(tmp_path, context_length=16384)
    with serving(blockpress.load(tmp_path), "seeing", chunk=4) as served:
        body = {"messages": [{"role": "user", "content": "a" * 3000}], "stream": True}
        core = served.engine.core
        with CLIENT.stream("POST", f"{served.url}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept: a reader that is dropped closes its connection
            assert next(lines)
            began = core.stats.forwards
            assert soon(lambda: core.stats.forwards >= began + 3)
            assert any(pages.held for pages in core.stats.scheduler.pages.values())
        assert soon(lambda: not core.busy)
        assert not any(pages.held for pages in core.stats.scheduler.pages.values())
        assert core.stats.forwards < began + 300, "of the 750 that the prompt would have taken"


def test_who_leaves_with_a_second_request_in_line_frees_the_first(nano: Served) -> None:
    body = json.dumps({"prompt": "1", "diffusion": {**LONG, "frames": False}}).encode()
    with connect(nano) as client:
        head = HEAD.replace(b"/v1/chat/completions", b"/v1/canvas") + b"content-length: %d\r\n\r\n" % len(body)
        client.sendall(2 * (head + body))
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert nano.service.open_requests == 1
    assert nano.idle()
    assert soon(lambda: not nano.engine.core.busy)


def test_a_large_body_is_read_as_a_small_one(nano: Served) -> None:
    body = b" " * LARGE + json.dumps(ASK).encode()
    for given, status in ((body, 200), (body[:-1], 400)):
        answer = CLIENT.post(
            f"{nano.url}/v1/chat/completions", content=given, headers={"content-type": "application/json"}
        )
        assert answer.status_code == status, answer.text


def test_a_stream_that_is_read_slowly_is_whole(hasty: Served) -> None:
    body = json.dumps({**ASK, "stream": True}).encode()
    came = b""
    with connect(hasty) as slow:
        slow.sendall(HEAD + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        while piece := slow.recv(40):
            came += piece
            time.sleep(0.01)
    assert b"data: [DONE]" in came


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: a\r\n" * 400_000 + b"\r\n",
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n12",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: a\r\n" * 400_000,
        HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\nx: " + b"a" * 2_000_000,
        b"\r\n" * 1_000_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
    ],
    ids=["header", "headers", "path", "length", "lengths", "chunk", "trailers", "trailer", "empty lines", "tls"],
)
def test_what_is_no_request_is_refused(hasty: Served, head: bytes) -> None:
    with connect(hasty) as wrong:
        came = b""
        with suppress(ConnectionError):  # what is too long is not read to its end, and then the answer may be lost
            wrong.sendall(head)
            while piece := wrong.recv(10_000):
                came += piece
    assert came[9:12] == b"400" or (len(head) > 10**6 and not came), came
    still_answers(hasty)


def test_connections_that_are_too_many_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_open_files", lambda: connection.RESERVE + 3)
    with ExitStack() as stack:
        served = stack.enter_context(serving(blockpress.load("sudoku-nano"), "sudoku-nano"))
        held = [stack.enter_context(connect(served)) for _ in range(3)]
        for _ in range(5):
            answer = httpx.Client(verify=False).get(f"{served.url}/health")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["type"] == "server_error"
        for each in held:
            each.close()
        assert soon(lambda: CLIENT.get(f"{served.url}/health").status_code == 200)
        still_answers(served)


def nested(open_: str, close: str, depth: int) -> str:
    return open_ * depth + close * depth


VALUES: dict[str, Callable[[], str]] = {
    "deep lists": lambda: nested("[", "]", 100_000),
    "deep objects": lambda: '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nearly too deep": lambda: nested("[", "]", 900),
    "a huge integer": lambda: "1" * 100_000,
    "a huge exponent": lambda: "1e400",
    "NaN": lambda: "NaN",
    "Infinity": lambda: "-Infinity",
    "a lone surrogate": lambda: r'"\ud800"',
    "a null character": lambda: r'"\u0000"',
}
FIELDS = {
    "/v1/chat/completions": (
        "messages",
        "temperature",
        "seed",
        "tools",
        "metadata",
        "stop",
        "logit_bias",
        "max_tokens",
    ),
    "/v1/completions": ("prompt", "suffix", "n"),
    "/v1/messages": ("system", "tools", "messages"),
    "/v1/responses": ("input", "metadata", "tools", "instructions"),
    "/api/chat": ("options", "messages", "format", "keep_alive"),
    "/api/generate": ("prompt", "format"),
    "/v1/decisions": ("input", "questions"),
    "/v1/systemone": ("state", "questions"),
    "/v1/canvas": ("schema", "pins"),
    "/v1/edits": ("input", "span"),
    "/infill": ("input_extra", "input_prefix"),
    "/tokenize": ("prompt", "messages"),
}


def hostile(path: str, field: str, value: str) -> bytes:
    """A body that is valid but for one field."""
    whole = {
        "model": "sudoku-nano",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "1"}],
        "prompt": "1",
        "input": "1",
        "state": "1",
        "input_prefix": "1",
        "questions": [],
        "diffusion": {"steps": 1},
        "stream": False,
    }
    if path == "/v1/canvas":
        whole = {"prompt": "1", "diffusion": {"steps": 1}}
    whole.pop(field, None)
    return (json.dumps(whole)[:-1] + f', "{field}": {value}}}').encode()


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("kind", VALUES)
def test_no_json_breaks_the_server(nano: Served, kind: str, path: str) -> None:
    headers = {"content-type": "application/json"}
    for field in FIELDS[path]:
        body = hostile(path, field, VALUES[kind]())
        answer = CLIENT.post(f"{nano.url}{path}", content=body, headers=headers)
        assert answer.status_code < 500, (field, answer.text[:300])
        answer.read()


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe\x00", b'{"messages": "\xff"}', b"[]", b"1", b'"a"', b"null", b"{", b'{"a":1}' * 2, b'{"messages":[],"messages":[{"role":"user","content":"1"}],"max_tokens":1,"diffusion":{"steps":1}}'],
    ids=["nothing", "no UTF-8", "no UTF-8 in a text", "a list", "a number", "a text", "null", "half", "two", "a key twice"],
)  # fmt: skip
@pytest.mark.parametrize("path", FIELDS)
def test_a_body_that_is_no_object_is_refused_with_a_reason(nano: Served, path: str, body: bytes) -> None:
    answer = CLIENT.post(f"{nano.url}{path}", content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1_000_000),
        ("n", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("temperature", 1e308),
        ("temperature", -1),
        ("seed", 2**64),
        ("top_logprobs", 10**6),
        ("diffusion", {"steps": 10**12}),
    ],
)
def test_a_number_out_of_range_is_named(nano: Served, field: str, value: Any) -> None:
    answer = CLIENT.post(f"{nano.url}/v1/chat/completions", json={**ASK, "logprobs": True, field: value})
    assert answer.status_code == 400, answer.text
    assert field in answer.json()["error"]["message"]


STREAMS = """
import collections, socket, sys
port, count, at_once = map(int, sys.argv[1:])
body = b'{"messages":[{"role":"user","content":"1"}],"stream":true,"diffusion":{"steps":1000000,"confidence":0,"entropy_bound":1e-9}}'
asked = b"POST /v1/chat/completions HTTP/1.1\\r\\nhost: localhost\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body) + body
held, found = [], collections.Counter()
while len(held) < count:
    new = [socket.create_connection(("127.0.0.1", port)) for _ in range(at_once)]
    held += new
    for each in new:
        each.sendall(asked)
    for each in new:
        head = b""
        while b"\\r\\n\\r\\n" not in head:
            more = each.recv(4096)
            assert more, head
            head += more
        status = head[9:12].decode()
        assert status == "200" or b"retry-after" in head.lower(), head
        found[status] += 1
print(*(f"{status} {times}" for status, times in sorted(found.items())))
"""


@pytest.mark.slow
def test_two_thousand_streams_are_refused_politely(monkeypatch: pytest.MonkeyPatch) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 3_000:
        pytest.skip("the system allows fewer open files")
    options = ServeOptions(max_streams=4)
    with serving(blockpress.load("sudoku-nano"), "sudoku-nano", options) as served:
        core, step = served.engine.core, served.engine.core.step
        monkeypatch.setattr(core, "step", lambda: time.sleep(0.3) or step())  # the time is for those that are refused
        many = [sys.executable, "-I", "-S", "-c", STREAMS, served.url.rpartition(":")[2], "2000", "200"]
        said = subprocess.run(many, capture_output=True, text=True, timeout=500, check=True).stdout
        assert said == "200 4 429 1996\n"
        assert served.idle(30)
        still_answers(served)
