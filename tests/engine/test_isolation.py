"""What one caller hands in, raises or does reaches no other caller; what ends the engine is told to all."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockpress.config import PRESETS, AutoregressiveSampling, Sampling
from blockpress.decoding import Done, Event, Failed
from blockpress.engine import EngineCore, EngineOptions, Request, ThreadedEngine
from blockpress.errors import BlockpressError, EngineError, Overloaded, RequestError
from blockpress.model import Network

from .driver import AnySampling, drive, reference_reply, reply, row
from .special import damped
from .test_faults import BrokenTurn, held

pytestmark = pytest.mark.end_to_end

CONFIG = replace(PRESETS["tiny"](), context_length=192)
SHORT = Sampling(steps=3, confidence=0.0)
LONG = SHORT.with_(steps=48)
ROOM = EngineOptions(memory=1 << 22)


class Odd(BaseException):
    """What is no `Exception`, and of nobody's kind."""


class Mute(Exception):
    """What cannot say what it is."""

    def __str__(self) -> str:
        raise SystemExit("on purpose")


RAISED = [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, Odd, OSError]


@pytest.fixture(scope="module")
def network() -> Network:
    return damped(CONFIG)


@pytest.fixture
def engine(network: Network) -> Iterator[ThreadedEngine]:
    with ThreadedEngine(EngineCore(network, ROOM)) as engine:
        yield engine


def request(index: int, sampling: AnySampling = SHORT, **changes: Any) -> Request:
    return Request(row(CONFIG, index, [5, 6, 7], sampling, **{"max_tokens": 9, **changes}), sampling)


def right(network: Network, index: int, sampling: AnySampling = SHORT) -> Any:
    return reference_reply(network, CONFIG, [5, 6, 7], index, sampling, max_tokens=9)


def raising(kind: type[BaseException]) -> Callable[..., Any]:
    def fails(*_: Any) -> Any:
        raise kind("on purpose")

    return fails


def test_a_request_that_is_handed_in_twice_is_answered_once(network: Network, engine: ThreadedEngine):
    """The second is refused by name, while the first runs and after it has ended, and its clean-up cancels nobody."""
    one = request(0)
    first = engine.events(one)
    with pytest.raises(RequestError, match="submitted before"):
        list(engine.events(one))
    assert reply(list(first)) == right(network, 0)
    with pytest.raises(RequestError, match="submitted before"):
        list(engine.events(one))


def test_two_engines_and_two_requests_of_one_row_do_not_share_it(network: Network, engine: ThreadedEngine):
    one = request(0)
    first = engine.events(one)
    next(first)
    other = EngineCore(network, ROOM)
    for again in (one, Request(one.row, SHORT)):
        with pytest.raises(RequestError, match="submitted before"):
            other.submit(again)
        other.cancel(again)
    assert not other.busy and isinstance(list(first)[-1], Done)


def test_one_core_has_one_engine_at_a_time(network: Network):
    core = EngineCore(network, ROOM)
    with ThreadedEngine(core), pytest.raises(EngineError, match="another engine runs this core"):
        ThreadedEngine(core)
    with ThreadedEngine(core) as engine:
        assert reply(list(engine.events(request(0)))) == right(network, 0)


def test_equal_indices_are_different_requests(network: Network, engine: ThreadedEngine):
    assert [reply(list(events)) for events in [engine.events(request(0)) for _ in range(3)]] == 3 * [right(network, 0)]


def test_an_overloaded_request_may_be_submitted_again(network: Network):
    core = EngineCore(network, replace(ROOM, max_running=1, max_waiting=1))
    first, second = request(0), request(1)
    core.submit(first)
    with pytest.raises(Overloaded):
        core.submit(second)
    while core.busy:
        core.step()
    assert reply(drive(core, [second])[second]) == right(network, 1)


@pytest.mark.parametrize("kind", RAISED)
def test_whatever_a_callback_raises_cancels_its_request_only(
    network: Network, engine: ThreadedEngine, kind: type[BaseException], caplog: pytest.LogCaptureFixture
):
    left = request(0, LONG, max_tokens=170)
    engine.submit(left, raising(kind))
    assert reply(list(engine.events(request(1)))) == right(network, 1)
    assert left.row.finish_reason == "cancelled" and kind.__name__ in caplog.text


@pytest.mark.parametrize("handler", [None, SystemExit])
def test_what_cannot_be_logged_or_told_ends_its_request_only(
    network: Network, engine: ThreadedEngine, handler: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
):
    """A callback's or a rule's exception without a text, and a program's own handler of the log that raises."""
    if handler is not None:
        monkeypatch.setattr(logging.getLogger("blockpress.engine.threaded"), "warning", raising(handler))
    left, bad = request(0, LONG, max_tokens=170), request(2, SHORT.with_(accept=raising(Mute)))
    engine.submit(left, raising(Mute))
    failed, right_one = engine.events(bad), engine.events(request(1))
    last = list(failed)[-1]
    assert isinstance(last, Failed) and "Mute, which cannot be shown" in last.error.message
    assert reply(list(right_one)) == right(network, 1)
    assert left.row.finish_reason == "cancelled"


@pytest.mark.parametrize("odd", [None, 5, [], {}, "a request", Request])
def test_what_is_no_request_is_refused_where_it_is_handed_in(network: Network, engine: ThreadedEngine, odd: Any):
    """What cannot be hashed among it: looked up by the worker, it ended every answer."""
    one = engine.events(request(0))
    core = EngineCore(network, ROOM)
    for take in (engine.events, engine.cancel, lambda odd: engine.submit(odd, print), core.submit, core.cancel):
        with pytest.raises(RequestError, match="request is"):
            take(odd)
    with pytest.raises(RequestError, match="deliver is"):
        engine.submit(request(1), odd if not callable(odd) else "print")
    assert reply(list(one)) == right(network, 0)


@pytest.mark.parametrize("kind", RAISED)
@pytest.mark.parametrize("name", ["accept", "settle"])
def test_whatever_a_rule_raises_ends_its_request_only(network: Network, name: str, kind: type[BaseException]):
    """In the main thread too, with Ctrl-C's own exception; the error names it and has it as its cause."""
    bad = SHORT.with_(**{name: raising(kind)})
    requests = [request(0), request(1, bad), request(2)]
    told = drive(EngineCore(network, ROOM), requests)
    last = told[requests[1]][-1]
    assert isinstance(last, Failed) and f"{kind.__name__}: on purpose" in last.error.message
    assert type(last.error.__cause__) is kind
    assert [reply(told[requests[i]]) for i in (0, 2)] == [right(network, i) for i in (0, 2)]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Odd])
@pytest.mark.parametrize("sampling", [SHORT, AutoregressiveSampling()])
def test_whatever_an_output_processor_raises_ends_its_request_only(
    network: Network, sampling: AnySampling, kind: type[BaseException]
):
    broken = BrokenTurn("take")
    broken.take = raising(kind)  # type: ignore[method-assign]
    requests = [request(0, sampling), request(1, sampling, processor=broken)]
    told = drive(EngineCore(network, ROOM), requests)
    assert isinstance(told[requests[1]][-1], Failed)
    assert reply(told[requests[0]]) == right(network, 0, sampling)


@pytest.mark.parametrize(
    "gives",
    [
        lambda entropy: None,
        lambda entropy: entropy.isnan(),
        lambda entropy: entropy * torch.nan,
        lambda entropy: entropy[:, :3] > 0,
        lambda entropy: (entropy > 0).to("meta"),
        lambda entropy: (entropy > 0).tolist(),
        lambda entropy: entropy.zero_() > 0,
    ],
)
def test_whatever_a_rule_returns_concerns_its_request_only(network: Network, gives: Callable[[Tensor], Any]):
    requests = [request(0), request(1, SHORT.with_(accept=gives))]
    told = drive(EngineCore(network, ROOM), requests)
    assert reply(told[requests[0]]) == right(network, 0)
    assert isinstance(told[requests[1]][-1], Done | Failed)


def test_what_a_caller_changes_afterwards_reaches_nobody(network: Network):
    """The fields, lists and tensors of a request that was handed in; its images are cached for others, as they were."""
    features = torch.randn(6, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    core, bad, other, later = EngineCore(network, ROOM), request(0), request(1), request(2)
    for one in (bad, later):
        one.row.prompt[:] = one.context[:] = [5] * 30
        one.row.images = {4: features.clone()}
    expected = reference_reply(network, CONFIG, [5] * 30, 2, SHORT, max_tokens=9, images={4: features})
    core.submit(bad)
    core.submit(other)
    bad.row.images[4].zero_()
    bad.row.images = {}
    bad.row.prompt.clear()
    bad.context[:], bad.tables, bad.slot, bad.step = [10**9], {}, 77, -3
    bad.state, bad.num_computed_tokens, bad.sampling = "ended", 10**6, AutoregressiveSampling()
    told: dict[Request, list[Event]] = {one: [] for one in (bad, other, later)}
    core.submit(later)
    while core.busy:
        for one, event in core.step().events:
            told[one].append(event)
        core.scheduler.check()
    assert reply(told[other]) == right(network, 1)
    assert reply(told[later]) == expected
    assert isinstance(told[bad][-1], Done | Failed)


def test_a_callback_may_use_the_engine_but_not_wait_for_it(network: Network, engine: ThreadedEngine):
    """From inside: another request, the end of one, an answer waited for (refused by name), and the engine's end."""
    found: list[Any] = []
    ended, other = threading.Event(), request(1)

    def note(event: Event | BlockpressError) -> None:
        found.append(event)
        if isinstance(event, Done):
            engine.close()
            ended.set()

    def uses(event: Event | BlockpressError) -> None:
        if isinstance(event, Done):
            with pytest.raises(EngineError, match="own thread"):
                next(engine.events(request(2)))
            engine.cancel(request(3))
            engine.submit(other, note)

    engine.submit(request(0), uses)
    assert ended.wait(60)
    assert reply(found) == right(network, 1)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(request(4), note)


def test_a_cancelled_task_and_a_closed_loop_cancel_their_requests_only(network: Network, engine: ThreadedEngine):
    async def read(one: Request) -> None:
        async for _ in engine.stream(one):
            pass

    async def cancelled() -> None:
        task = asyncio.create_task(read(left[0]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    left = [request(i, LONG, max_tokens=170) for i in range(2)]
    asyncio.run(cancelled())
    loop = asyncio.new_event_loop()
    stream = engine.stream(left[1])
    with held(engine):
        task = loop.create_task(stream.__anext__())  # type: ignore[arg-type]
        loop.run_until_complete(asyncio.sleep(0.01))
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()
    assert reply(list(engine.events(request(3)))) == right(network, 3)
    assert [one.row.finish_reason for one in left] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, MemoryError, Odd])
def test_what_ends_the_worker_is_told_to_all(
    network: Network, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    """To those who wait, in the queue too, and to those who come later; each gets an error of its own with the cause."""
    engine = ThreadedEngine(EngineCore(network, ROOM))
    waiting = []
    with held(engine):
        waiting = [engine.events(request(i)) for i in range(3)]
        monkeypatch.setattr(engine.core, "step", raising(kind))
    errors = []
    for events in waiting:
        with pytest.raises(EngineError, match=f"the engine broke: {kind.__name__}: on purpose") as caught:
            list(events)
        errors.append(caught.value)
    engine._worker.join(20)
    with pytest.raises(EngineError, match=kind.__name__) as caught:
        engine.events(request(7))
    assert len({id(error) for error in (*errors, caught.value)}) == 4
    assert all(type(error.__cause__) is kind for error in (*errors, caught.value))
    engine.close()


@pytest.mark.parametrize("sampling", [SHORT, SHORT.with_(max_verifications=1), AutoregressiveSampling()])
def test_an_interrupted_forward_is_run_again(network: Network, sampling: AnySampling, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C is raised from `step`; who goes on stepping gets every answer as if nothing had been."""
    core, requests, calls = EngineCore(network, ROOM), [request(i, sampling) for i in range(2)], list[int]()
    run = network.run

    def interrupted(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) % 2:
            raise KeyboardInterrupt
        return run(*given, **more)

    monkeypatch.setattr(network, "run", interrupted)
    told: dict[Request, list[Event]] = {one: [] for one in requests}
    for one in requests:
        core.submit(one)
    while core.busy:
        try:
            events = core.step().events
        except KeyboardInterrupt:
            continue
        for one, event in events:
            told[one].append(event)
    monkeypatch.undo()
    assert [reply(told[one]) for one in requests] == [right(network, i, sampling) for i in range(2)]


def test_what_an_interrupt_cannot_repeat_is_told(network: Network, monkeypatch: pytest.MonkeyPatch):
    """Canvases have moved on to their next step when it comes: their requests end, and the engine goes on."""
    core, requests = EngineCore(network, ROOM), [request(i) for i in range(2)]
    for one in requests:
        core.submit(one)
    monkeypatch.setattr("blockpress.engine.runner.to_host", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        core.step()
    monkeypatch.undo()
    assert [type(event) for _, event in core.step().events] == [Failed, Failed]
    assert reply(drive(core, [after := request(5)])[after]) == right(network, 5)
    assert core.stats.failures == 2 and not core.num_tracked and not core._copies
