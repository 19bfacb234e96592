"""Many clients at once against `blockpress serve`: what they get, how long they wait, what the server takes.

A tenth of the requests is malformed, a tenth leaves: in the middle of its stream, or before its answer has begun. Nothing
may fail with a status of 500 or above, no stream may hang, the server's memory must stay where it is, and at the end
nothing may be left in its engine. Then some clients have long answers, written token by token, so that each forward has
a text for each of them and nobody comes or goes: what the event loop takes for a text. The rest is what it takes for a
request.

    python -m tests.serve.load --clients 64 --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from blockpress import sudoku
from blockpress.hardware import processor

MALFORMED: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "hello"}]},
    {"messages": [{"role": "user", "content": "1"}], "temperature": "hot"},
    {"messages": [{"role": "user", "content": "1" * 400}]},
    {"messages": [{"role": "user", "content": "1"}], "response_format": {"type": "regex", "regex": "("}},
    {"messages": [{"role": "user", "content": "1"}], "model": "another"},
]
MIB = 1 << 20
SILENCE = 120
"""Seconds without a byte after which a stream hangs."""
ROUNDS = 5
"""How often long streams are measured."""
GROWTH = 0.05
"""Most by which the server's memory may grow from the first minute (or quarter) to the last, as a share."""


class Seen:
    """What the clients saw: statuses, faults, and seconds until the first text, between texts, and in total."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.first: list[float] = []
        self.between: list[float] = []
        self.total: list[float] = []


async def one_client(url: str, number: int, until: float, seen: Seen) -> None:
    """Ask again and again until the time is up."""
    draw = random.Random(number)
    puzzles = [sudoku.layout(puzzle.puzzle) for puzzle in sudoku.held_out(number, 4)]
    async with httpx.AsyncClient(base_url=url, timeout=SILENCE, trust_env=False) as client:
        while time.monotonic() < until:
            kind = draw.random()
            try:
                if kind < 0.1:
                    answer = await client.post("/v1/chat/completions", json=draw.choice(MALFORMED))
                    seen.statuses[answer.status_code] += 1
                    if answer.status_code < 400:
                        seen.faults["malformed, and answered"] += 1
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(3 * draw.random() if kind < 0.2 else None):
                            await one_stream(client, draw.choice(puzzles), draw, seen)
            except httpx.TimeoutException:
                seen.faults[f"nothing came for {SILENCE} s"] += 1
            except httpx.HTTPError as error:
                seen.faults[f"{type(error).__name__}: {error}"[:80]] += 1


async def one_stream(client: httpx.AsyncClient, puzzle: str, draw: random.Random, seen: Seen) -> None:
    body = {"messages": [{"role": "user", "content": puzzle}], "seed": draw.randrange(1 << 30), "stream": True}
    began = last = time.monotonic()
    text, ended = "", False
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        seen.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            return
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    seen.faults[f"error event: {chunk['error']['message'][:60]}"] += 1
                    return
                piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
                if piece:
                    now = time.monotonic()
                    (seen.between if text else seen.first).append(now - last)
                    text, last = text + piece, now
    seen.total.append(time.monotonic() - began)
    if not ended:
        seen.faults["a stream without an end"] += 1


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def main_thread_seconds(pid: int) -> float:
    """Processor time of the event loop, which runs in the main thread."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)", text, re.M)
    assert found is not None
    return float(found[1])


def left(url: str) -> list[str]:
    """What the engine still holds ten seconds after the last client has gone."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    until = time.monotonic() + 10
    while True:
        held = [name for name in names if metric(url, name)]
        if not held or time.monotonic() > until:
            return held
        time.sleep(0.2)


async def steady(url: str, pid: int, clients: int) -> tuple[float, int]:
    """Seconds of the event loop and the number of texts, while `clients` streams run and none begins or ends."""
    begun = texts = 0
    marks: list[tuple[float, int]] = []

    async def one(client: httpx.AsyncClient, puzzle: str) -> None:
        nonlocal begun, texts
        body = {"messages": [{"role": "user", "content": puzzle}], "stream": True, "mode": "autoregressive"}
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            silent = True
            async for line in answer.aiter_lines():
                texts += '"delta": {"content"' in line
                if silent and '"delta": {"content"' in line:
                    silent, begun = False, begun + 1
                    if begun == clients:
                        marks.append((main_thread_seconds(pid), texts))
                elif '"finish_reason": "' in line and len(marks) == 1:
                    marks.append((main_thread_seconds(pid), texts))

    puzzles = [sudoku.layout(puzzle.puzzle) for puzzle in sudoku.held_out(0, clients)]
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=SILENCE, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(one(client, puzzle) for puzzle in puzzles))
    if len(marks) < 2:  # one had ended before the last had begun
        return 0.0, 0
    return marks[1][0] - marks[0][0], marks[1][1] - marks[0][1]


def measure_steady(url: str, pid: int, clients: int) -> float:
    """The mean seconds of the event loop for a text, over `ROUNDS` rounds; they are printed."""
    rounds = [asyncio.run(steady(url, pid, clients)) for _ in range(ROUNDS)]
    seconds, texts = sum(loop for loop, _ in rounds), sum(count for _, count in rounds)
    a_text = seconds / max(1, texts)
    forward = f"{1000 * clients * a_text:.2f} ms a forward that has a text for each"
    print(f"{clients:2} long streams  {1e6 * a_text:.1f} us of the event loop a text, {forward}, {texts} texts")
    return a_text


async def run(url: str, pid: int, clients: int, seconds: float, seen: Seen) -> list[int]:
    """All clients, and the server's memory every second."""
    until = time.monotonic() + seconds
    work = asyncio.gather(*(one_client(url, number, until, seen) for number in range(clients)))
    memory = []
    while not work.done():
        memory.append(resident(pid))
        await asyncio.wait([work], timeout=1)
    await work
    return memory


def shown(name: str, values: list[float]) -> str:
    ranked = sorted(values) or [float("nan")]
    p50, p99 = (ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in (0.5, 0.99))
    return f"{name:14} p50 {p50:7.3f} s   p99 {p99:7.3f} s   n {len(values)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--port", type=int, default=8765)
    asked = parser.parse_args()
    url = f"http://127.0.0.1:{asked.port}"
    command = [sys.executable, "-m", "blockpress", "serve", "--port", str(asked.port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        seen = Seen()
        asyncio.run(run(url, server.pid, asked.clients, asked.seconds / 6, Seen()))  # threads start, caches fill
        loop, count = main_thread_seconds(server.pid), metric(url, "blockpress:forwards_total")
        memory = asyncio.run(run(url, server.pid, asked.clients, asked.seconds, seen))
        loop = main_thread_seconds(server.pid) - loop
        count = metric(url, "blockpress:forwards_total") - count
        held = left(url)
        a_text = [measure_steady(url, server.pid, streams) for streams in (16, asked.clients)][-1]
    finally:
        server.terminate()
        server.wait()
    part = min(60, len(memory) // 4 or 1)
    first, last = (sum(sizes) / len(sizes) for sizes in (memory[:part], memory[-part:]))
    print(f"{asked.clients} clients, {asked.seconds:.0f} s, {processor().cores} cores of {processor().name}")
    print("statuses", dict(sorted(seen.statuses.items())), "faults", dict(seen.faults) or "none")
    for name, values in (("first text", seen.first), ("between texts", seen.between), ("in total", seen.total)):
        print(shown(name, values))
    print(f"memory         {first / MIB:.0f} MiB in the first {part} s, {last / MIB:.0f} in the last")
    print(f"event loop     {1000 * loop / max(1, count):.2f} ms of processor time a forward, {count:.0f} forwards")
    requests, texts = sum(seen.statuses.values()), len(seen.first) + len(seen.between)
    a_request = (loop - a_text * texts) / max(1, requests)
    print(f"               {1000 * a_request:.2f} ms of it a request, beside its texts, {requests} requests")
    print("left           ", ", ".join(held) or "nothing")
    failed = seen.faults or held or any(status >= 500 for status in seen.statuses)
    return 1 if failed or last > (1 + GROWTH) * first else 0


if __name__ == "__main__":
    sys.exit(main())
