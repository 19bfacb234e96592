"""Who may ask, how much, and what never leaves or enters: keys, hosts, origins, sizes, queues, images by address."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

import blockpress
from blockpress.errors import RequestError
from blockpress.serve import ServeOptions
from blockpress.serve import images as by_address
from blockpress.serve.errors import _FieldError
from blockpress.serve.sse import _Waker, event_stream
from tests.builders.server import Served
from tests.serve.conftest import Serve

LONG = {"steps": 1_000_000, "confidence": 0, "entropy_bound": 1e-9}
BODY = {"messages": [{"role": "user", "content": "1"}], "diffusion": {"steps": 1}}


@pytest.fixture(scope="module")
def strict() -> Iterator[Served]:
    from tests.builders.server import serving

    options = ServeOptions(api_keys=("secret", "other"), max_body=2000, patience=1.0, max_streams=2, hosts=("box.lan",))
    with serving(blockpress.load("sudoku-nano"), "sudoku-nano", options) as served:
        yield served


def post(served: Served, body: Any = BODY, **headers: str) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer secret"}, {"x-api-key": "other"}, {"authorization": "bearer  secret"}]
)
def test_a_key_opens(strict: Served, headers: dict[str, str]) -> None:
    assert post(strict, **headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "secret"},
        {"x-api-key": ""},
        {"authorization": "Bearer sécret"},
    ],
)
def test_without_the_key_nothing_is_answered_but_health(strict: Served, headers: dict[str, str]) -> None:
    raw = {name: value.encode() for name, value in headers.items()}
    answer = httpx.post(f"{strict.url}/v1/chat/completions", json=BODY, headers=raw)
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert httpx.get(f"{strict.url}/metrics").status_code == 401
    assert httpx.get(f"{strict.url}/health").status_code == 200


@pytest.mark.parametrize(("host", "status"), [("evil.example", 403), ("127.0.0.1.evil.example:1", 403), ("", 403), ("localhost:99", 200), ("[::1]:8", 200), ("192.168.0.7", 200), ("box.lan", 200)])  # fmt: skip
def test_a_host_that_is_not_ours_is_refused(strict: Served, host: str, status: int) -> None:
    assert httpx.get(f"{strict.url}/health", headers={"host": host}).status_code == status


def test_a_foreign_origin_is_refused_and_an_allowed_one_is_answered(strict: Served, serve: Serve) -> None:
    key = {"authorization": "Bearer secret"}
    assert post(strict, origin="https://evil.example", **key).status_code == 403
    assert post(strict, origin="null", **key).status_code == 403
    assert post(strict, origin=strict.url, **key).status_code == 200
    page = "https://page.example"
    friendly = serve(blockpress.load("sudoku-nano"), "sudoku-nano", ServeOptions(origins=(page,)))
    answer = post(friendly, origin=page)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
    assert post(friendly, origin="https://other.example").status_code == 403


def test_a_body_that_is_too_large_is_refused_with_or_without_its_length(strict: Served) -> None:
    key = {"authorization": "Bearer secret"}
    large = {"messages": [{"role": "user", "content": "1" * 3000}]}
    assert post(strict, large, **key).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 100

    answer = httpx.post(f"{strict.url}/v1/chat/completions", content=pieces(), headers=key)
    assert answer.status_code == 413


@pytest.mark.slow
def test_a_body_that_does_not_arrive_is_not_waited_for(strict: Served) -> None:
    port = int(strict.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer secret\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")  # fmt: skip
        slow.settimeout(10)
        assert b" 408 " in slow.recv(1000).partition(b"\r\n")[0]


def test_more_streams_than_allowed_are_refused_until_some_end(strict: Served) -> None:
    key = {"authorization": "Bearer secret"}
    body = {**BODY, "stream": True, "diffusion": LONG}
    with httpx.Client(timeout=10, headers=key) as client:
        url = f"{strict.url}/v1/chat/completions"
        with client.stream("POST", url, json=body) as one, client.stream("POST", url, json=body) as two:
            assert one.status_code == two.status_code == 200
            reading = one.iter_raw(), two.iter_raw()  # a reader that is dropped closes its connection
            assert all(next(each) for each in reading)
            third = client.post(url, json=BODY)
            assert third.status_code == 429, third.text
            assert third.headers["retry-after"] == "1"
        assert strict.idle()
        assert client.post(url, json=BODY).status_code == 200


def test_an_unknown_route_and_a_path_as_a_model_are_refused(nano: Served) -> None:
    assert httpx.get(f"{nano.url}/v1/nothing").status_code == 404
    assert httpx.get(f"{nano.url}/v1/models/../../etc/passwd").status_code == 404
    assert post(nano, {**BODY, "model": "/etc/passwd"}).status_code == 404
    assert httpx.delete(f"{nano.url}/v1/models").status_code == 405


def picture(source: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": source}}
    return {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}


@pytest.mark.parametrize("source", ["/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest", "https://example.com/a.png", "data:text/html,x", "~/.ssh/id_rsa"])  # fmt: skip
def test_no_file_is_read_and_nothing_is_fetched(seeing: Served, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_address, "_get", lambda *_: pytest.fail("an image was asked for"))
    answer = post(seeing, picture(source))
    assert answer.status_code == 400
    assert "messages[0].content[0]" in answer.json()["error"]["message"]


def data(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def png(size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "png")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 times 30,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = (30_000).to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\x00\x00\x00") + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")  # fmt: skip


def test_an_image_is_seen_and_a_bomb_is_refused(seeing: Served) -> None:
    assert post(seeing, picture(data(png((40, 30))))).status_code == 200
    for wrong in (bomb(), b"no image", png((40, 30))[:60]):
        assert post(seeing, picture(data(wrong))).status_code == 400
    many = {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data(png((8, 8)))}}] * 17}]
    }
    assert "at most 16" in post(seeing, many).json()["error"]["message"]


FETCHES = ServeOptions(fetch_images=True)
PRIVATE = ["127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "100.64.0.1", "224.0.0.1"]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_to_a_private_network_is_not_fetched(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(by_address.socket, "getaddrinfo", lambda *_, **__: [(family, 1, 6, "", (address, 80))])
    monkeypatch.setattr(by_address.httpx, "Client", lambda **_: pytest.fail("a packet would leave"))
    with pytest.raises(_FieldError, match="not a public address"):
        by_address.fetched("https://pictures.example/a.png", "messages[0]", FETCHES)


class Transport(httpx.BaseTransport):
    """A network of one host: `/go` redirects to `target`, the rest is a picture."""

    def __init__(self, target: str) -> None:
        self.target, self.asked = target, list[httpx.Request]()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if request.url.path == "/go":
            return httpx.Response(302, headers={"location": self.target})
        return httpx.Response(200, headers={"content-type": "image/png"}, content=png((2, 2)))


def test_an_image_is_fetched_from_what_its_name_was_checked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"pictures.example": "93.184.216.34", "inside.example": "10.0.0.1"}
    monkeypatch.setattr(
        by_address.socket, "getaddrinfo", lambda host, *_, **__: [(socket.AF_INET, 1, 6, "", (names[host], 443))]
    )
    real = httpx.Client

    def fetch(address: str, target: str = "") -> tuple[str, Transport]:
        network = Transport(target)
        monkeypatch.setattr(by_address.httpx, "Client", lambda **options: real(**options, transport=network))
        return by_address.fetched(address, "messages[0]", FETCHES), network

    found, network = fetch("https://pictures.example/a.png")
    assert found == data(png((2, 2)))
    assert network.asked[0].url.host == "93.184.216.34"
    assert network.asked[0].headers["host"] == "pictures.example"
    assert network.asked[0].extensions["sni_hostname"] == "pictures.example"
    assert fetch("https://pictures.example/go", "/b.png")[0] == found
    with pytest.raises(_FieldError, match="not a public address"):
        fetch("https://pictures.example/go", "http://inside.example/")
    with pytest.raises(_FieldError, match="gave status 302"):
        fetch("https://pictures.example/go", "/go")


@pytest.mark.parametrize("changes", [{"max_body": 0}, {"max_streams": 0}, {"patience": 0}, {"keep_alive": -1}, {"api_keys": (" ",)}, {"max_images": -1}])  # fmt: skip
def test_options_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"serve option {next(iter(changes))}"):
        ServeOptions(**changes)


def test_a_silent_stream_is_kept_alive(serve: Serve) -> None:
    served = serve(blockpress.load("sudoku-nano"), "sudoku-nano", ServeOptions(keep_alive=0.1))
    with httpx.stream(
        "POST", f"{served.url}/v1/chat/completions", json={**BODY, "stream": True, "diffusion": LONG}
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith(":"):
                break
    assert line == ": ping"


async def _pieces(*given: bytes | Exception) -> AsyncIterator[str | bytes]:
    for piece in given:
        if isinstance(piece, Exception):
            raise piece
        yield piece


def sent(chunks: AsyncIterator[str | bytes], **options: Any) -> list[dict[str, Any]]:
    """What a stream sends to a client that stays."""
    app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(options=ServeOptions(**options))))
    messages: list[dict[str, Any]] = []

    async def run() -> None:
        async def send(message: Any) -> None:
            messages.append(message)

        response = event_stream(SimpleNamespace(app=app), None, chunks)  # type: ignore[arg-type]
        await response({"type": "http", "path": "/"}, asyncio.Event().wait, send)  # type: ignore[arg-type]

    asyncio.run(run())
    return messages


def test_events_of_one_forward_leave_at_once(nano: Served) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "1"}], "stream": True, "diffusion": {"steps": 1}})
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    came = b""
    with socket.create_connection(("127.0.0.1", int(nano.url.rpartition(":")[2]))) as client:
        client.sendall((head + body).encode())
        while not came.endswith(b"0\r\n\r\n"):
            came += client.recv(10_000)
    last = re.split(rb"\r\n[0-9a-f]+\r\n", came)[-2]
    assert b'"finish_reason": "' in last and b"[DONE]" in last, came


def test_what_a_forward_delivers_wakes_the_loop_once() -> None:
    calls: list[Callable[[], None]] = []
    loop = SimpleNamespace(call_soon_threadsafe=calls.append)
    waker, events = _Waker(loop), [asyncio.Event() for _ in range(64)]  # type: ignore[arg-type]
    for turn in (1, 2):
        for event in events:
            event.clear()
            waker.wake(event)
        assert len(calls) == turn
        calls[-1]()
        assert all(event.is_set() for event in events)


def test_two_hosts_are_refused(nano: Served) -> None:
    with socket.create_connection(("127.0.0.1", int(nano.url.rpartition(":")[2]))) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400")


def test_a_mistake_in_the_middle_of_a_stream_is_an_error_event(caplog: pytest.LogCaptureFixture) -> None:
    first, last, end = sent(_pieces(b"a", ValueError("oh")))[1:]
    assert first["body"] == b"a"
    assert last["body"].startswith(b"data: {")
    assert b'"type": "server_error"' in last["body"]
    assert last["more_body"] and not end["more_body"]
    assert "oh" in caplog.text


def test_a_server_that_stops_ends_its_streams_with_an_error(serve: Serve) -> None:
    served = serve(blockpress.load("sudoku-nano"), "sudoku-nano", ServeOptions(patience=0.2))
    lines: list[str] = []

    def read() -> None:
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json={**BODY, "stream": True, "diffusion": LONG}, timeout=30) as answer:  # fmt: skip
            lines.extend(answer.iter_lines())

    thread = threading.Thread(target=read)
    thread.start()
    while served.service.open_requests == 0:
        time.sleep(0.005)
    served.loop.call_soon_threadsafe(served.service.drain)
    thread.join()
    assert "the server stops" in [line for line in lines if line.startswith("data:")][-1]
    assert post(served).status_code == 503
    assert httpx.get(f"{served.url}/health").status_code == 503
