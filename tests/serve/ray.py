"""Ray Serve with two replicas on this machine: where requests go, what a killed replica costs, what a client that leaves.

Clients of all APIs ask without a pause. A replica is killed among them: of its streams those that have begun end with an
error event of their API, everything else is answered as if nothing had happened, and Ray starts another one.

    python -m tests.serve.ray --clients 12 --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import ray
from ray import serve

from blockpress import sudoku
from blockpress.hardware import processor
from blockpress.serve.ray import app

FAMILY = 24
"""Requests of each prompt family."""
LAST, ERROR = "last", "error"
"""What a line of a stream may be: the last one of an answer, an error."""
MODES = ("diffusion", "autoregressive", "autoregressive", "diffusion", "autoregressive")
"""Short answers and long ones; five, so that each of the six APIs has both."""


@dataclass
class Answer:
    """One request: its API, its replica, how it ended ("last", "error" or what went wrong), and when it was asked."""

    api: str
    replica: str
    end: str
    began: float
    text: str = field(default="", repr=False)


def chat(family: str, puzzle: str, **more: Any) -> dict[str, Any]:
    """A conversation that begins like all others of its family; the model reads the last message alone."""
    first = [{"role": "user", "content": f"family {family}"}, {"role": "assistant", "content": "yes?"}]
    return {"model": "sudoku-nano", "messages": [*first, {"role": "user", "content": puzzle}], **more}


APIS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "chat": ("/v1/chat/completions", {"stream": True}, {LAST: r"data: \[DONE\]", ERROR: r'data: \{"error": '}),
    "messages": (
        "/v1/messages",
        {"stream": True, "max_tokens": 200},
        {LAST: "event: message_stop", ERROR: "event: error"},
    ),
    "responses": ("/v1/responses", {"stream": True}, {LAST: "event: response.completed", ERROR: "event: error"}),
    "canvas": ("/v1/canvas", {}, {LAST: "event: canvas.done", ERROR: "event: canvas.error"}),
    "ollama": ("/api/chat", {}, {LAST: '.*"done": true', ERROR: r'\{"error": '}),
    "whole": ("/v1/chat/completions", {}, {LAST: r".*\[?\{.*finish_reason", ERROR: r"$^"}),
}


async def ask(client: httpx.AsyncClient, api: str, family: str, puzzle: str, **more: Any) -> Answer:
    """Ask, and read the answer to its end."""
    path, fields, ends = APIS[api]
    body = chat(family, puzzle, **fields, **more)
    if api == "responses":
        body["input"] = body.pop("messages")
    if api == "canvas":
        del body["model"]
    began, found, lines = time.monotonic(), "no end", []
    async with client.stream("POST", path, json=body) as got:
        replica = got.headers.get("x-blockpress-replica", "")
        if got.status_code != 200:
            return Answer(api, replica, f"status {got.status_code}", began, (await got.aread()).decode())
        try:
            async for line in got.aiter_lines():
                lines.append(line)
                found = next((end for end, pattern in ends.items() if re.match(pattern, line)), found)
        except httpx.HTTPError as error:
            found = f"cut off: {type(error).__name__}"
    return Answer(api, replica, found, began, "\n".join(lines))


async def two_families(client: httpx.AsyncClient, puzzles: list[str]) -> dict[str, str]:
    """Two families that live on different replicas, with these."""
    homes: dict[str, str] = {}
    for number in range(64):
        answer = await ask(client, "chat", str(number), puzzles[0])
        if answer.replica not in homes.values():
            homes[str(number)] = answer.replica
        if len(homes) == 2:
            return homes
    raise SystemExit(f"64 families live on one replica: {homes}")


async def stays(client: httpx.AsyncClient, puzzles: list[str]) -> dict[str, str]:
    """Requests of two families, four at a time: each family stays with its replica."""
    homes = await two_families(client, puzzles)
    apis = [api for api in APIS if api != "responses"]  # where its messages stand, it has other keys
    for turn in range(0, FAMILY, 2):
        asked = [
            ask(client, apis[(turn + n) % len(apis)], family, puzzles[(turn + n) % len(puzzles)])
            for n in range(2)
            for family in homes
        ]
        for family, answer in zip([*homes, *homes], await asyncio.gather(*asked), strict=True):
            assert answer.end == LAST, answer
            assert answer.replica == homes[family], (answer, homes)
    return homes


def kill(replica: str) -> None:
    """End a replica's process as a machine that is lost does."""
    actor = ray.get_actor(f"SERVE_REPLICA::default#Served#{replica}", namespace="serve")
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


async def under_load(
    client: httpx.AsyncClient, puzzles: list[str], clients: int, seconds: float, victim: str
) -> tuple[list[Answer], float, float]:
    """All answers of many clients, when a replica was killed among them, and after how many seconds another was there."""
    answers: list[Answer] = []
    until = time.monotonic() + seconds

    async def one(number: int) -> None:
        turn = number
        while time.monotonic() < until:
            api = list(APIS)[turn % len(APIS)]
            more = {"seed": turn, **({} if api == "canvas" else {"mode": MODES[turn % len(MODES)]})}
            try:
                answers.append(await ask(client, api, f"{number}", puzzles[turn % len(puzzles)], **more))
            except httpx.HTTPError as error:
                answers.append(Answer(api, "", f"no answer: {type(error).__name__}", time.monotonic()))
            turn += 1

    work = asyncio.gather(*(one(number) for number in range(clients)))
    await asyncio.sleep(seconds / 4)
    await asyncio.to_thread(kill, victim)
    killed = time.monotonic()
    while len(living := await replicas(client) - {victim}) < 2:
        assert time.monotonic() < killed + 300, f"{living} alone"
        await asyncio.sleep(0.5)
    again = time.monotonic() - killed
    await work
    return answers, killed, again


async def replicas(client: httpx.AsyncClient) -> set[str]:
    """Those that give figures."""
    return set(re.findall('replica="([^"]+)"', (await client.get("/metrics")).text))


async def figure(client: httpx.AsyncClient, name: str) -> float:
    """A figure of `/metrics`, over all replicas."""
    text = (await client.get("/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{name}\{{[^}}]*\}} (\S+)", text, re.MULTILINE))


async def leaves(client: httpx.AsyncClient, puzzle: str) -> tuple[float, float, float]:
    """Leave a long answer: forwards that it would have taken, forwards after leaving, seconds until nothing runs."""
    path, fields, _ = APIS["chat"]
    body = chat("long", puzzle, **fields, mode="autoregressive", n=16, seed=1)
    before = await figure(client, "blockpress:forwards_total")
    async with client.stream("POST", path, json=body) as got:
        await got.aread()
    whole = await figure(client, "blockpress:forwards_total") - before
    async with client.stream("POST", path, json=body) as got:
        lines = got.aiter_lines()
        while '"content": ""' in (line := await anext(lines)) or not line.startswith("data"):
            pass
        before = await figure(client, "blockpress:forwards_total")
        left = time.monotonic()
    while await figure(client, "vllm:num_requests_running"):
        assert time.monotonic() < left + 30, "a request of a client that left still runs"
        await asyncio.sleep(0.01)
    return whole, await figure(client, "blockpress:forwards_total") - before, time.monotonic() - left


async def took(client: httpx.AsyncClient, puzzle: str, seed: int) -> tuple[float, float]:
    """Seconds to the first text of a stream, and to its end."""
    path, fields, _ = APIS["chat"]
    began, first = time.monotonic(), 0.0
    async with client.stream("POST", path, json=chat("beside", puzzle, **fields, seed=seed)) as got:
        async for line in got.aiter_lines():
            if not first and re.search('"content": "[^"]', line):
                first = time.monotonic() - began
    return first, time.monotonic() - began


async def beside(client: httpx.AsyncClient, puzzles: list[str], port: int) -> dict[str, list[float]]:
    """Median seconds to the first text and to the end, by Ray and by a server without it, in turn."""
    command = [sys.executable, "-m", "blockpress", "serve", "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as direct:
            for _ in range(600):
                with suppress(httpx.HTTPError):
                    if (await direct.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(0.2)
            seconds: dict[str, list[tuple[float, float]]] = {"ray": [], "direct": []}
            for turn in range(64):
                for name, each in (("ray", client), ("direct", direct)):
                    seconds[name].append(await took(each, puzzles[turn % len(puzzles)], turn))
    finally:
        server.terminate()
        server.wait()
    return {name: [median(values) for values in zip(*each[4:], strict=True)] for name, each in seconds.items()}


async def check(port: int, clients: int, seconds: float) -> bool:
    puzzles = [sudoku.layout(puzzle.puzzle) for puzzle in sudoku.held_out(1, 16)]
    limits = httpx.Limits(max_connections=None)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client:
        homes = await stays(client, puzzles)
        print(f"families      {FAMILY} requests of each of two stayed with theirs: {homes}")
        slots, props = (await client.get("/slots")).json(), (await client.get("/props")).json()
        assert {slot["replica"] for slot in slots} == set(homes.values()) and len(slots) == props["total_slots"]
        assert (await client.get("/load")).json() == {"server_load": 0}
        print(f"together      {len(slots)} slots of both replicas")
        whole, after, took = await leaves(client, puzzles[0])
        print(f"leaving       {after:.0f} forwards after it of {whole:.0f}; nothing ran after {took:.2f} s")
        by = await beside(client, puzzles, port + 1)
        ratios = [with_ray / without for with_ray, without in zip(by["ray"], by["direct"], strict=True)]
        print(
            f"beside        a server without Ray: {ratios[0]:.2f} of its time to the first text, {ratios[1]:.2f} in total"
        )
        print(f"              {by} s")
        victim = next(iter(homes.values()))
        answers, killed, again = await under_load(client, puzzles, clients, seconds, victim)
    lost = [answer for answer in answers if answer.end == ERROR]
    wrong = [answer for answer in answers if answer.end not in (LAST, ERROR)]
    foreign = [answer for answer in lost if answer.replica != victim or answer.began > killed]
    later = [answer for answer in answers if answer.began > killed and answer.end == LAST]
    print(f"load          {clients} clients, {seconds:.0f} s, one of two replicas killed: {len(answers)} answers")
    print(f"  whole       {sum(answer.end == LAST for answer in answers)}, of which {len(later)} asked after the kill")
    print(f"  error event {len(lost)}: {dict(Counter(answer.api for answer in lost))}")
    print(f"  lost        {len(wrong)}, error events of another replica or later: {len(foreign)}")
    print(f"  replaced    two replicas again {again:.1f} s after the kill")
    for answer in [*wrong, *foreign][:10]:
        print("  ", answer, json.dumps(answer.text[-300:]))
    return bool(lost and later and not wrong and not foreign and after <= max(5, whole / 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=8766)
    asked = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # else workers wait for every other job of a busy machine
    began = time.monotonic()
    ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": asked.port})
        serve.run(app({"model": "sudoku-nano", "min_replicas": 2, "memory": 64}))
        print(f"{processor().name}, Ray {ray.__version__}: two replicas ready after {time.monotonic() - began:.1f} s")
        right = asyncio.run(check(asked.port, asked.clients, asked.seconds))
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
