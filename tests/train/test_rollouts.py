"""On-policy states: what training visits is what the sampler visits, and a run that is resumed goes on to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.decoding.denoisers import plain_denoiser
from blockpress.diffusion import EntropyBound, KeyedDraws, Schedule, StableAndConfident, denoise
from blockpress.diffusion.denoise import Step
from blockpress.errors import ConfigError, TrainingError
from blockpress.model import Network
from blockpress.train.objective import Draw, Objective, TrainingBatch, draw_batch, losses
from blockpress.train.recipes import TrainingRecipe
from blockpress.train.rollouts import Rollouts
from blockpress.train.trainer import Trainer
from tests.forks import python
from tests.train.conftest import Copies

# With these bounds the canvases of `network` settle after three steps to some dozen.
EASY = Sampling(steps=12, t_max=0.8, t_min=0.4, entropy_bound=2.0, stability=1, confidence=0.5)
SHAPES = [(4, 3), (7, 1), (3, 2)]
ALL = torch.arange(len(SHAPES))

pytestmark = pytest.mark.end_to_end


def clean_rows(config: ModelConfig, seed: int) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = [prompt + canvases * config.canvas_length for prompt, canvases in SHAPES]
    tokens = torch.randint(config.vocab_size, (len(SHAPES), max(lengths)), generator=generator)
    prompts, canvases = (torch.tensor(column) for column in zip(*SHAPES, strict=True))
    return TrainingBatch(tokens * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]), prompts, canvases)


@pytest.fixture(scope="module")
def network(small: ModelConfig, random_network: Callable[..., Network]) -> Network:
    found = random_network(small, seed=8)
    with torch.no_grad():
        found.embed_tokens.weight.mul_(3.0)  # a random network is not sure of anything else
    return found


class Watched:
    """The slots of three rows over some steps under fixed weights: each trajectory's canvases, by its number."""

    def __init__(self, network: Network, objective: Objective, steps: int) -> None:
        self.rollouts = Rollouts(network, objective, EASY, len(SHAPES), seed=11)
        self.canvases: dict[int, list[Tensor]] = defaultdict(list)
        self.contexts: dict[int, tuple[list[int], int]] = {}
        self.rows: list[TrainingBatch] = []
        self.lasts: dict[int, int] = {}
        config, generator = network.config, torch.Generator().manual_seed(0)
        for step in range(steps):
            rows = self.rollouts.rows(clean_rows(config, step), step)
            self.rows.append(rows)
            visited = self.rollouts.visited(ALL)
            for slot, serial in enumerate(self.rollouts.serial[self.rollouts.slots(ALL)].tolist()):
                self.canvases[serial].append(visited.canvas[slot])
                start = int(visited.starts[slot])
                self.contexts[serial] = (
                    rows.tokens[slot // objective.on_policy, :start].tolist(),
                    int(self.rollouts.chosen[self.rollouts.slots(ALL)][slot]),
                )  # fmt: skip
            drawn = draw_batch(rows, config.canvas_length, config.vocab_size, objective, generator, visited)
            found = losses(network, rows, drawn, objective)
            assert found.logits is not None
            self.rollouts.advance(network, ALL, found.logits)


@torch.no_grad()
def by_the_sampler(network: Network, context: list[int], canvas: int, seed: int) -> list[Step]:
    _, cache = network.read(torch.tensor([context]), network.empty_cache(1))
    draws = KeyedDraws([seed], [canvas], length=network.config.canvas_length, vocab=network.config.vocab_size)
    schedule = Schedule(steps=EASY.steps, t_min=EASY.t_min, t_max=EASY.t_max)
    accept, settle = EntropyBound(EASY.entropy_bound), StableAndConfident(EASY.stability, EASY.confidence)
    return list(denoise(plain_denoiser(network, cache), draws, 1, schedule, accept, settle))


@pytest.mark.slow
@pytest.mark.parametrize(("past", "groups"), [(2, 1), (0, 3)])
def test_a_rollout_visits_the_sampler_s_states(network: Network, past: int, groups: int):
    objective = Objective(draws=3, on_policy=2, max_trajectory_steps=8, steps_past_settling=past, row_groups=groups)
    watched = Watched(network, objective, steps=30 if groups == 1 else 48)
    settled = compared = 0
    lengths = set()
    for serial, canvases in watched.canvases.items():
        context, canvas = watched.contexts[serial]
        steps = by_the_sampler(network, context, canvas, watched.rollouts.seed_of(serial))
        for mine, step in zip(canvases, steps, strict=False):
            assert torch.equal(mine, step.canvas[0])
            compared += 1
        under_way = serial in watched.rollouts.serial.tolist()
        assert under_way or len(canvases) <= 8
        if len(steps) + past < len(canvases):
            pytest.fail(f"trajectory {serial} went on for {len(canvases) - len(steps)} steps after it had settled")
        settled += not under_way and len(canvases) == len(steps) + past and bool(steps[-1].settled)
        lengths.add(len(canvases))
    assert compared > 100
    assert settled >= 3
    assert len(lengths) > 3  # the first ones end at random ages


def test_a_row_is_kept_until_all_its_rollouts_end(network: Network):
    objective = Objective(draws=2, on_policy=2, max_trajectory_steps=5)
    watched = Watched(network, objective, steps=20)
    config = network.config
    replaced = 0
    for place in range(len(SHAPES)):
        begun = 0
        for step, rows in enumerate(watched.rows):
            fresh = clean_rows(config, step)
            length = int(fresh.lengths(config.canvas_length)[place])
            if torch.equal(rows.tokens[place, :length], fresh.tokens[place, :length]):
                replaced += step > 0
                begun = step
            held = clean_rows(config, begun)
            assert torch.equal(rows.tokens[place, :length], held.tokens[place, :length])
            assert int(rows.prompts[place]) == SHAPES[place][0]
            assert (
                step - begun < 2 * objective.max_trajectory_steps
            )  # the slower slot may begin while the faster is under way
    assert replaced >= len(SHAPES) * 2


def turned(rows: TrainingBatch, step: int) -> Tensor:
    """The second half of each prompt and of each canvas from behind."""
    sources = torch.arange(rows.tokens.shape[1]).repeat(len(rows.tokens), 1)
    for row, (prompt, canvases) in enumerate(SHAPES):
        for start in range(prompt, prompt + canvases * 6, 6):
            sources[row, start + 3 : start + 6] = sources[row, start + 3 : start + 6].flip(0)
        sources[row, prompt - 2 : prompt] = sources[row, prompt - 2 : prompt].flip(0)
    return sources


@torch.no_grad()
def test_a_symmetry_moves_a_row_with_the_states_of_its_slots(network: Network):
    plain, moved = (Watched(network, Objective(draws=2, on_policy=2), steps=3).rollouts for _ in range(2))
    new_rows = clean_rows(network.config, 3)
    rows, other = plain.rows(new_rows, 3), moved.rows(new_rows, 3, turned)
    assert torch.equal(other.tokens, rows.tokens.gather(1, turned(rows, 3)))
    order = torch.tensor([0, 1, 2, 5, 4, 3])
    before, after = plain.visited(ALL), moved.visited(ALL)
    assert before.signal.abs().sum() > 0
    for name in ("clean", "canvas", "signal"):
        assert torch.equal(getattr(after, name), getattr(before, name)[:, order]), name
    assert torch.equal(moved.argmax, plain.argmax[:, order])
    assert torch.equal(moved.visited(ALL).clean, after.clean)  # what a row looks like stays until its next visit


def test_a_source_without_symmetries_is_refused_by_name(copy_recipe: Callable[..., TrainingRecipe], tmp_path: Path):
    objective = Objective(draws=2, on_policy=2, symmetries=True)
    with pytest.raises(TrainingError, match="Copies knows none of its task"):
        Trainer(on_policy(copy_recipe, objective=objective), tmp_path)


@torch.no_grad()
def test_a_rollout_state_uses_the_sampler_s_signal(network: Network):
    objective = Objective(draws=3, on_policy=2, self_conditioning=0.5, stratified=True)
    rollouts = Watched(network, objective, steps=4).rollouts
    rows = rollouts.rows(clean_rows(network.config, 4), 4)
    visited = rollouts.visited(ALL)
    assert visited.signal.abs().sum() > 0
    drawn = draw_batch(rows, 6, 16, objective, torch.Generator().manual_seed(1), visited)
    got = losses(network, rows, drawn, objective)
    assert got.logits is not None
    for slot, start in enumerate(visited.starts.tolist()):
        _, cache = network.read(rows.tokens[slot // 2 : slot // 2 + 1, :start], network.empty_cache(1))
        own = slice(slot, slot + 1)
        want = network.logits(network.denoise(visited.canvas[own], cache, visited.signal[own]))
        assert torch.allclose(got.logits[own], want, atol=1e-5)


def test_rollout_states_follow_the_corrupted_draws_of_their_row(network: Network):
    objective = Objective(draws=3, on_policy=2, self_conditioning=1.0)
    rollouts = Rollouts(network, objective, EASY, len(SHAPES), seed=5)
    rows = rollouts.rows(clean_rows(network.config, 0), 0)
    visited = rollouts.visited(ALL)
    drawn = draw_batch(rows, 6, 16, objective, torch.Generator().manual_seed(1), visited)
    assert drawn.visited is not None
    assert drawn.visited.tolist() == [1, 2, 4, 5, 7, 8]
    assert drawn.conditioned.tolist() == [0, 3, 6]
    for name, theirs in (("starts", visited.starts), ("clean", visited.clean), ("noisy", visited.canvas)):
        assert torch.equal(getattr(drawn, name)[drawn.visited], theirs)
    place = drawn.starts[:, None] + torch.arange(6)
    assert torch.equal(rows.tokens.repeat_interleave(3, 0).gather(1, place), drawn.clean)


@pytest.mark.parametrize("on_policy", [0, 2])
def test_without_a_causal_loss_nothing_after_the_canvases_is_read(network: Network, on_policy: int):
    objective = Objective(draws=2, on_policy=on_policy, causal_weight=0.0)
    rollouts = Rollouts(network, Objective(draws=2, on_policy=2), EASY, len(SHAPES), seed=5)
    rows = rollouts.rows(clean_rows(network.config, 0), 0)
    visited = rollouts.visited(ALL) if on_policy else None
    drawn: Draw = draw_batch(rows, 6, 16, objective, torch.Generator().manual_seed(1), visited)
    whole = losses(network, rows, drawn, replace(objective, causal_weight=1.0))
    part = losses(network, rows.part(ALL, int(drawn.starts.max())), drawn, objective)
    assert part.causal == 0 < whole.causal
    assert part.canvas.item() == pytest.approx(whole.canvas.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("on_policy", 3), ("on_policy", -1), ("max_trajectory_steps", 0), ("steps_past_settling", -1), ("row_groups", 0)],
)
def test_a_bad_objective_is_refused_by_name(field: str, value: int):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        Objective(draws=2, **{field: value})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- in a run


def on_policy(copy_recipe: Callable[..., TrainingRecipe], **changes: object) -> TrainingRecipe:
    objective = Objective(draws=3, on_policy=2, max_trajectory_steps=3, row_groups=2, causal_weight=0.0)
    settings = {"objective": objective, "generation": GenerationConfig(sampling=EASY)} | changes
    return copy_recipe(**settings)


class Shuffled(Copies):
    """`Copies` whose digits stand in another order at each visit."""

    def symmetries(self, rows: TrainingBatch, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        orders = torch.rand(len(rows.tokens), 4, generator=generator).argsort(1)
        sources = torch.arange(rows.tokens.shape[1]).repeat(len(rows.tokens), 1)
        sources[:, 1:5], sources[:, 5:9] = 1 + orders, 5 + orders
        return sources


def shuffled(copy_recipe: Callable[..., TrainingRecipe]) -> TrainingRecipe:
    plain = on_policy(copy_recipe)
    objective = replace(plain.objective, symmetries=True)
    return replace(plain, objective=objective, source=lambda config, seed, processes, keep: Shuffled(config, seed))


@pytest.mark.slow
@pytest.mark.parametrize(("made", "stop"), [(on_policy, 1), (on_policy, 4), (shuffled, 4)])
def test_a_resumed_run_is_bit_identical(
    copy_recipe: Callable[..., TrainingRecipe],
    tmp_path: Path,
    made: Callable[[Callable[..., TrainingRecipe]], TrainingRecipe],
    stop: int,
):
    whole = Trainer(made(copy_recipe), tmp_path / "whole")
    list(whole.run())
    first = Trainer(made(copy_recipe), tmp_path)
    for _ in range(stop):
        first.train_step()
    first.save()
    second = Trainer(made(copy_recipe), tmp_path)
    second.resume()
    assert second.step == stop
    list(second.run())
    assert all(torch.equal(x, whole.network.state_dict()[name]) for name, x in second.network.state_dict().items())
    assert whole.rollouts is not None and second.rollouts is not None
    for name, value in whole.rollouts.state().items():
        assert torch.equal(second.rollouts.state()[name], value), name
    assert int(whole.rollouts.serial.max()) >= 8 * 3  # slots have begun anew
    assert len(whole.rollouts.canvas) == 16


def test_a_state_with_another_number_of_rollouts_is_refused(network: Network):
    one, other = (Rollouts(network, Objective(draws=2, on_policy=2), EASY, rows, seed=1) for rows in (2, 3))
    with pytest.raises(ValueError, match="prompts is \\[2\\], \\[3\\] is needed"):
        other.load(one.state())


SHARED = """
import sys
from pathlib import Path
import torch
from tests.train.conftest import make_copy_recipe
from tests.train.test_rollouts import on_policy
from blockpress.train import parallel
from blockpress.train.trainer import Trainer
torch.set_num_threads(1)
trainer = Trainer(on_policy(make_copy_recipe, micro=1), Path(sys.argv[1]), dtype=torch.float32)
for _ in range(4): trainer.train_step()
if parallel.rank() == 0: trainer.save()
parallel.leave()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(copy_recipe: Callable[..., TrainingRecipe], tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [*python(), "-c", SHARED, str(tmp_path)]
    both = [subprocess.Popen(command, env=settings | {"RANK": str(rank)}) for rank in range(2)]
    alone = Trainer(on_policy(copy_recipe, micro=1), tmp_path / "alone", dtype=torch.float32)
    for _ in range(4):
        alone.train_step()
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    together = Trainer(on_policy(copy_recipe, micro=1), tmp_path, dtype=torch.float32)
    together.resume()
    assert together.step == 4
    assert together.rollouts is not None and alone.rollouts is not None
    for name, value in alone.rollouts.state().items():
        near = torch.allclose(together.rollouts.state()[name].float(), value.float(), atol=1e-4)
        assert near, name
    for name, value in alone.network.state_dict().items():
        assert torch.allclose(together.network.state_dict()[name], value, atol=1e-4), name
