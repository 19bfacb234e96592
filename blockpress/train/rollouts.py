"""On-policy states: trajectories of the real sampler that training follows, one sampler step per training step.

    slot        canvas, signal, last argmax, step number          one trajectory in progress
    train       the network reads a slot's canvas with its signal; cross-entropy to the true tokens
    advance     the same logits, without gradient, advance the slot as the sampler would: no extra forward

`signal` is the self-conditioning embedding. Drawn corruption puts errors at random positions; the sampler shows the
network its own errors, of which it is confident. A slot restarts from noise once it has settled or is old, and a row is
replaced by a new one when each of its slots has ended. The first trajectories end at random ages, so that slots are of
all ages from then on. Training steps take turns among groups of rows: rows that appear at every step are memorised
while they are solved.

Invariant: under fixed weights and no symmetries a slot visits the canvases that `generate` visits for the same prompt
and `seed_of`.
All state is in tensors (`state`), so that a resumed run continues bit for bit.
Run it:  python -m pytest tests/train/test_rollouts.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float32, Int
from torch import Tensor
from torch.nn import functional as F

from blockpress.config import Sampling
from blockpress.diffusion import DenoiserOutput, KeyedDraws, Schedule, step_rules, update
from blockpress.diffusion.noise import LOW
from blockpress.errors import RequestError
from blockpress.model import Network
from blockpress.ops import vocabulary
from blockpress.train import parallel
from blockpress.train.objective import Objective, TrainingBatch, Visited

Symmetries = Callable[[TrainingBatch, int], Tensor]
ROW_STATE = ("tokens", "prompts", "canvases")
RESTART = -1  # in `past`, which counts the steps since a slot settled: the slot restarts
SLOT_STATE = ("chosen", "canvas", "signal", "argmax", "unchanged", "number", "limit", "past", "ended", "serial")


class Rollouts:
    """The slots of a run: `row_groups` groups of `rows` rows, `on_policy` slots a row (see `Objective`), by row.

    Args:
        network: for its shapes and device; its weights are passed to `advance`.
        rows: of one training step; step n takes group n modulo `row_groups`, and its rows are numbered from 0.
        seed: of the choices and the noise. Trajectory n of the run has the sampler's seed `seed_of(n)`.
    """

    def __init__(self, network: Network, objective: Objective, sampling: Sampling, rows: int, seed: int) -> None:
        for name, value in sampling.changed.items():
            raise RequestError(f"sampling.{name} is {value!r:.80}", hint=f"leave {name} out: training edits no logits")
        self.objective, self.sampling, self.seed = objective, sampling, seed
        self.length, self.vocab = network.config.canvas_length, network.config.vocab_size
        self.per_row, self._rows, self._first = objective.on_policy, rows, 0
        num_rows = rows * objective.row_groups
        count, device = num_rows * self.per_row, network.device
        schedule, self._rules = Schedule.of(sampling), step_rules(sampling)
        self._temperatures = torch.stack([schedule.temperature(n) for n in range(1, sampling.steps + 1)]).to(device)

        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.long, device=device)

        self.tokens, self.prompts, self.canvases = integers(num_rows, 0), integers(num_rows), integers(num_rows)
        self.chosen, self.number, self.unchanged = integers(count), integers(count, fill=1), integers(count)
        self.canvas, self.argmax = integers(count, self.length), integers(count, self.length, fill=-1)
        self.signal = torch.zeros(count, self.length, network.config.hidden_size, device=device)
        first = torch.Generator().manual_seed(seed)
        self.limit = torch.randint(1, self._oldest + 1, (count,), generator=first).to(device)
        self.past, self.serial = integers(count, fill=RESTART), integers(count, fill=-1)
        self.ended = torch.ones(count, dtype=torch.bool, device=device)

    @property
    def _oldest(self) -> int:
        return min(self.objective.max_trajectory_steps, self.sampling.steps)

    def seed_of(self, serial: int) -> int:
        """The sampler's seed of a trajectory."""
        return ((self.seed & LOW) << 32) + serial

    def rows(self, new_rows: TrainingBatch, step: int, symmetries: Symmetries | None = None) -> TrainingBatch:
        """The rows of a step: those in progress, and where one is done the row of the same index in `new_rows`.

        Slots that ended when they were last advanced restart, on their row or on the new one. `symmetries`: of a
        `SymmetricSource`; each row and the states of its slots are then shown under one of them.
        """
        self._first = step % self.objective.row_groups * self._rows
        group = slice(self._first, self._first + self._rows)
        slots = self.slots(torch.arange(self._rows))
        done = self.ended[slots].view(-1, self.per_row).all(1)
        width = max(new_rows.tokens.shape[1], self.tokens.shape[1])
        self.tokens, new = (F.pad(x, (0, width - x.shape[1])) for x in (self.tokens, new_rows.tokens.to(done.device)))
        self.tokens[group] = torch.where(done[:, None], new, self.tokens[group])
        self.prompts[group] = torch.where(done, new_rows.prompts.to(done.device), self.prompts[group])
        self.canvases[group] = torch.where(done, new_rows.canvases.to(done.device), self.canvases[group])
        of_done = done.repeat_interleave(self.per_row)
        self._begin(slots[of_done | (self.past[slots] == RESTART)], step)
        self.ended[slots] &= ~of_done
        now = TrainingBatch(self.tokens[group], self.prompts[group], self.canvases[group])
        if symmetries is not None:
            self._move(group, slots, symmetries(now, step).to(done.device))
            now = replace(now, tokens=self.tokens[group])
        return now.part(torch.arange(self._rows, device=done.device), int(now.lengths(self.length).max()))

    def slots(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " slots"]:
        """The slot indices of some rows of the step."""
        rows = rows.to(self.canvas.device) + self._first
        return (rows[:, None] * self.per_row + torch.arange(self.per_row, device=rows.device)).flatten()

    def visited(self, rows: Int[Tensor, " rows"]) -> Visited:
        """The states that the slots of some rows of the step are trained on."""
        slots = self.slots(rows)
        row = slots // self.per_row
        starts = self.prompts[row] + self.chosen[slots] * self.length
        positions = starts[:, None] + torch.arange(self.length, device=starts.device)
        return Visited(starts, self.tokens[row].gather(1, positions), self.canvas[slots], self.signal[slots])

    @torch.no_grad()
    def advance(
        self, network: Network, rows: Int[Tensor, " rows"], logits: Float32[Tensor, "slots canvas vocab"]
    ) -> None:
        """One sampler step for the slots of some rows of the step, whose canvases gave these logits."""
        slots = self.slots(rows)
        number, indices = self.number[slots], torch.arange(len(slots), device=slots.device)
        scaled = logits.float() / self._temperatures[number - 1][:, None, None]
        draws, signal = self._draws(slots), network.soft_embedding(scaled).float()
        output = DenoiserOutput(
            argmax=scaled.argmax(-1),
            sample=draws.sample(indices, number, scaled),
            entropy=vocabulary.entropy(scaled),
            signal=signal,
        )
        noise = draws.noise(indices, number)
        result = update(output, noise, self.argmax[slots], self.unchanged[slots], *self._rules)
        self.canvas[slots], self.signal[slots] = result.canvas, signal
        self.argmax[slots], self.unchanged[slots], self.number[slots] = output.argmax, result.unchanged, number + 1
        past = self.past[slots] + (result.settled | (self.past[slots] > 0))
        over = (past > self.objective.steps_past_settling) | (number >= self.limit[slots])
        self.past[slots] = torch.where(over, RESTART, past)
        self.ended[slots] |= over

    def state(self) -> dict[str, Tensor]:
        """All tensors of the state, to be saved."""
        return {name: getattr(self, name) for name in (*ROW_STATE, *SLOT_STATE)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved `state`.

        Raises:
            ValueError: it has another number of slots or another canvas length. KeyError: a tensor is missing.
        """
        for name in (*ROW_STATE, *SLOT_STATE):
            current, saved = getattr(self, name), state[name]
            if name != "tokens" and current.shape != saved.shape:
                raise ValueError(f"rollouts: {name} is {list(saved.shape)}, {list(current.shape)} is needed")
            setattr(self, name, saved.to(current.device))

    def share(self, rows: Int[Tensor, " rows"]) -> None:
        """Copy from every other process the state of its rows of the step; `rows` are this process's."""
        slots = self.slots(torch.arange(self._rows))
        owned = torch.isin(slots, self.slots(rows))
        for name in SLOT_STATE:
            whole = getattr(self, name)
            whole[slots] = parallel.merge(whole[slots], owned)

    def _move(self, group: slice, slots: Int[Tensor, " slots"], sources: Int[Tensor, "rows length"]) -> None:
        """Move the tokens of some rows and the states of their slots: each position takes what `sources` says."""
        self.tokens[group] = self.tokens[group].gather(1, sources)
        row = slots // self.per_row
        starts = (self.prompts[row] + self.chosen[slots] * self.length)[:, None]
        own = torch.arange(self.length, device=starts.device) + starts
        sources = sources.repeat_interleave(self.per_row, 0).gather(1, own) - starts
        self.canvas[slots] = self.canvas[slots].gather(1, sources)
        self.argmax[slots] = self.argmax[slots].gather(1, sources)
        self.signal[slots] = self.signal[slots].gather(1, sources[:, :, None].expand_as(self.signal[slots]))

    def _draws(self, slots: Int[Tensor, " slots"]) -> KeyedDraws:
        serial = self.serial[slots]
        high = torch.full_like(serial, self.seed & LOW)
        return KeyedDraws.from_words(serial & LOW, high, self.chosen[slots], length=self.length, vocab=self.vocab)

    def _begin(self, slots: Int[Tensor, " slots"], step: int) -> None:
        """Start a new trajectory in these slots at this step."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        share = torch.rand(len(self.canvas), generator=generator).to(slots.device)[slots]
        canvases = self.canvases[slots // self.per_row]
        self.chosen[slots] = (share * canvases).long().clamp(max=canvases - 1)
        self.limit[slots] = torch.where(self.serial[slots] < 0, self.limit[slots], self._oldest)
        self.serial[slots] = step * self._rows * self.per_row + slots - self._first * self.per_row
        indices = torch.arange(len(slots), device=slots.device)
        self.canvas[slots] = self._draws(slots).noise(indices, 0)
        self.argmax[slots], self.signal[slots] = -1, 0.0
        self.unchanged[slots], self.number[slots], self.past[slots] = 0, 1, 0
