"""Our loop against `transformers`' own `generate`, on its recorded draws: the same canvases, masks, argmax and steps.

Random nets neither accept nor stop. So the final norm is scaled, the norms behind a layer's branches are made small
(the net then tends to say again what it reads, so that canvases settle, and float32 errors fade instead of growing
from step to step), and the entropy bound and the confidence are raised; every test asserts that a good share of the
canvases stopped early and that most steps accepted some positions but not all.

Rows of ours run together in one ragged batch, the oracle's alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

import blockpress
from blockpress.config import PRESETS, ModelConfig, Rope, Sampling
from blockpress.model import Network
from blockpress.sudoku import held_out, layout

from .conftest import Report
from .oracle import SHIPPED, build, full, load_shipped, network_like, sliding, texts
from .recording import FORGIVEN, NEAR, OurRow, Recording, Tally, compare, record, replay

# The oracle's `generate` imports the compiler, and torch then warns of parts of itself.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]

# Canvases of 16 behind a window of 12; an image id outside the vocabulary, since `generate` needs one.
SMALL = replace(PRESETS["tiny"](), canvas_length=16, sliding_window=12, image_id=64)
LOOSE = Sampling(steps=24, entropy_bound=1.0, confidence=0.3)
LENGTHS = (5, 14, 40)


@dataclass(frozen=True)
class Case:
    """A random net and how it is sampled; the share of early canvases and of partly accepted steps it must reach."""

    config: ModelConfig = SMALL
    sampling: Sampling = LOOSE
    sharpness: float = 2.0
    branch: float = 0.25
    lengths: tuple[int, ...] = LENGTHS
    canvases: int = 4
    seed: int = 0
    early: float = 1 / 3
    partial: float = 1 / 2


FIVE = replace(
    SMALL,
    sliding_window=4,
    canvas_length=24,
    num_experts=8,
    top_k_experts=3,
    layers=(sliding(8, 4), sliding(8, 4), full(8, 2), sliding(8, 4), full(8, 2)),
    full_rope=Rope(theta=10_000.0, kind="proportional", partial=1.0),
)
CASES = {
    "two layers": Case(),
    "no stability asked for": Case(sampling=replace(LOOSE, stability=0, confidence=0.03), partial=1 / 3),
    "stability over two steps": Case(sampling=replace(LOOSE, stability=2), canvases=2),
    "some reach the last step": Case(sampling=replace(LOOSE, steps=7), branch=0.3, seed=1),
    "other temperatures": Case(sampling=replace(LOOSE, t_min=0.2, t_max=1.0), canvases=2),
    "five layers, canvas longer than the window": Case(FIVE, branch=0.2, lengths=(2, 30), canvases=2),
    "a vocabulary of two tiles": Case(
        replace(SMALL, vocab_size=5000, image_id=5000), sharpness=3.0, branch=0.05, lengths=(3, 9), canvases=2
    ),
    "the shape of sudoku-nano": Case(
        replace(PRESETS["sudoku-nano"](), context_length=1024, image_id=16),
        replace(LOOSE, steps=16, entropy_bound=2.0),
        sharpness=0.5,
        branch=0.2,
        lengths=(90, 33),
        canvases=1,
    ),
}


@cache
def oracle(name: str) -> DiffusionGemmaForBlockDiffusion:
    case = CASES[name]
    return build(case.config, case.seed, case.sharpness, case.branch)


@cache
def recorded(name: str, stop_ids: tuple[int, ...] = ()) -> list[Recording]:
    """The oracle's rows of a case, each with draws of its own."""
    case, theirs = CASES[name], oracle(name)
    prompts = [text.prompt for text in texts(case.config, case.lengths, case.seed)]
    return [
        record(theirs, prompt, case.sampling, case.canvases, stop_ids, seed=10 * case.seed + row)
        for row, prompt in enumerate(prompts)
    ]


def ours(name: str, recordings: list[Recording], stop_ids: tuple[int, ...] = (), **changes: Any) -> list[OurRow]:
    """Our rows of a case on the oracle's draws; `changes` go to the sampling."""
    case = CASES[name]
    network = network_like(oracle(name), case.config)
    return replay(network, recordings, replace(case.sampling, **changes), case.canvases, stop_ids)


def tell(report: Report, tally: Tally) -> None:
    report("trajectories: near-ties over those allowed", tally.forgiven, -(-tally.decisions // FORGIVEN))
    report("trajectories: entropies apart, nats", tally.entropy, 1e-4)
    assert tally.entropy < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_same_draws_give_the_same_canvases(name: str, report: Report) -> None:
    """Every canvas read, mask, argmax canvas, step count and the final sequence, over several canvases and rows."""
    case, recordings = CASES[name], recorded(name)
    tally = compare(recordings, ours(name, recordings), case.sampling)
    tell(report, tally)
    tally.check(case.early, case.partial)
    if name == "some reach the last step":
        assert 0 < tally.early < tally.canvases
    if case.sampling.stability > 1:
        assert min(len(canvas.steps) for row in recordings for canvas in row.canvases) > case.sampling.stability


@pytest.mark.parametrize("canvas", [0, 1, 3])
def test_a_stop_id_ends_the_row(canvas: int) -> None:
    """A stop id in the first or a later canvas: ours is cut behind it, theirs padded; other rows stop where they do."""
    name = "two layers"
    length, tokens = SMALL.canvas_length, recorded(name)[0].tokens
    stop = next(token for token in tokens[canvas * length :] if token not in tokens[: canvas * length])
    # An id that the first row never says rides along: a list of stop ids, not a single one.
    never = next(token for token in range(SMALL.vocab_size) if token not in tokens)
    recordings = recorded(name, (stop, never))
    rows = ours(name, recordings, (stop, never))
    compare(recordings, rows, LOOSE, (stop, never)).check()
    assert len(recordings[0].canvases) == tokens.index(stop) // length + 1
    assert rows[0].reply is not None
    assert rows[0].reply.tokens == tokens[: tokens.index(stop) + 1]


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "the bound": ("two layers", {"entropy_bound": 1.05}),
    "the confidence": ("no stability asked for", {"confidence": 0.028}),
    "the stability": ("two layers", {"stability": 2}),
    "the last temperature": ("two layers", {"t_min": 0.41}),
    "the first temperature": ("two layers", {"t_max": 0.79}),
    "the schedule's length": ("two layers", {"steps": 23}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_sampler_is_found(what: str) -> None:
    """The comparison can fail: a setting that is off by a little parts the trajectories."""
    name, changes = WRONG[what]
    recordings = recorded(name)
    with pytest.raises(AssertionError):
        compare(recordings, ours(name, recordings, **changes), CASES[name].sampling)


def test_a_wrong_network_is_found() -> None:
    name = "two layers"
    recordings = recorded(name)
    network = network_like(oracle(name), SMALL)
    wrong = Network(replace(SMALL, sliding_window=11)).eval()
    wrong.load_state_dict(network.state_dict())
    with pytest.raises(AssertionError):
        compare(recordings, replay(wrong, recordings, LOOSE, canvases=4), LOOSE)


def test_a_near_tie_is_forgiven_once() -> None:
    """A flipped decision passes where its margin is tiny, fails where it is not, and too many fail the check."""
    name = "two layers"
    recordings = recorded(name)
    row = ours(name, recordings)[0]
    theirs, step = recordings[0], recordings[0].canvases[0].steps[0]
    argmax = row.canvases[0][0].event.argmax
    with torch.inference_mode():  # where the loop made it
        argmax[3] = (argmax[3] + 1) % SMALL.vocab_size
    with pytest.raises(AssertionError, match="argmax differs"):
        compare([theirs], [row], LOOSE)
    lead = step.lead.clone()
    step.lead[3] = NEAR / 2
    try:
        tally = compare([theirs], [row], LOOSE)
    finally:
        step.lead.copy_(lead)
    assert tally.forgiven == 1
    tally.check()
    tally.forgiven = 2
    with pytest.raises(AssertionError):
        tally.check()


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="blockpress/models/sudoku-nano is not there yet")
def test_sudoku_nano_on_real_puzzles(report: Report) -> None:
    """The shipped model with its own sampler settings, one canvas a puzzle.

    A trained net that is still undecided magnifies rounding from step to step: entropies of the two drift apart by up
    to 6e-4 nats and come together again as the canvas settles. So a near-tie is one below 1e-3 here; still only one in
    100,000 decisions is forgiven.
    """
    theirs, lm = load_shipped(), blockpress.load("sudoku-nano")
    sampling, stop_ids = lm.generation.sampling, lm.generation.stop_ids
    puzzles = held_out(seed=20_251, count=3, givens=(34, 42))
    prompts = [torch.tensor(lm.encode(layout(puzzle.puzzle))) for puzzle in puzzles]
    recordings = [record(theirs, prompt, sampling, 1, stop_ids, seed) for seed, prompt in enumerate(prompts)]
    rows = replay(lm.network, recordings, sampling, 1, stop_ids)
    tally = compare(recordings, rows, sampling, stop_ids, near=1e-3)
    report("trajectories, sudoku-nano: near-ties over those allowed", tally.forgiven, -(-tally.decisions // FORGIVEN))
    report("trajectories, sudoku-nano: entropies apart, nats", tally.entropy, 1e-2)
    assert tally.entropy < 1e-2
    tally.check(partial=1 / 3)
