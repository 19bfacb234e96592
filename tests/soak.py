"""A soak, by hand: thousands of requests through one engine, some cancelled, some malformed, some too many.

    python -m tests.soak --requests 2000 --model sudoku-nano

Each request is a puzzle with limits, seeds, modes and samplings at random. One in eight is malformed and must be
refused by a message that names the field; one in six is cancelled on the way. At the end nothing may be allocated, and
the last hundred must cost what the first hundred did: resident memory and the median time to an answer.

Invariant: every request ends as answered, cancelled or refused by name; anything else ends the soak with an error.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import blockpress
from blockpress import sudoku
from blockpress.config import AutoregressiveSampling
from blockpress.decoding import Denoised, Done, Failed
from blockpress.engine import EngineCore, EngineOptions, ThreadedEngine
from blockpress.engine.core import StepRecord
from blockpress.errors import Overloaded, RequestError
from blockpress.lm import LM
from blockpress.model import Network

MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [1, 2, 999_999]}, "999999"),
    ({"prompt": [-1]}, "-1"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": [3] * 100_000}, "100000"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": "many"}, "many"),
    ({"seed": [1, 2, 3], "prompt": [[3], [4]]}, "seed has 3 entries"),
    ({"mode": "telepathy"}, "telepathy"),
    ({"logprobs": -1}, "logprobs"),
    ({"sampling": {"steps": 3}}, "sampling"),
]

PATIENCE = 1.0
"""Seconds until a user who was refused because the queue was full asks again."""


class Timed(EngineCore):
    """A core that notes how long its forwards take."""

    def __init__(self, network: Network, options: EngineOptions) -> None:
        super().__init__(network, options)
        self.seconds: list[float] = []

    def step(self) -> StepRecord:
        begun = time.perf_counter()
        told = super().step()
        self.seconds.append(time.perf_counter() - begun)
        return told


@dataclass
class Log:
    """What became of the requests, what the process held on the way, and how long whole puzzles and forwards took."""

    ends: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def resident() -> int:
    """Bytes of memory that this process has, files mapped into it left out."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def ask(lm: LM, engine: ThreadedEngine, rng: random.Random, prompts: list[list[int]], log: Log) -> None:
    """One request, and how it ended."""
    if rng.random() < 1 / 8:
        changes, named = rng.choice(MALFORMED)
        with pytest.raises(RequestError, match=named):
            lm.build_requests(**{"prompt": prompts[0], **changes})
        with log.lock:
            log.ends["refused"] += 1
        return
    asked = question(lm, rng, prompts)
    [request] = lm.build_requests(**asked)
    leave = rng.randint(1, 9) if rng.random() < 1 / 6 else None
    begun, steps = time.perf_counter(), 0
    try:
        for event in engine.events(request):
            steps += isinstance(event, Denoised)
            if leave is not None and steps == leave:
                engine.cancel(request)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                end = event.reply.finish_reason
                assert event.reply.usage.completion_tokens == len(event.reply.tokens)
                with log.lock:
                    log.ends[end] += 1
                    if leave is None and "max_tokens" not in asked:
                        log.seconds.append(time.perf_counter() - begun)
                        log.resident.append(resident())
    except Overloaded:
        with log.lock:
            log.ends["overloaded"] += 1
        time.sleep(PATIENCE)


def question(lm: LM, rng: random.Random, prompts: list[list[int]]) -> dict[str, Any]:
    """Arguments of a request, at random: three quarters of them as a user would ask, the rest with everything on."""
    plain = {"prompt": rng.choice(prompts), "seed": rng.randrange(1 << 32)}
    kind = rng.random()
    if kind < 0.75:
        return plain | {"sampling": lm.generation.sampling.with_(steps=12)}
    if kind < 0.85:
        return plain | {"mode": "verified", "max_tokens": rng.randint(1, 90)}
    if kind < 0.95:
        return plain | {"logprobs": rng.choice([0, 3]), "max_tokens": rng.randint(1, 90)}
    warm = AutoregressiveSampling(temperature=0.7, top_k=5)
    return plain | {"mode": "autoregressive", "sampling": warm, "max_tokens": rng.randint(1, 20)}


def soak(lm: LM, count: int, users: int, options: EngineOptions, seed: int = 0) -> Log:
    """`count` requests by `users` who ask one after another, each a thread."""
    prompts = [lm.encode(sudoku.layout(one.puzzle)) for one in sudoku.held_out(seed, 24)]
    log, left, errors = Log(), iter(range(count)), list[BaseException]()
    core = Timed(lm.network, options)
    log.forwards = core.seconds

    def user() -> None:
        while not errors:
            with log.lock:
                number = next(left, None)
            if number is None:
                return
            try:
                ask(lm, engine, random.Random(f"soak {seed} {number}"), prompts, log)
            except BaseException as error:
                errors.append(error)

    with ThreadedEngine(core) as engine:
        threads = [threading.Thread(target=user, name=f"user {i}") for i in range(users)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    core.scheduler.check()
    held = {kind: pages.held for kind, pages in core.scheduler.stats.pages.items()}
    assert not any(held.values()), f"pages are still held: {held}"
    assert core.scheduler.running == core.scheduler.waiting == 0 and not core.num_tracked
    assert sum(log.ends.values()) == count, f"{count - sum(log.ends.values())} requests have no end"
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--model", default="sudoku-nano")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    lm = blockpress.load(given.model)
    options = EngineOptions(memory=3 << 22, max_running=8, max_waiting=7, chunk=64)
    begun = time.perf_counter()
    log = soak(lm, given.requests, given.users, options, given.seed)
    gc.collect()
    print(
        f"{given.requests} requests, {given.users} users, {time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads"
    )
    print("ended:", ", ".join(f"{name} {number}" for name, number in sorted(log.ends.items())))
    tenth = len(log.forwards) // 10
    for name, part in (("first", log.forwards[:tenth]), ("last", log.forwards[-tenth:])):
        print(f"{name} tenth of {len(log.forwards)} forwards: p50 {1000 * statistics.median(part):.1f} ms")
    most = len(log.seconds) - 100
    for start in sorted({0, most // 4, most // 2, 3 * most // 4, most}):
        seconds, memory = log.seconds[start : start + 100], log.resident[start : start + 100]
        print(
            f"answers {start:5} to {start + 99:5}: p50 {statistics.median(seconds):.3f} s, "
            f"resident {statistics.median(memory) / 2**20:.1f} MiB"
        )


if __name__ == "__main__":
    sys.exit(main())
