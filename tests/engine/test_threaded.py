"""The engine on its thread: streams for an event loop and for threads, refusals, cancellation, errors, closing."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from blockpress.config import PRESETS, Sampling
from blockpress.decoding import Committed, Denoised, Done, Event, Failed
from blockpress.engine import EngineCore, EngineOptions, Request, ThreadedEngine
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.errors import EngineError, Overloaded, RequestError
from blockpress.model import Network

from .driver import drive, prompts, reference_reply, reply, row
from .special import damped

pytestmark = pytest.mark.end_to_end

CONFIG = replace(PRESETS["tiny"](), context_length=192)
SHORT = Sampling(steps=4, confidence=0.0)
ROOM = EngineOptions(memory=1 << 22)


@pytest.fixture(scope="module")
def network() -> Network:
    return damped(CONFIG)


def request(index: int, prompt: Sequence[int] = (5, 6, 7), sampling: Sampling = SHORT, **changes: Any) -> Request:
    return Request(row(CONFIG, index, list(prompt), sampling, **changes), sampling)


def test_streams_run_in_an_event_loop(network: Network):
    """Eight at once, each with the tokens of the reference loop; what is streamed arrives while others are still written."""
    given = prompts(CONFIG, 8, 30, seed=0)

    async def one(engine: ThreadedEngine, i: int) -> list[Event]:
        return [event async for event in engine.stream(request(i, given[i]))]

    async def every() -> list[list[Event]]:
        with ThreadedEngine(EngineCore(network, ROOM)) as engine:
            return await asyncio.gather(*(one(engine, i) for i in range(8)))

    for i, events in enumerate(asyncio.run(every())):
        assert reply(events) == reference_reply(network, CONFIG, given[i], i, SHORT)
        assert [type(event) for event in events].count(Committed) == len(
            [e for e in events if isinstance(e, Denoised)]
        ) // 4


def test_one_thread_answers_several_callers(network: Network):
    given, found = prompts(CONFIG, 6, 30, seed=1), {}
    with ThreadedEngine(EngineCore(network, ROOM)) as engine:

        def ask(i: int) -> None:
            found[i] = list(engine.events(request(i, given[i])))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert {i: reply(events) for i, events in found.items()} == {
        i: reference_reply(network, CONFIG, given[i], i, SHORT) for i in range(6)
    }


def test_leaving_a_stream_cancels_its_request(network: Network):
    long = SHORT.with_(steps=40)

    async def leave(engine: ThreadedEngine) -> None:
        async for event in engine.stream(request(0, sampling=long, max_tokens=150)):
            if isinstance(event, Denoised):
                break

    with ThreadedEngine(EngineCore(network, ROOM)) as engine:
        asyncio.run(leave(engine))
        gc.collect()
        after = list(engine.events(request(1)))  # answered behind the cancellation
        assert reply(after) == reference_reply(network, CONFIG, [5, 6, 7], 1, SHORT)
        assert engine.core.scheduler.stats.ended == 2
        engine.core.scheduler.check()


def test_a_full_queue_refuses_by_name(network: Network):
    core = EngineCore(network, replace(ROOM, max_running=1, max_waiting=2))
    requests = [request(i) for i in range(4)]
    for one in requests[:2]:
        core.submit(one)
    with pytest.raises(Overloaded, match="max_waiting is 2"):
        core.submit(requests[2])
    core.step()
    core.submit(requests[3])
    done = []
    while core.busy:
        done += [one for one, event in core.step().events if isinstance(event, Done)]
    assert done == [requests[0], requests[1], requests[3]]


def test_a_refusal_is_raised_where_the_answer_was_awaited(network: Network):
    with ThreadedEngine(EngineCore(network, EngineOptions(memory=1 << 15, max_running=2))) as engine:
        with pytest.raises(RequestError, match="pages hold a context of"):
            list(engine.events(request(0, [5] * 180)))
        assert reply(list(engine.events(request(1)))) == reference_reply(network, CONFIG, [5, 6, 7], 1, SHORT)


def test_an_error_in_one_request_ends_that_one(network: Network, monkeypatch: pytest.MonkeyPatch):
    """A forward that fails is run again one by one; the culprit gets the error, the others their tokens."""
    core = EngineCore(network, ROOM)
    run: Callable[..., Any] = core.runner.run

    def failing(works: Sequence[ScheduledRequest]) -> Any:
        if any(work.request.row.index == 2 and work.request.step == 1 for work in works):
            raise MemoryError("no room for this one")
        return run(works)

    monkeypatch.setattr(core.runner, "run", failing)
    given = prompts(CONFIG, 5, 30, seed=2)
    requests = [request(i, given[i]) for i in range(5)]
    told = drive(core, requests)
    for i, one in enumerate(requests):
        if i == 2:
            assert isinstance(told[one][-1], Failed) and not any(isinstance(event, Done) for event in told[one])
            assert "no room for this one" in told[one][-1].error.message
        else:
            assert reply(told[one]) == reference_reply(network, CONFIG, given[i], i, SHORT)


def test_nan_pages_end_their_request_and_are_not_reused(network: Network):
    """A picture of NaN: the request fails by name, and a later one of the same prompt without it is answered."""
    core = EngineCore(network, ROOM)
    good, bad = request(0, [5] * 30), request(1, [5] * 30)
    bad.row.images = {4: torch.full((6, CONFIG.hidden_size), float("nan"))}
    told = drive(core, [good, bad, request(2, [5] * 30)], arrivals=[0, 0, 9])
    events = list(told.values())
    assert isinstance(events[1][-1], Failed) and "NaN" in events[1][-1].error.message
    for i in (0, 2):
        assert reply(events[i]) == reference_reply(network, CONFIG, [5] * 30, i, SHORT)


def test_closing_ends_running_requests(network: Network):
    engine = ThreadedEngine(EngineCore(network, ROOM))
    events = engine.events(request(0, sampling=SHORT.with_(steps=48), max_tokens=170))
    next(events)
    engine.close()
    assert reply(list(events)).finish_reason == "cancelled"
    with pytest.raises(EngineError, match="closed"):
        engine.events(request(1))


def test_a_broken_core_fails_every_request(network: Network, monkeypatch: pytest.MonkeyPatch):
    others = set(threading.enumerate())
    engine = ThreadedEngine(EngineCore(network, ROOM))

    def broken() -> list[Any]:
        raise RuntimeError("out of order")

    monkeypatch.setattr(engine.core, "step", broken)
    with pytest.raises(EngineError, match="out of order"):
        list(engine.events(request(0)))
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
    with pytest.raises(EngineError, match="out of order"):
        engine.events(request(1))
