"""Whatever goes wrong in one request, outside the forward too, ends that one; callers who are gone are cancelled."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockpress.config import PRESETS, AutoregressiveSampling, Sampling
from blockpress.decoding import Done, Event, Failed
from blockpress.decoding.output import TextOutputProcessor
from blockpress.engine import EngineCore, EngineOptions, Request, ThreadedEngine, modes
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.errors import BlockpressError, RequestError
from blockpress.model import Network

from .driver import AnySampling, drive, reference_reply, reply, row
from .special import damped

pytestmark = pytest.mark.end_to_end

CONFIG = replace(PRESETS["tiny"](), context_length=192)
SHORT = Sampling(steps=4, confidence=0.0)
ROOM = EngineOptions(memory=1 << 22)


@pytest.fixture(scope="module")
def network() -> Network:
    return damped(CONFIG)


class BrokenTurn(TextOutputProcessor):
    """A turn that cannot read what was written, or cannot end."""

    def __init__(self, fails: str) -> None:
        super().__init__(None)

        def fail(*_: Any) -> Any:
            raise ValueError("a turn at fault")

        setattr(self, fails, fail)


def request(index: int, sampling: AnySampling = SHORT, **changes: Any) -> Request:
    return Request(row(CONFIG, index, [5, 6, 7], sampling, **changes), sampling)


@pytest.mark.parametrize("sampling", [SHORT, SHORT.with_(max_verifications=2), AutoregressiveSampling()])
@pytest.mark.parametrize("fails", ["take", "cut"])
def test_a_failing_output_processor_ends_only_its_request(network: Network, sampling: AnySampling, fails: str):
    core = EngineCore(network, ROOM)
    requests = [request(0, sampling), request(1, sampling, processor=BrokenTurn(fails)), request(2, sampling)]
    told = drive(core, requests)
    last = told[requests[1]][-1]
    assert isinstance(last, Failed) and "a turn at fault" in last.error.message
    for i in (0, 2):
        assert reply(told[requests[i]]) == reference_reply(network, CONFIG, [5, 6, 7], i, sampling)
    assert core.stats.failures == 1 and not core.num_tracked


def test_a_failing_cancellation_still_ends_the_request(network: Network):
    core = EngineCore(network, ROOM)
    requests = [request(0, processor=BrokenTurn("finish")), request(1)]
    told = drive(core, requests, cancels={0: 2})
    assert isinstance(told[requests[0]][-1], Failed)
    assert reply(told[requests[1]]) == reference_reply(network, CONFIG, [5, 6, 7], 1, SHORT)


def test_a_sampling_error_ends_only_its_request(network: Network, monkeypatch: pytest.MonkeyPatch):
    sampling, choose = AutoregressiveSampling(), modes.sample_next

    def failing(network: Network, rows: Sequence[Any], *rest: Any) -> Tensor:
        if any(one.index == 1 for one in rows):
            raise ValueError("no token for this one")
        return choose(network, rows, *rest)

    monkeypatch.setattr(modes, "sample_next", failing)
    requests = [request(i, sampling) for i in range(3)]
    told = drive(EngineCore(network, ROOM), requests)
    assert isinstance(told[requests[1]][-1], Failed)
    for i in (0, 2):
        assert reply(told[requests[i]]) == reference_reply(network, CONFIG, [5, 6, 7], i, sampling)


def test_a_failed_forward_s_memory_is_freed_before_the_next(network: Network, monkeypatch: pytest.MonkeyPatch):
    """Else a forward that was too large for the memory would leave no room for the small ones that follow it."""
    core, alive = EngineCore(network, ROOM), set[int]()
    run: Callable[..., Any] = core.runner.run

    class Buffer:
        def __init__(self) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def failing(works: Sequence[ScheduledRequest]) -> Any:
        assert not alive
        buffer = Buffer()
        if len(works) > 1:
            raise MemoryError(f"too many for {type(buffer)}")
        return run(works)

    monkeypatch.setattr(core.runner, "run", failing)
    told = drive(core, [request(0), request(1)])
    assert [reply(events).finish_reason for events in told.values()]


@contextmanager
def held(engine: ThreadedEngine) -> Iterator[None]:
    """The engine's thread waits inside of a forward."""
    inside, go_on = threading.Event(), threading.Event()

    def waits(entropy: Tensor) -> Tensor:
        inside.set()
        assert go_on.wait(20)
        return torch.ones_like(entropy, dtype=torch.bool)

    engine.submit(request(9, SHORT.with_(accept=waits)), lambda event: None)
    assert inside.wait(20)
    yield
    go_on.set()


def test_a_refused_request_does_not_hold_up_others(network: Network):
    """Submitted twice: refused by name; the first submission, and whoever came behind, get their answers."""
    with ThreadedEngine(EngineCore(network, ROOM)) as engine:
        one, other = request(0), request(1)
        with held(engine):  # so that all three are taken in at once
            first, again, behind = engine.events(one), engine.events(one), engine.events(other)
        with pytest.raises(RequestError, match="not taken"):
            next(again)
        assert isinstance(list(behind)[-1], Done) and isinstance(list(first)[-1], Done)


def test_a_dropped_event_iterator_cancels_its_request(network: Network):
    long = SHORT.with_(steps=48)
    with ThreadedEngine(EngineCore(network, ROOM)) as engine:
        left = request(0, long, max_tokens=170)
        with held(engine):
            engine.events(left)
            gc.collect()
        assert isinstance(list(engine.events(request(1)))[-1], Done)
        assert left.row.finish_reason == "cancelled"


def test_a_failing_callback_cancels_only_its_request(network: Network):
    def deaf(_: Event | BlockpressError) -> None:
        raise OSError("nobody there")

    with ThreadedEngine(EngineCore(network, ROOM)) as engine:
        left = request(0, SHORT.with_(steps=48), max_tokens=170)
        engine.submit(left, deaf)
        assert reply(list(engine.events(request(1)))) == reference_reply(network, CONFIG, [5, 6, 7], 1, SHORT)
    assert left.row.finish_reason == "cancelled"


def test_an_engine_sizes_itself_on_other_devices():
    assert EngineCore(damped(CONFIG).to("meta")).stats.page_bytes > 0


def test_a_canvas_that_was_stepped_is_not_rerun_after_a_failure(network: Network, monkeypatch: pytest.MonkeyPatch):
    """The forward fails behind the step: another run would take one step more, so the canvases fail by name."""
    core, calls = EngineCore(network, ROOM), list[int]()

    def failing(words: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room for the copy back")
        return words

    monkeypatch.setattr("blockpress.engine.runner.to_host", failing)
    canvases, token = [request(0), request(1)], request(2, AutoregressiveSampling())
    told = drive(core, [*canvases, token])
    for one in canvases:
        last = told[one][-1]
        assert isinstance(last, Failed) and "copy back" in last.error.message
    assert reply(told[token]) == reference_reply(network, CONFIG, [5, 6, 7], 2, AutoregressiveSampling())
