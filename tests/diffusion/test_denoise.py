"""The loop against a plain one for a single row, with a scripted denoiser whose readings depend on all that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.diffusion import (
    DenoiserOutput,
    Draws,
    EntropyBound,
    KeyedDraws,
    Pins,
    Schedule,
    StableAndConfident,
    Step,
    denoise,
)

VOCAB, LENGTH, HIDDEN = 7, 5, 3


@dataclass
class Line:
    """What the script says about one row: plain lists."""

    argmax: list[int]
    sample: list[int]
    entropy: list[float]
    signal: list[list[float]]


@dataclass
class Script:
    """A denoiser; a row's reading is a pure function of (row, step, canvas, signal), often stable and often sure.

    Entropies are multiples of 1/256, so that plain sums and the tensors' are equal.
    """

    seed: int
    schedule: Schedule
    calls: list[list[int]] = field(default_factory=list)

    def line(self, row: int, step: int, canvas: list[int], signal: list[list[float]] | None) -> Line:
        random = Random(repr((self.seed, row, step, canvas, signal)))
        base = Random(repr((self.seed, row))).choices(range(VOCAB), k=LENGTH)
        largest = random.choice([0, 2, 40, 600])
        return Line(
            argmax=base if random.random() < 0.7 else random.choices(range(VOCAB), k=LENGTH),
            sample=random.choices(range(VOCAB), k=LENGTH),
            entropy=[random.randint(0, largest) / 256 for _ in range(LENGTH)],
            signal=[[float(random.randint(0, 99)) for _ in range(HIDDEN)] for _ in range(LENGTH)],
        )

    def __call__(
        self,
        rows: Tensor,
        step: int,
        canvas: Tensor,
        signal: Tensor | None,
        temperature: Tensor,
        draws: Draws,
        edits: None,
    ) -> DenoiserOutput:
        self.calls.append(rows.tolist())
        left = self.schedule.steps - step + 1
        wanted = self.schedule.t_min + (self.schedule.t_max - self.schedule.t_min) * left / self.schedule.steps
        assert temperature.item() == pytest.approx(wanted, rel=1e-6)
        told = [None] * len(rows) if signal is None else signal.tolist()
        lines = [self.line(*x) for x in zip(rows.tolist(), [step] * len(rows), canvas.tolist(), told, strict=True)]
        return DenoiserOutput(
            argmax=torch.tensor([line.argmax for line in lines]),
            sample=torch.tensor([line.sample for line in lines]),
            entropy=torch.tensor([line.entropy for line in lines], dtype=torch.float32),
            signal=torch.tensor([line.signal for line in lines]),
        )


@dataclass
class Policy:
    steps: int
    bound: float
    stability: int
    confidence: float

    @property
    def schedule(self) -> Schedule:
        return Schedule(steps=self.steps, t_min=0.4, t_max=0.8)


@dataclass
class SampleStats:
    """One step of one row, in plain lists."""

    number: int
    canvas: list[int]
    argmax: list[int]
    accepted: list[bool]
    changed: list[bool]
    settled: bool


def pinned_signal(tokens: Tensor) -> Tensor:
    """What the signal of a pin is in these tests; no script says anything like it."""
    return (1000.0 + tokens)[..., None].expand(*tokens.shape, HIDDEN)


def plain(
    script: Script, draws: KeyedDraws, row: int, policy: Policy, pins: Mapping[int, int] | None = None
) -> list[SampleStats]:
    """Reference model, section 2, for one row and with lists; and with places that hold what they are told."""
    pins = pins or {}
    canvas = held(draws.noise(torch.tensor([row]), 0)[0].tolist(), pins)
    signal, previous, unchanged, history = None, [-1] * LENGTH, 0, []
    for step in range(1, policy.steps + 1):
        line = script.line(row, step, canvas, signal)
        for place, token in pins.items():
            line.argmax[place] = line.sample[place] = token
            line.entropy[place] = 0.0
            line.signal[place] = [1000.0 + token] * HIDDEN
        accepted, total = [False] * LENGTH, 0.0
        for place in sorted(range(LENGTH), key=line.entropy.__getitem__):
            accepted[place] = total <= policy.bound
            total += line.entropy[place]
        changed = [now != before for now, before in zip(line.argmax, previous, strict=True)]
        unchanged = 0 if any(changed) else unchanged + 1
        settled = unchanged >= policy.stability and total / LENGTH < policy.confidence
        history.append(SampleStats(step, canvas, line.argmax, accepted, changed, settled))
        if settled:
            break
        noise = draws.noise(torch.tensor([row]), step)[0].tolist()
        canvas = [x if kept else fresh for x, kept, fresh in zip(line.sample, accepted, noise, strict=True)]
        canvas = held(canvas, pins)
        signal, previous = line.signal, line.argmax
    return history


def held(canvas: list[int], pins: Mapping[int, int]) -> list[int]:
    return [pins.get(place, token) for place, token in enumerate(canvas)]


def run(
    script: Script, draws: KeyedDraws, batch: int, policy: Policy, pins: Pins | None = None
) -> tuple[list[Step], list[list[SampleStats]]]:
    accept, settle = EntropyBound(policy.bound), StableAndConfident(policy.stability, policy.confidence)
    steps = list(denoise(script, draws, batch, policy.schedule, accept, settle, None, pins))
    rows: list[list[SampleStats]] = [[] for _ in range(batch)]
    for step in steps:
        for place, row in enumerate(step.rows.tolist()):
            parts = (step.canvas, step.argmax, step.accepted, step.changed)
            rows[row].append(SampleStats(step.number, *(x[place].tolist() for x in parts), bool(step.settled[place])))
    return steps, rows


POLICY = st.builds(
    Policy,
    steps=st.integers(1, 12),
    bound=st.sampled_from([0.01, 0.1, 1.0, 9.0]),
    stability=st.integers(0, 3),
    confidence=st.sampled_from([0.005, 0.1, 1.0]),
)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 2**64), min_size=1, max_size=5), POLICY)
def test_a_batch_equals_the_plain_loop_row_by_row(seed: int, seeds: list[int], policy: Policy):
    draws = KeyedDraws(seeds, [0] * len(seeds), length=LENGTH, vocab=VOCAB)
    script = Script(seed, policy.schedule)
    steps, rows = run(script, draws, len(seeds), policy)
    assert rows == [plain(script, draws, row, policy) for row in range(len(seeds))]
    assert all(0 <= token < VOCAB for row in rows for seen in row for token in seen.canvas + seen.argmax)
    # The last step is the first after which nobody is left, and nobody who left is asked again.
    assert len(steps) == max(map(len, rows))
    assert script.calls == [[row for row in range(len(seeds)) if len(rows[row]) > n] for n in range(len(steps))]


def test_the_batch_cases_settle_at_different_steps_and_at_the_cap():
    policy = Policy(steps=12, bound=0.1, stability=1, confidence=0.1)
    draws = KeyedDraws(range(5), [0] * 5, length=LENGTH, vocab=VOCAB)
    taken = [{len(row) for row in run(Script(seed, policy.schedule), draws, 5, policy)[1]} for seed in range(20)]
    assert any(12 in lengths for lengths in taken)
    assert sum(len(lengths) > 1 for lengths in taken) > 10
    assert min(min(lengths) for lengths in taken) == 2


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
def test_a_constant_canvas_settles_after_stability_plus_one_steps(stability: int):
    def sure(
        rows: Tensor, step: int, canvas: Tensor, signal: Tensor | None, t: Tensor, draws: Draws, edits: None
    ) -> DenoiserOutput:
        assert (signal is None) == (step == 1)
        return DenoiserOutput(
            torch.ones_like(canvas), canvas, torch.zeros(canvas.shape), torch.zeros(*canvas.shape, HIDDEN)
        )

    draws = KeyedDraws([0, 1], [0, 0], length=LENGTH, vocab=VOCAB)
    schedule = Schedule(steps=9, t_min=0.4, t_max=0.8)
    steps = list(denoise(sure, draws, 2, schedule, EntropyBound(0.1), StableAndConfident(stability, 0.005)))
    assert [step.number for step in steps] == list(range(1, stability + 2))
    assert [step.settled.tolist() for step in steps] == [[False] * 2] * stability + [[True] * 2]


def test_an_unsure_canvas_runs_all_steps_and_keeps_its_argmax():
    policy = Policy(steps=6, bound=0.1, stability=1, confidence=0.0)
    draws = KeyedDraws([3], [0], length=LENGTH, vocab=VOCAB)
    steps, (row,) = run(Script(1, policy.schedule), draws, 1, policy)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert row[-1].argmax == plain(Script(1, policy.schedule), draws, 0, policy)[-1].argmax
    assert not row[-1].settled


def test_the_same_seed_on_another_canvas_starts_from_other_noise():
    first, second = (KeyedDraws([3], [n], length=64, vocab=VOCAB).noise(torch.tensor([0]), 0) for n in (0, 1))
    assert not torch.equal(first, second)
