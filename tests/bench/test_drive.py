"""A run is recorded as it was: every row in the forward that had it, every count what the replies say."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from blockpress import costs
from blockpress.bench.drive import BenchRun, Stepper, drive
from blockpress.bench.measure import run_bench
from blockpress.bench.report import report
from blockpress.bench.steppers import EngineStepper, ReferenceStepper
from blockpress.bench.subject import Subject, randomised, shape_named, stored_formats, weight_bytes
from blockpress.bench.workload import Workload, arrivals, requests
from blockpress.decoding import Event
from blockpress.engine import Request
from blockpress.engine.runner import Runner
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.errors import BlockpressError, Overloaded, RequestError
from blockpress.hardware import Peak

CPU = torch.device("cpu")
MACHINE = costs.Device(name="a machine", bandwidth=1e9, rates={"float32": 1e9}, memory=1 << 30)
PROMPT, ROWS, STEPS = 10, 3, 4


@pytest.fixture(scope="module")
def tiny_subject() -> Subject:
    return randomised("tiny", shape_named("tiny"))


def ran(subject: Subject, work: Workload, kind: str) -> BenchRun:
    stepper: Stepper = (
        EngineStepper(subject.network, running=work.running) if kind == "engine" else ReferenceStepper(subject.network)
    )
    return drive(stepper, work, requests(subject, work), CPU)


@pytest.mark.parametrize("kind", ["reference", "engine"])
def test_every_canvas_step_and_commit_is_counted_in_its_forward(tiny_subject: Subject, kind: str) -> None:
    canvas = tiny_subject.config.canvas_length
    work = Workload(batch=ROWS, prompt_len=PROMPT, max_tokens=2 * canvas, steps=STEPS)
    run = ran(tiny_subject, work, kind)
    rows = [forward.rows for forward in run.forwards]
    first, commit = ((0, PROMPT),) * ROWS, ((PROMPT, canvas),) * ROWS
    assert [one.prefills for one in rows] == [first, *[()] * (STEPS - 1), commit, *[()] * (STEPS - 1)]
    assert [one.canvases for one in rows] == [(PROMPT,) * ROWS] * STEPS + [(PROMPT + canvas,) * ROWS] * STEPS
    assert [forward.prefill for forward in run.forwards] == [True] + [False] * (2 * STEPS - 1)
    assert [forward.tokens for forward in run.forwards] == ([0] * (STEPS - 1) + [ROWS * canvas]) * 2


@pytest.mark.parametrize("kind", ["reference", "engine"])
def test_every_autoregressive_token_is_counted_in_its_forward(tiny_subject: Subject, kind: str) -> None:
    work = Workload(mode="autoregressive", batch=ROWS, prompt_len=PROMPT, max_tokens=5)
    run = ran(tiny_subject, work, kind)
    assert [forward.rows.logit_rows for forward in run.forwards] == [((PROMPT - 1 + i, 1),) * ROWS for i in range(5)]
    assert [forward.rows.prefills for forward in run.forwards] == [((0, PROMPT - 1),) * ROWS] + [()] * 4


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_engine_and_reference_loop_give_the_same_answers(tiny_subject: Subject, mode: str) -> None:
    # Few steps: each makes a difference of rounding some 1.5 times as large in a network of random weights.
    steps = STEPS if mode == "diffusion" else None
    work = Workload(mode=mode, batch=ROWS, prompt_len=PROMPT, max_tokens=20, steps=steps, seed=5)  # type: ignore[arg-type]
    said = []
    for kind in ("reference", "engine"):
        asked = sorted(ran(tiny_subject, work, kind).traces, key=lambda one: one.request.row.index)
        said.append([one.reply.tokens for one in asked if one.reply is not None])
    assert said[0] == said[1] and len(said[0]) == ROWS


def test_the_report_counts_what_the_replies_say(tiny_subject: Subject) -> None:
    work = Workload(batch=2, requests=5, prompt_len=PROMPT, max_tokens=30, steps=STEPS)
    run = ran(tiny_subject, work, "engine")
    found = report(tiny_subject, work, run, MACHINE)
    canvases = 5 * 3
    assert (found.answered, found.tokens, found.canvases, found.steps) == (5, 150, canvases, STEPS * canvases)
    assert (found.failed, found.refused) == (0, 0)
    assert sum(len(forward.rows.canvases) for forward in run.forwards) == found.steps
    assert max(len(forward.rows.canvases) for forward in run.forwards) == 2
    assert found.steps_per_canvas.mean == found.steps_per_canvas.p95 == STEPS
    assert found.tokens_per_forward == pytest.approx(30 / (3 * STEPS + 2))
    assert found.forward_ms.p50 <= found.forward_ms.p95 and found.first_canvas_ms.p50 > 0
    assert sum(forward.seconds for forward in run.forwards) <= run.seconds
    assert found.page_bytes > 0 and found.peak_bytes >= 0


def test_shares_are_floors_over_time(tiny_subject: Subject) -> None:
    work = Workload(prompt_len=PROMPT, max_tokens=12, steps=2)
    run = ran(tiny_subject, work, "engine")
    run.forwards = [replace(forward, seconds=2.0) for forward in run.forwards]
    found = report(tiny_subject, work, run, MACHINE)
    rows = [
        costs.BatchShape(canvases=(PROMPT,), prefills=((0, PROMPT),)),
        costs.BatchShape(canvases=(PROMPT,), goes_on=False),
    ]
    parts = [costs.forward_cost(tiny_subject.config, stored_formats(tiny_subject.network), one) for one in rows]
    flops = sum(work.flops for part in parts for work in part.values())
    assert found.arithmetic_share == pytest.approx(flops / 1e9 / 4.0)
    assert found.byte_share < found.floor_share and found.arithmetic_share <= found.floor_share
    twice = replace(MACHINE, rates={"float32": 2e9}, bandwidth=2e9)
    assert report(tiny_subject, work, run, twice).floor_share == pytest.approx(found.floor_share / 2)


class Slow:
    """A stepper that answers nobody before `open` requests are in, and refuses beyond `most`."""

    rows, prefill, page_bytes = costs.BatchShape(), False, 0

    def __init__(self, inner: EngineStepper, most: int) -> None:
        self.inner, self.most, self.held, self.seen = inner, most, 0, 0

    @property
    def busy(self) -> bool:
        return self.inner.busy

    def submit(self, request: Request) -> None:
        if self.held >= self.most:
            raise Overloaded("the queue is full", hint="wait")
        self.held += 1
        self.seen = max(self.seen, self.held)
        self.inner.submit(request)

    def step(self) -> Sequence[tuple[Request, Event]]:
        events = self.inner.step()
        self.held -= sum(type(event).__name__ == "Done" for _, event in events)
        self.rows, self.prefill = self.inner.rows, self.inner.prefill
        return events


def test_closed_loop_load_keeps_as_many_requests_as_users(tiny_subject: Subject) -> None:
    work = Workload(concurrency=2, requests=5, prompt_len=PROMPT, max_tokens=12, steps=2)
    stepper = Slow(EngineStepper(tiny_subject.network, running=4), most=2)
    run = drive(stepper, work, requests(tiny_subject, work), CPU)
    assert stepper.seen == 2 and len(run.traces) == 5 and run.refused == 0


def test_a_full_queue_is_counted_and_the_others_are_answered(tiny_subject: Subject) -> None:
    work = Workload(rate=1e6, requests=5, prompt_len=PROMPT, max_tokens=12, steps=2)
    run = drive(Slow(EngineStepper(tiny_subject.network, running=4), most=2), work, requests(tiny_subject, work), CPU)
    assert run.refused == 3 and [one.error for one in run.traces] == [None, None]
    assert report(tiny_subject, work, run, MACHINE).answered == 2


@pytest.mark.parametrize("broken", [{1}, {0, 1, 2}], ids=["one", "all"])
def test_failed_requests_are_reported(tiny_subject: Subject, broken: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run_batch = Runner.run

    def run(self: Runner, works: Sequence[ScheduledRequest]) -> object:
        if any(work.request.row.index in broken for work in works):
            raise ValueError("a broken row")
        return run_batch(self, works)

    work = Workload(batch=ROWS, prompt_len=PROMPT, max_tokens=12, steps=2)
    monkeypatch.setattr(Runner, "run", run)
    if len(broken) == ROWS:
        with pytest.raises(BlockpressError, match="a broken row"):
            run_bench(tiny_subject, work, device=MACHINE)
        return
    recorded = ran(tiny_subject, work, "engine")
    found = report(tiny_subject, work, recorded, MACHINE)
    assert (found.answered, found.failed) == (2, 1) and "a broken row" in found.errors[0]
    with pytest.raises(BlockpressError, match="a broken row"):
        recorded.whole()


def test_arrival_times_follow_from_seed_and_rate() -> None:
    def times(seed: int) -> Iterator[float]:
        return arrivals(Workload(rate=50.0, seed=seed))

    one, again, other = ([next(source) for _ in range(2000)] for source in (times(1), times(1), times(2)))
    assert one == again != other and one == sorted(one)
    assert one[-1] == pytest.approx(2000 / 50.0, rel=0.1)


def test_no_request_arrives_after_the_given_seconds(tiny_subject: Subject) -> None:
    work = Workload(rate=1000.0, seconds=0.01, prompt_len=PROMPT, max_tokens=12, steps=1)
    due = [time for time, _ in zip(arrivals(work), range(1000), strict=False) if time < 0.01]
    run = ran(tiny_subject, work, "engine")
    assert len(run.traces) + run.refused == len(due) > 0
    assert [one.arrived for one in run.traces] == due


def test_weight_formats_are_those_stored(tiny_subject: Subject) -> None:
    low = randomised("tiny", shape_named("tiny"), dtype="bfloat16")
    for subject, size, math in ((tiny_subject, 4, "float32"), (low, 2, "bfloat16")):
        found = stored_formats(subject.network)
        assert {found.experts, found.dense, found.embedding, found.rest} == {costs.Width(size=size, math=math)}
        assert sum(weight_bytes(subject.network).values()) == size * sum(costs.parameters(subject.config).values())


def test_peak_memory_is_that_of_the_process() -> None:
    size = 64 << 20
    peak = Peak(CPU)
    with mmap.mmap(-1, size) as pages:  # fresh from the kernel: an allocator may hand out what earlier tests touched
        pages.write(bytes([1]) * size)
    # The kernel counts resident pages in batches: a few may be missing.
    assert size - (1 << 20) <= peak.value() <= 4 * size


@pytest.mark.slow
def test_measure_warms_up_runs_and_reports(tiny_subject: Subject) -> None:
    found, machine = run_bench(tiny_subject, Workload(prompt_len=PROMPT, max_tokens=12, steps=2))
    assert found.forwards == 2 and machine.rates["float32"] > 1e8 and machine.bandwidth > 1e7


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"batch": 0}, "--batch is 0"),
        ({"prompt_len": -1}, "--prompt-len is -1"),
        ({"rate": float("nan")}, "--rate is nan"),
        ({"seconds": 3.0}, "--seconds is given without --rate"),
        ({"rate": 1.0, "concurrency": 2}, "--concurrency is given with --rate"),
        ({"mode": "fast"}, "--mode is fast"),
        ({"mode": "autoregressive", "steps": 3}, "--steps is given in the mode autoregressive"),
    ],
)
def test_an_invalid_workload_is_refused(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Workload(**wrong)  # type: ignore[arg-type]


def test_a_prompt_beyond_the_context_is_refused(tiny_subject: Subject) -> None:
    work = Workload(prompt_len=250, max_tokens=12)
    with pytest.raises(RequestError, match="--prompt-len is 250"):
        ran(tiny_subject, work, "engine")
