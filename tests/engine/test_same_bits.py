"""The same bits for a request alone and in any batch: every step, log-probability and count, in every float type.

What one test asks of the whole engine, `tests/ops/test_same_bits.py` asks of each operation, and of more sizes.
"""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from blockpress.checkpoints.build import multiplied, packable, put
from blockpress.config import PRESETS, AutoregressiveSampling, ModelConfig, Sampling
from blockpress.constrain import Constraint, ConstraintState
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import TokenBytes
from blockpress.decoding import Denoised, Done, Event
from blockpress.engine import EngineCore, EngineOptions, Request, ThreadedEngine
from blockpress.hardware import isa, processor
from blockpress.model import Network
from blockpress.ops.integers import quantized
from blockpress.ops.packed import HalfFloats
from tests.forks import python

from ..conftest import make_random_network
from ..ops import layouts
from .driver import AnySampling, drive, prompts, row

ROOT = Path(__file__).parents[2]
CONFIG = replace(PRESETS["tiny"](), context_length=192, num_experts=8, hidden_size=34, vocab_size=77)
TYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = Sampling(steps=3, confidence=0.0)
WARM = AutoregressiveSampling(temperature=1.2, top_k=20)
MIXED: list[tuple[AnySampling, int | None]] = [
    (STEPS, None),
    (WARM, 2),
    (STEPS.with_(max_verifications=2), None),
    (AutoregressiveSampling(), None),
    (STEPS.with_(max_repairs=2, repair_below=0.2), None),
    (STEPS.with_(steps=4, t_max=1.5, t_min=0.2), 5),
]
"""Samplings, with the number of alternatives whose log-probabilities are reported."""
ROOMY = EngineOptions(memory=1 << 20)
OTHERS = {
    "without reuse": replace(ROOMY, reuse_prefixes=False),
    "chunks of 1": replace(ROOMY, chunk=1, prefill_tokens=3),
    "chunks of 7": replace(ROOMY, chunk=7, prefill_tokens=20),
    "pages so scarce that requests are preempted": EngineOptions(memory=11 << 12, max_running=16, chunk=16),
}


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases for `parametrize`: what the quick ones show, the others show once more."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


ALL_TYPES = pytest.mark.parametrize("dtype", slow_but(TYPES, torch.float32))


@cache
def network(dtype: torch.dtype, config: ModelConfig = CONFIG) -> Network:
    """Random weights: small differences grow from step to step until tokens differ."""
    return make_random_network(config, seed=5).requires_grad_(False).to(dtype)


def made(count: int, mixed: Sequence[tuple[AnySampling, int | None]] = MIXED):  # type: ignore[no-untyped-def]
    """Functions that make each request anew: a request runs once. The first ones of many are those of few."""

    def maker(index: int, prompt: list[int], sampling: AnySampling, logprobs: int | None):  # type: ignore[no-untyped-def]
        room = CONFIG.canvas_length + 3 if isinstance(sampling, Sampling) else 6  # one canvas and some of the next
        return lambda: Request(row(CONFIG, index, prompt, sampling, logprobs=logprobs, max_tokens=room), sampling)

    given = prompts(CONFIG, 24, 40, seed=7, shared=20)[:count]
    return [
        maker(i, prompt, *how) for i, (prompt, how) in enumerate(zip(given, islice(cycle(mixed), count), strict=True))
    ]


def bits(events: Sequence[Event]) -> list[object]:
    """Everything that a request tells, floats to the last bit."""
    told: list[object] = []
    for event in events:
        if isinstance(event, Denoised):
            tensors = (event.argmax, event.accepted, event.entropy, event.changed)
            told.append((event.canvas, event.step, event.settled, *(t.numpy().tobytes() for t in tensors)))
        elif isinstance(event, Done):
            told.append((event.reply.tokens, event.reply.usage, event.reply.finish_reason, event.reply.logprobs))
    return told


def run(net: Network, makers, options: EngineOptions = ROOMY, arrivals: Sequence[int] = ()):  # type: ignore[no-untyped-def]
    requests = [make() for make in makers]
    core = EngineCore(net, options)
    told = drive(core, requests, arrivals=arrivals)
    assert all(isinstance(told[request][-1], Done) for request in requests)
    return [bits(told[request]) for request in requests], core


@cache
def alone_in(net: Network, index: int) -> list[object]:
    """What one request tells alone; each is asked once of a network."""
    return run(net, made(index + 1)[-1:])[0][0]


def check(net: Network, sizes: Sequence[int], options: Sequence[str] = ()) -> None:
    makers = made(max(sizes))
    alone = [alone_in(net, index) for index in range(len(makers))]
    for size in sizes:
        for place in (0, len(makers) - size):
            assert run(net, makers[place : place + size])[0] == alone[place : place + size], f"{size} at once"
    for name in options:
        chosen = OTHERS[name]
        chosen = replace(chosen, memory=chosen.memory * net.dtype.itemsize // 4)  # the same number of pages
        told, core = run(net, makers, chosen, arrivals=[2 * i % 7 for i in range(len(makers))])
        assert told == alone, name
        assert ("scarce" not in name) or core.stats.scheduler.preemptions, "the case is one"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.end_to_end
def test_a_request_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    """Through the public engine: alone, and as one of 2, 6 and 7, in all modes at once."""
    makers, net = made(7), network(dtype)
    alone = [alone_in(net, index) for index in range(7)]
    with ThreadedEngine(EngineCore(net, ROOMY)) as engine:
        for size in (1, 2, 6, 7):
            streams = [engine.events(make()) for make in makers[-size:]]
            assert [bits([*stream]) for stream in streams] == alone[-size:], f"{size} at once"


@ALL_TYPES
@pytest.mark.parametrize("options", slow_but(OTHERS, "chunks of 7", "pages so scarce that requests are preempted"))
@pytest.mark.end_to_end
def test_chunks_reuse_and_preemption_leave_the_bits_alone(options: str, dtype: torch.dtype) -> None:
    check(network(dtype), [7], [options])


SHAPES = [None, "[AB]{3,40}", r"[^A]*A(B|[C-Z]{2})*", None, "(AB|C)*D", r"[^Z]{20,60}"]
"""What requests must match: of few tokens, whose products alone are computed, and of nearly all."""


@ALL_TYPES
@pytest.mark.end_to_end
def test_constraints_keep_the_bits_of_their_rows_and_of_all_others(dtype: torch.dtype) -> None:
    net, texts = network(dtype), [None, None, *[bytes([token + 46]) for token in range(2, CONFIG.vocab_size)]]
    constraints = [shape and Constraint.of(parse_regex(shape), TokenBytes(texts), [1], shape) for shape in SHAPES]
    given = prompts(CONFIG, len(SHAPES), 60, seed=8, shared=20)

    def make(index: int) -> Request:
        constraint = constraints[index]
        state = ConstraintState(constraint) if constraint else None
        return Request(row(CONFIG, index, given[index], STEPS, constraint=state), STEPS)

    makers = [partial(make, index) for index in range(len(SHAPES))]
    alone = [run(net, [make])[0][0] for make in makers]
    for chosen in (slice(0, 6), slice(1, 3), slice(2, 5), slice(5, None, -1)):
        assert run(net, makers[chosen])[0] == alone[chosen]
    for name in ("chunks of 7", "without reuse"):
        assert run(net, makers, OTHERS[name], arrivals=[0, 2, 1, 3, 5, 4])[0] == alone


PACKED = {
    "int8": lambda weight, seed: quantized(weight),
    "nibbles": lambda weight, seed: layouts.int4(tuple(weight.shape), seed, asymmetric=True),
    "halves": lambda weight, seed: HalfFloats(values=weight.half()),
}


@pytest.mark.parametrize("kind", slow_but(PACKED, "int8"))
@pytest.mark.end_to_end
def test_packed_weights_keep_the_bits(kind: str) -> None:
    net = copy.deepcopy(network(torch.float32))
    weights = net.state_dict()
    for seed, name in enumerate(sorted((multiplied if kind == "int8" else packable)(net))):
        put(net, name, PACKED[kind](weights[name], seed))
    check(net, [2, 6], ["chunks of 7"])


@ALL_TYPES
@pytest.mark.end_to_end
def test_pictures_keep_the_bits(dtype: torch.dtype) -> None:
    """A picture is read as a whole, next to text that is read in chunks."""
    net, [text, picture] = network(dtype), made(2, mixed=[(STEPS, None), (STEPS, 2)])
    shown = torch.randn(6, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)

    def seen() -> Request:
        request = picture()
        request.row.prompt[4:10] = [CONFIG.image_id] * 6
        request.row.images = {4: shown}
        return Request(request.row, request.sampling)

    alone = [run(net, [make])[0][0] for make in (text, seen)]
    for options in (ROOMY, OTHERS["chunks of 7"]):
        assert run(net, [text, seen, text, seen], options)[0] == alone * 2
    assert alone[1] != run(net, [picture])[0][0], "it is seen"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.end_to_end
def test_two_dozen_requests_have_the_bits_of_each_alone(dtype: torch.dtype) -> None:
    check(network(dtype), [24], OTHERS if dtype is torch.float32 else [*OTHERS][3:])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no C++", *(level for level in processor().levels if level != isa())])
def test_bits_stay_the_same_at_every_isa_level_and_without_cpp(how: str) -> None:
    code = "from tests.engine import test_same_bits as own; own.compare()"
    chosen = {"BLOCKPRESS_NATIVE": "0"} if how == "no C++" else {"BLOCKPRESS_ISA": how}
    environment = os.environ | chosen | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*python(), "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def compare() -> None:
    """Run in a process of that level."""
    for threads, size, options in ((1, 2, []), (2, 3, ["chunks of 7"])):
        torch.set_num_threads(threads)
        alone_in.cache_clear()
        for dtype in TYPES:
            check(network(dtype), [size], options)
