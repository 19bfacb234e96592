"""Requests come, are cancelled, fail and end at random over pools that are too small, and nothing is lost.

The heart: whatever was reused, evicted, dropped or read again, every token sees exactly its own context (`simulator.py`).
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request
from blockpress.errors import Overloaded, RequestError
from tests.conftest import num_examples
from tests.engine.simulator import KINDS, PAGE, Simulator, ask, is_judged, small

PICTURE = 63
STEMS = [
    [10 + i for i in range(40)],
    [10 + i for i in range(12)] + [3] * 28,
    [10, 11, 12] + [PICTURE] * 7 + [20 + i for i in range(14)] + [PICTURE] * 3 + [40] * 13,
]
SHOWN = ((3, 7), (24, 3))
"""Where the pictures of the last stem are, and how long."""


class Crowd(RuleBasedStateMachine):
    """Rules are what callers do; the invariants hold after each."""

    @initialize(
        kinds=st.sampled_from(["both", "both", "both", "sliding", "full"]),
        counts=st.tuples(st.integers(4, 12), st.integers(4, 16)),
        options=st.builds(
            EngineOptions,
            max_running=st.integers(1, 4),
            max_waiting=st.integers(1, 5),
            chunk=st.integers(1, 9),
            prefill_tokens=st.integers(1, 16),
            reuse_prefixes=st.sampled_from([True, True, True, False]),
        ),
        window=st.integers(1, 14),
    )
    def begin(self, kinds: str, counts: tuple[int, int], options: EngineOptions, window: int) -> None:
        pages = {kind: counts[kind == "full_attention"] for kind in KINDS[kinds]}
        self.simulator = Simulator(small(window), options, pages)
        self.live: list[Request] = []
        self.submitted: list[Request] = []

    @rule(
        stem=st.sampled_from([0, 0, 0, 1, 2, 2]),
        length=st.sampled_from([1, 3, 4, 5, 8, 11, 12, 13, 16, 21, 24, 26, 28, 33, 36, 40]),
        ending=st.lists(st.integers(2, 3), max_size=3),
        shown=st.tuples(st.sampled_from([b"sun", b"moon"]), st.sampled_from([b"sun", b"moon"])),
        speaks=st.sampled_from(["diffusion", "diffusion", "autoregressive", "checked"]),
    )
    def submit(self, stem: int, length: int, ending: list[int], shown: tuple[bytes, bytes], speaks: str) -> None:
        pictures: tuple[HashedImageSpan, ...] = ()
        if STEMS[stem][3] == PICTURE:
            pictures = tuple(HashedImageSpan(*at, digest) for at, digest in zip(SHOWN, shown, strict=True))
            pictures = tuple(one for one in pictures if one.start < length)
            length = max([length, *(one.stop for one in pictures)])
        request = ask([*STEMS[stem][:length], *ending], speaks, pictures)
        self.offer(request, sum(one.state == "waiting" for one in self.live))

    def offer(self, request: Request, waits: int) -> None:
        """It is taken, unless the queue is full or no pool could ever hold its prompt."""
        scheduler, prompt = self.simulator.scheduler, len(request.context)
        full = scheduler.stats.pages.get("full_attention")
        lacking = PAGE if request.num_logit_tokens and request.mode == "diffusion" else 0
        if full is not None and prompt + lacking > full.total * PAGE:
            with pytest.raises(RequestError, match="memory"):
                scheduler.submit(request)
        elif waits >= self.simulator.options.max_waiting:
            with pytest.raises((Overloaded, RequestError)):
                scheduler.submit(request)
        else:
            try:
                scheduler.submit(request)
            except RequestError:  # a picture, or a part, that is longer than all sliding pages
                sliding = scheduler.stats.pages["sliding_attention"]
                assert prompt + lacking > sliding.total * PAGE
                return
            self.live.append(request)
            self.submitted.append(request)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        request = self.live[which % len(self.live)]
        self.simulator.scheduler.cancel(request)
        assert request.state == "ended"

    @precondition(lambda self: self.live)
    @rule(seed=st.integers(0, 2**16))
    def step(self, seed: int) -> None:
        self.forward(random.Random(seed), ending=0.1)

    @precondition(lambda self: self.live)
    @rule(seed=st.integers(0, 2**16))
    def steps(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(8):
            self.forward(chance, ending=0.1)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def fail(self, which: int) -> None:
        """A forward in which one request's numbers turn out to be none: its part is never booked."""
        works = self.simulator.scheduler.schedule()
        for work in works:
            self.simulator.write(work)
        bad = works[which % len(works)].request
        for work in works:
            self.simulator.look(work)
        self.simulator.scheduler.end(bad, discard=True)
        for work in works:
            if not is_judged(work):
                self.simulator.scheduler.mark_computed(work)
            if work.request is not bad:
                self.simulator.take(work, random.Random(which))

    def forward(self, chance: random.Random, ending: float) -> None:
        oldest = min((one for one in self.live if one.state != "ended"), key=lambda one: one.number, default=None)
        works = self.simulator.forward()
        if oldest is not None:
            assert works[0].request is oldest, "the oldest does not go on"
        for work in works:
            self.simulator.take(work, chance, ending)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "simulator"):
            self.live = [one for one in self.live if one.state != "ended"]
            self.simulator.scheduler.check()
            stats = self.simulator.scheduler.stats
            assert stats.running + stats.waiting == len(self.live)
            assert (stats.submitted, stats.ended) == (len(self.submitted), len(self.submitted) - len(self.live))

    def teardown(self) -> None:
        """Everything is answered, and nothing is left allocated."""
        if not hasattr(self, "simulator"):
            return
        chance = random.Random(0)
        for _ in range(5000):
            if not any(one.state != "ended" for one in self.submitted):
                break
            self.forward(chance, ending=0.5)
        assert {one.state for one in self.submitted} <= {"ended"}
        assert self.simulator.scheduler.schedule() == []
        self.simulator.scheduler.check()
        stats = self.simulator.scheduler.stats
        assert (stats.running, stats.waiting) == (0, 0)
        assert [pages.held for pages in stats.pages.values()] == [0] * len(stats.pages)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=num_examples(60), stateful_step_count=40)


def test_the_random_load_preempts_evicts_and_reuses() -> None:
    """What the machine is for does happen in such pools: pauses, evictions, reuse; otherwise it would prove nothing."""
    simulator = Simulator(small(), EngineOptions(max_running=4, chunk=6), dict.fromkeys(KINDS["both"], 12))
    chance = random.Random(1)
    requests = [ask(STEMS[number % 2][: 9 + 5 * (number % 5)]) for number in range(24)]
    for request in requests:
        simulator.scheduler.submit(request)
    while simulator.scheduler.running or simulator.scheduler.waiting:
        for work in simulator.forward():
            simulator.take(work, chance, ending=0.05)
    stats = simulator.scheduler.stats
    assert stats.preemptions > 3
    assert stats.reused_tokens > 40
    assert all(pages.evicted > 10 for pages in stats.pages.values())
    assert stats.ended == 24


@pytest.mark.parametrize("reuse", [True, False])
def test_scheduling_is_deterministic(reuse: bool) -> None:
    def plans() -> list[tuple[int, int, int, bool]]:
        options = EngineOptions(max_running=3, chunk=6, reuse_prefixes=reuse)
        simulator, chance, made = Simulator(small(), options, dict.fromkeys(KINDS["both"], 12)), random.Random(2), []
        for number in range(12):
            simulator.scheduler.submit(ask(STEMS[0][: 3 * number + 1]))
        while simulator.scheduler.running or simulator.scheduler.waiting:
            for work in simulator.forward():
                made.append((work.request.number, work.start, work.stop, work.canvas))
                simulator.take(work, chance)
        return made

    assert plans() == plans()
