"""The engine that a model keeps: what it has read is not read again, callers share it, and it is given back on request."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import blockpress
from blockpress.config import PRESETS, GenerationConfig, Sampling
from blockpress.decoding import Denoised, Done, Event, Reply
from blockpress.engine import EngineCore, EngineOptions
from blockpress.engine.core import EngineStats
from blockpress.engine.kv_cache import KVCache
from blockpress.errors import EngineError, RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from tests.engine.special import damped

CONFIG = replace(PRESETS["tiny"](), context_length=192)
SAMPLING = Sampling(steps=4, confidence=0.0)
PROMPTS = [[5 + i, *range(3, 3 + 9 * i)] for i in range(1, 7)]


def make(**options: int) -> LM:
    generation = GenerationConfig(sampling=SAMPLING, stop_ids=(1,))
    limits = EngineOptions(**{"memory": 1 << 23, **options})
    return LM(path=Path("x"), network=damped(CONFIG), generation=generation, tokenizer=None, options=limits)


@pytest.fixture
def lm() -> Iterator[LM]:
    with make() as lm:
        yield lm


@pytest.fixture(scope="module")
def alone() -> list[Reply]:
    lm = make()
    lm.answer = run_reference
    return [lm.generate(prompt, max_tokens=40, seed=3) for prompt in PROMPTS]


def stats(lm: LM) -> EngineStats:
    found = lm.engine.stats
    assert found is not None
    return found


def held(lm: LM) -> int:
    return sum(pages.held for pages in stats(lm).scheduler.pages.values())


def test_the_engine_is_made_for_the_first_event(lm: LM):
    assert lm.engine.stats is None
    stream = lm.stream(PROMPTS[0], max_tokens=4)
    assert lm.engine.stats is None
    next(stream)
    assert stats(lm).forwards == 1


def test_a_conversation_reuses_its_prefix_and_answers_the_same(lm: LM):
    """Each turn begins with all that was said before it; only what is behind the last whole page is read."""
    prompt, page = PROMPTS[2], CONFIG.canvas_length
    for turn in range(4):
        before = stats(lm).scheduler.reused_tokens if turn else 0
        reply = lm.generate(prompt, max_tokens=20, seed=turn)
        fresh = make()
        assert reply == fresh.generate(prompt, max_tokens=20, seed=turn)
        if turn:
            known = stats(lm).scheduler.reused_tokens - before
            assert known % page == 0 and known >= len(prompt) - 3 * page > 0
        prompt = [*prompt, *reply.tokens, 9, 8, 7]
    assert stats(lm).scheduler.ended == 4 and held(lm) == 0


def test_threads_share_the_engine(lm: LM, alone: list[Reply]):
    ready = threading.Barrier(len(PROMPTS))

    def ask(prompt: list[int]) -> Reply:
        ready.wait()
        return lm.generate(prompt, max_tokens=40, seed=3)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask, PROMPTS)) == alone
    assert stats(lm).scheduler.submitted == len(PROMPTS)


def test_one_forward_serves_all_waiting_callers(lm: LM, alone: list[Reply]):
    """Two streams read in turn: each forward serves both."""
    streams = [lm.stream(prompt, max_tokens=40, seed=3) for prompt in PROMPTS[:2]]
    replies: dict[int, Reply] = {}
    while len(replies) < 2:
        for number, stream in enumerate(streams):
            event = next(stream, None)
            if isinstance(event, Done):
                replies[number] = event.reply
    assert [replies[0], replies[1]] == alone[:2]
    assert stats(lm).forwards < sum(reply.usage.forwards for reply in alone[:2])


def test_leaving_early_ends_the_work(lm: LM, alone: list[Reply]):
    for event in lm.stream(PROMPTS, max_tokens=40):
        if isinstance(event, Denoised) and event.step == 2:
            break
    assert lm.generate(PROMPTS[1], max_tokens=40, seed=3) == alone[1]
    assert stats(lm).scheduler.running == 0 and held(lm) == 0
    assert not lm.engine._current[1]._inboxes  # type: ignore[index]


@pytest.mark.slow
def test_a_stream_that_is_collected_inside_a_forward_does_not_block(lm: LM, alone: list[Reply]):
    """Garbage is collected where it pleases the interpreter: here by a rule in the middle of a step, under the lock."""
    other: list[Iterator[Event]] = [lm.stream(PROMPTS[0], max_tokens=40)]
    next(other[0])

    def drops(entropy: Tensor) -> Tensor:
        other.clear()
        gc.collect()
        return torch.ones_like(entropy, dtype=torch.bool)

    done = threading.Event()

    def ask() -> None:
        lm.generate(PROMPTS[1], max_tokens=8, sampling=SAMPLING.with_(accept=drops))
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(60), "the stream waits for a lock that its own thread holds"
    assert lm.generate(PROMPTS[2], max_tokens=40, seed=3) == alone[2] and held(lm) == 0


def test_a_failure_ends_only_its_call(lm: LM, alone: list[Reply]):
    def broken(entropy: Tensor) -> Tensor:
        raise ValueError("a rule at fault")

    stream = lm.stream(PROMPTS[0], max_tokens=40, seed=3)
    events = [next(stream)]
    with pytest.raises(EngineError, match="a rule at fault"):
        lm.generate(PROMPTS[1:3], max_tokens=40, sampling=SAMPLING.with_(accept=broken))
    events += stream
    assert isinstance(events[-1], Done) and events[-1].reply == alone[0]
    assert lm.generate(PROMPTS[1], max_tokens=40, seed=3) == alone[1] and held(lm) == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_what_a_rule_raises_reaches_its_own_call_only(lm: LM, alone: list[Reply], kind: type[BaseException]):
    """Whoever runs the forward; an interrupt reaches the call as what it is."""

    def raises(entropy: Tensor) -> Tensor:
        raise kind("on purpose")

    stream = lm.stream(PROMPTS[0], max_tokens=40, seed=3)
    events = [next(stream)]
    bad = lm.stream(PROMPTS[1], sampling=SAMPLING.with_(accept=raises))
    with ThreadPoolExecutor(1) as other:
        expected = kind if kind in (KeyboardInterrupt, SystemExit) else EngineError
        with pytest.raises(expected, match="on purpose"):
            other.submit(list, bad).result()
    events += stream
    assert isinstance(events[-1], Done) and events[-1].reply == alone[0]
    assert lm.generate(PROMPTS[1], max_tokens=40, seed=3) == alone[1] and held(lm) == 0


def test_a_model_that_is_asked_inside_its_own_forward_refuses(lm: LM, alone: list[Reply]):
    found: list[str] = []

    def asks(entropy: Tensor) -> Tensor:
        for call in (lambda: lm.generate(PROMPTS[0]), lambda: lm.engine.stats, lm.close):
            with pytest.raises(EngineError, match="inside of its own forward") as caught:
                call()
            found.append(caught.value.message)
        return torch.ones_like(entropy, dtype=torch.bool)

    lm.generate(PROMPTS[1], max_tokens=8, sampling=SAMPLING.with_(accept=asks, steps=1))
    assert len(found) >= 3 and lm.generate(PROMPTS[0], max_tokens=40, seed=3) == alone[0]


def test_a_request_is_answered_once(lm: LM, alone: list[Reply]):
    """By the engine and by the reference loop; the refused call cancels nobody's."""
    requests = lm.build_requests(PROMPTS[0], max_tokens=40, seed=3)
    stream = lm.answer(lm.network, requests, None)
    events = [next(stream)]
    for again in (lm.answer, run_reference):
        with pytest.raises(RequestError, match="was not taken"):
            list(again(lm.network, requests, None))
    events += stream
    assert isinstance(events[-1], Done) and events[-1].reply == alone[0]


def test_what_breaks_the_engine_is_told_to_all_and_the_next_call_has_another(
    lm: LM, alone: list[Reply], monkeypatch: pytest.MonkeyPatch
):
    def breaks(self: EngineCore) -> None:
        raise MemoryError("on purpose")

    streams = [lm.stream(prompt) for prompt in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    monkeypatch.setattr(EngineCore, "step", breaks)
    for stream in streams:
        with pytest.raises(EngineError, match="the engine broke: MemoryError: on purpose") as caught:
            list(stream)
        assert isinstance(caught.value.__cause__, MemoryError)
    monkeypatch.undo()
    assert lm.generate(PROMPTS[0], max_tokens=40, seed=3) == alone[0]


def test_changed_weights_do_not_use_old_pages(lm: LM):
    prompt = PROMPTS[5]
    before = lm.generate(prompt, max_tokens=20)
    with torch.no_grad():
        lm.network.layers[0].self_attn.v_proj.weight.mul_(-1.5)
    after = lm.generate(prompt, max_tokens=20)
    lm.close()
    assert after == lm.generate(prompt, max_tokens=20) != before


def stores() -> int:
    """How many caches there are in this process."""
    gc.collect()
    return sum(type(each) is KVCache for each in gc.get_objects())


@pytest.mark.slow
def test_closing_frees_memory_and_the_model_can_be_used_again(alone: list[Reply]):
    before = stores()
    with make() as lm:
        assert lm.generate(PROMPTS[0], max_tokens=40, seed=3) == alone[0]
        assert stores() == before + 1
        stream = lm.stream(PROMPTS[1], max_tokens=40)
        next(stream)
    assert stores() == before and lm.engine.stats is None
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    assert lm.generate(PROMPTS[1], max_tokens=40, seed=3) == alone[1]
    lm.close()
    lm.close()


def test_more_prompts_than_run_at_once_take_turns(alone: list[Reply]):
    with make(max_running=2, max_waiting=100) as lm:
        assert lm.generate(PROMPTS, max_tokens=40, seed=3) == alone
        assert stats(lm).scheduler.submitted == len(PROMPTS)


def test_load_sets_the_engine_s_limits():
    with blockpress.load("sudoku-nano", memory=1 << 22, max_running=3) as lm:
        assert (lm.engine.options.memory, lm.engine.options.max_running) == (1 << 22, 3)
        lm.generate([2, *[9] * 90], max_tokens=90, sampling=Sampling(steps=1))
        assert stats(lm).page_bytes <= 1 << 22
    for name, value in (("memory", 0), ("memory", "1G"), ("max_running", 0), ("max_running", True)):
        with pytest.raises(RequestError, match=f"engine option {name} is {value!r}"):
            blockpress.load("sudoku-nano", **{name: value})
