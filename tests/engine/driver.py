"""Requests driven through a core: who arrives when, who is cancelled when, and what events each gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from blockpress.config import AutoregressiveSampling, ModelConfig, Sampling
from blockpress.decoding import Done, Event, Failed, Reply, SequenceState
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import generate
from blockpress.decoding.verified import generate_verified
from blockpress.engine import EngineCore, Request
from blockpress.model import Network

AnySampling = Sampling | AutoregressiveSampling


def prompts(config: ModelConfig, count: int, longest: int, seed: int, shared: int = 0) -> list[list[int]]:
    """Random prompts of mixed lengths, every other one beginning with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, config.vocab_size, (length,), generator=generator).tolist()

    beginning = tokens(shared)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [(beginning if i % 2 else []) + tokens(length) for i, length in enumerate(lengths)]


def row(config: ModelConfig, index: int, prompt: list[int], sampling: AnySampling, **changes: Any) -> SequenceState:
    canvas = config.canvas_length if isinstance(sampling, Sampling) else 1
    given = {
        "stop_ids": (1,),
        "canvas_length": canvas,
        "room": config.context_length - len(prompt),
        "max_tokens": 2 * config.canvas_length + 5 if isinstance(sampling, Sampling) else 9,
    }
    return SequenceState(index, prompt, 100 + index, **{**given, **changes})


def reference_reply(
    network: Network, config: ModelConfig, prompt: list[int], index: int, sampling: AnySampling, **kw: Any
) -> Reply:
    """What the reference loop answers to one prompt alone; `images` of the row are among the changes."""
    images = kw.pop("images", {})
    one = row(config, index, prompt, sampling, **kw)
    one.images = images
    looked_at = isinstance(sampling, Sampling) and (sampling.reads_drafts or one.logprobs is not None)
    write = generate_verified if looked_at else generate if isinstance(sampling, Sampling) else generate_autoregressive
    [reply] = [event.reply for event in write(network, [one], sampling) if isinstance(event, Done)]  # type: ignore[operator]
    return reply


def drive(
    core: EngineCore,
    requests: Sequence[Request],
    arrivals: Sequence[int] = (),
    cancels: Mapping[int, int] | None = None,
) -> dict[Request, list[Event]]:
    """Run until all is answered: request i is submitted before forward `arrivals[i]`, and cancelled before `cancels[i]`."""
    told: dict[Request, list[Event]] = {request: [] for request in requests}
    arrivals = list(arrivals) or [0] * len(requests)
    waiting, number = sorted(range(len(requests)), key=lambda i: arrivals[i]), 0
    while waiting or core.busy:
        while waiting and arrivals[waiting[0]] <= number:
            core.submit(requests[waiting.pop(0)])
        for i, moment in (cancels or {}).items():
            if moment == number:
                core.cancel(requests[i])
        for request, event in core.step().events:
            told[request].append(event)
        if number % 4 == 0 or not core.busy:  # what is lost once stays lost
            core.scheduler.check()
        number += 1
        assert number < 10_000, "no end in sight"
    return told


def submitted(core: EngineCore, requests: Sequence[Request]) -> list[Request]:
    """Submits the requests; gives the copies on which the core works."""
    for request in requests:
        core.submit(request)
    return [core._copies[request] for request in requests]


def reply(events: Sequence[Event]) -> Reply:
    failed = [event for event in events if isinstance(event, Failed)]
    assert not failed, failed
    [done] = [event for event in events if isinstance(event, Done)]
    return done.reply
