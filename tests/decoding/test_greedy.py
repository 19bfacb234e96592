"""Sampling without samples: what is accepted is the likeliest token, on the checkpoint's own schedule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import blockpress
from blockpress import sudoku
from blockpress.config import Sampling
from blockpress.decoding import Denoised
from blockpress.diffusion import DenoiserOutput, KeyedDraws, Schedule, denoise, step_rules
from blockpress.errors import RequestError
from blockpress.lm.execute import run_reference

PUZZLES = [sudoku.layout(puzzle.puzzle) for puzzle in sudoku.held_out(0, 2)]


@pytest.mark.parametrize("greedy", [True, False])
def test_accepted_positions_hold_the_likeliest_token(greedy: bool) -> None:
    sampling = Sampling(entropy_bound=1.0, confidence=0.0, steps=6)
    draws = KeyedDraws([3], [0], length=8, vocab=5)

    def denoiser(
        rows: Any, step: int, canvas: Any, signal: Any, temperature: Any, draws: Any, mask: Any
    ) -> DenoiserOutput:
        argmax, sample = torch.full_like(canvas, step % 5), torch.full_like(canvas, (step + 1) % 5)
        return DenoiserOutput(argmax=argmax, sample=sample, entropy=torch.full(canvas.shape, 0.3), signal=torch.zeros(*canvas.shape, 2))  # fmt: skip

    steps = list(denoise(denoiser, draws, 1, Schedule.of(sampling), *step_rules(sampling), greedy=greedy))
    for before, after in itertools.pairwise(steps):
        assert before.accepted.any()
        kept = (before.number if greedy else before.number + 1) % 5
        assert (after.canvas[before.accepted] == kept).all()


def test_the_engine_and_the_reference_loop_agree_beside_others_that_sample() -> None:
    engine, reference = blockpress.load("sudoku-nano"), blockpress.load("sudoku-nano")
    reference.answer = run_reference
    hot = engine.generation.sampling.with_(t_min=1.5, t_max=2.0, entropy_bound=3.0, steps=8)
    requests = [
        lm.build_requests(PUZZLES, 90, 0, hot.with_(greedy=greedy)) for lm in [engine] for greedy in (True, False)
    ]
    events = list(engine.answer(engine.network, [r for some in requests for r in some], None))
    for greedy, rows in zip((True, False), requests, strict=True):
        alone = list(reference.stream(PUZZLES, 90, 0, hot.with_(greedy=greedy)))
        for number, request in enumerate(rows):
            wanted = [e.argmax.tolist() for e in alone if isinstance(e, Denoised) and e.row == number]
            assert wanted in [[e.argmax.tolist() for e in some] for some in runs(events)], request


def runs(events: list[Any]) -> list[list[Denoised]]:
    """The steps of each request: rows share numbers across calls, so a run begins at step 1."""
    found: dict[int, list[list[Denoised]]] = {}
    for event in events:
        if isinstance(event, Denoised):
            rows = found.setdefault(event.row, [])
            if event.step == 1:
                rows.append([])
            open_runs = [run for run in rows if len(run) == event.step - 1]
            open_runs[0].append(event)
    return [run for rows in found.values() for run in rows]


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_greedy_is_true_or_false(wrong: object) -> None:
    with pytest.raises(RequestError, match="sampling field greedy"):
        Sampling(greedy=wrong)  # type: ignore[arg-type]
