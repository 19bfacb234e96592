"""On-policy states: trajectories of the real sampler that training follows, one sampler step a training step.

    slot        canvas, signal, last argmax, step number          a trajectory under way
    train       the network reads a slot's canvas under its signal; cross-entropy to the true tokens
    advance     the same logits, without gradient, move the slot on as the sampler would: no forward of its own

Corruption that is drawn shows the network errors at random places; the sampler shows it its own, which it believes in.
A slot begins anew from noise once it has settled or is old, and a row is replaced by a fresh one when each of its slots
has come to an end. The first trajectories end at random ages, so that slots are of all ages from then on. Training
steps take turns among groups of rows: rows that come at every step are learnt by heart while they are solved.

Invariant: under fixed weights a slot visits the canvases that `generate` visits for the same prompt and `seed_of`.
All state is in tensors (`state`), so that a resumed run goes on to the bit.
Run it:  python -m pytest tests/train/test_rollouts.py
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int
from torch import Tensor
from torch.nn import functional as F

from blockpress.config import Sampling
from blockpress.diffusion import DenoiserOutput, KeyedDraws, Schedule, step_rules, update
from blockpress.diffusion.noise import LOW
from blockpress.model import Network
from blockpress.ops import vocabulary
from blockpress.train import parallel
from blockpress.train.objective import Objective, TrainingBatch, Visited

HELD = ("tokens", "prompts", "canvases")
OVER = -1  # in place of the steps that a slot has gone on for since it settled: it begins anew
SLOTS = ("chosen", "canvas", "signal", "argmax", "unchanged", "number", "limit", "past", "ended", "serial")


class Rollouts:
    """The slots of a run: `objective.groups` groups of `rows` rows, `objective.on_policy` slots a row, in row order.

    Args:
        network: its shapes and device; its weights are handed to `advance`.
        rows: of one training step; step n takes group n modulo their number, and its rows are numbered from 0.
        seed: of the choices and the noise. Trajectory number n of the run has the sampler's seed `seed_of(n)`.
    """

    def __init__(self, network: Network, objective: Objective, sampling: Sampling, rows: int, seed: int) -> None:
        self.objective, self.sampling, self.seed = objective, sampling, seed
        self.length, self.vocab = network.config.canvas_length, network.config.vocab_size
        self.each, self._rows, self._first = objective.on_policy, rows, 0
        held = rows * objective.groups
        count, device = held * self.each, network.device
        schedule, self._rules = Schedule.of(sampling), step_rules(sampling)
        self._temperatures = torch.stack([schedule.temperature(n) for n in range(1, sampling.steps + 1)]).to(device)

        def whole(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.long, device=device)

        self.tokens, self.prompts, self.canvases = whole(held, 0), whole(held), whole(held)
        self.chosen, self.number, self.unchanged = whole(count), whole(count, fill=1), whole(count)
        self.canvas, self.argmax = whole(count, self.length), whole(count, self.length, fill=-1)
        self.signal = torch.zeros(count, self.length, network.config.hidden_size, device=device)
        first = torch.Generator().manual_seed(seed)
        self.limit = torch.randint(1, self._oldest + 1, (count,), generator=first).to(device)
        self.past, self.serial = whole(count, fill=OVER), whole(count, fill=-1)
        self.ended = torch.ones(count, dtype=torch.bool, device=device)

    @property
    def _oldest(self) -> int:
        return min(self.objective.ages, self.sampling.steps)

    def seed_of(self, serial: int) -> int:
        """The sampler's seed of a trajectory."""
        return ((self.seed & LOW) << 32) + serial

    def rows(self, fresh: TrainingBatch, step: int) -> TrainingBatch:
        """The rows of a step: those under way, and in the places of those that are done the fresh ones of that place.

        Slots that came to an end when they were last advanced begin anew, on their row or on the fresh one.
        """
        self._first = step % self.objective.groups * self._rows
        own = slice(self._first, self._first + self._rows)
        slots = self.slots(torch.arange(self._rows))
        done = self.ended[slots].view(-1, self.each).all(1)
        width = max(fresh.tokens.shape[1], self.tokens.shape[1])
        self.tokens, new = (F.pad(x, (0, width - x.shape[1])) for x in (self.tokens, fresh.tokens.to(done.device)))
        self.tokens[own] = torch.where(done[:, None], new, self.tokens[own])
        self.prompts[own] = torch.where(done, fresh.prompts.to(done.device), self.prompts[own])
        self.canvases[own] = torch.where(done, fresh.canvases.to(done.device), self.canvases[own])
        of_done = done.repeat_interleave(self.each)
        self._begin(slots[of_done | (self.past[slots] == OVER)], step)
        self.ended[slots] &= ~of_done
        now = TrainingBatch(self.tokens[own], self.prompts[own], self.canvases[own])
        return now.part(torch.arange(self._rows, device=done.device), int(now.lengths(self.length).max()))

    def slots(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " slots"]:
        """The numbers of the slots of some rows of the step."""
        rows = rows.to(self.canvas.device) + self._first
        return (rows[:, None] * self.each + torch.arange(self.each, device=rows.device)).flatten()

    def visited(self, rows: Int[Tensor, " rows"]) -> Visited:
        """What the slots of some rows of the step are to be trained on."""
        slots = self.slots(rows)
        row = slots // self.each
        starts = self.prompts[row] + self.chosen[slots] * self.length
        place = starts[:, None] + torch.arange(self.length, device=starts.device)
        return Visited(starts, self.tokens[row].gather(1, place), self.canvas[slots], self.signal[slots])

    @torch.no_grad()
    def advance(
        self, network: Network, rows: Int[Tensor, " rows"], logits: Float32[Tensor, "slots canvas vocab"]
    ) -> None:
        """One step of the sampler for the slots of some rows of the step, whose canvases gave these logits."""
        slots = self.slots(rows)
        number, everyone = self.number[slots], torch.arange(len(slots), device=slots.device)
        scaled = logits.float() / self._temperatures[number - 1][:, None, None]
        draws = self._draws(slots)
        reading = DenoiserOutput(
            argmax=scaled.argmax(-1),
            sample=draws.sample(everyone, number, scaled),
            entropy=vocabulary.entropy(scaled),
            signal=network.soft_embedding(scaled).float(),
        )
        noise = draws.noise(everyone, number)
        done = update(reading, noise, self.argmax[slots], self.unchanged[slots], *self._rules)
        self.canvas[slots], self.signal[slots] = done.canvas, reading.signal
        self.argmax[slots], self.unchanged[slots], self.number[slots] = reading.argmax, done.unchanged, number + 1
        past = self.past[slots] + (done.settled | (self.past[slots] > 0))
        over = (past > self.objective.past) | (number >= self.limit[slots])
        self.past[slots] = torch.where(over, OVER, past)
        self.ended[slots] |= over

    def state(self) -> dict[str, Tensor]:
        """All of it, to be saved."""
        return {name: getattr(self, name) for name in (*HELD, *SLOTS)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved `state`.

        Raises:
            ValueError: it is of another number of slots or another canvas. KeyError: a part is missing.
        """
        for name in (*HELD, *SLOTS):
            mine, kept = getattr(self, name), state[name]
            if name != "tokens" and mine.shape != kept.shape:
                raise ValueError(f"rollouts: {name} is {list(kept.shape)}, {list(mine.shape)} is needed")
            setattr(self, name, kept.to(mine.device))

    def share(self, rows: Int[Tensor, " rows"]) -> None:
        """Take from every other process what it has made of its rows of the step; `rows` are this one's."""
        slots = self.slots(torch.arange(self._rows))
        own = torch.isin(slots, self.slots(rows))
        for name in SLOTS:
            whole = getattr(self, name)
            whole[slots] = parallel.merge(whole[slots], own)

    def _draws(self, slots: Int[Tensor, " slots"]) -> KeyedDraws:
        serial = self.serial[slots]
        high = torch.full_like(serial, self.seed & LOW)
        return KeyedDraws.from_words(serial & LOW, high, self.chosen[slots], length=self.length, vocab=self.vocab)

    def _begin(self, slots: Int[Tensor, " slots"], step: int) -> None:
        """Slots begin a trajectory in this step."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        share = torch.rand(len(self.canvas), generator=generator).to(slots.device)[slots]
        canvases = self.canvases[slots // self.each]
        self.chosen[slots] = (share * canvases).long().clamp(max=canvases - 1)
        self.limit[slots] = torch.where(self.serial[slots] < 0, self.limit[slots], self._oldest)
        self.serial[slots] = step * self._rows * self.each + slots - self._first * self.each
        everyone = torch.arange(len(slots), device=slots.device)
        self.canvas[slots] = self._draws(slots).noise(everyone, 0)
        self.argmax[slots], self.signal[slots] = -1, 0.0
        self.unchanged[slots], self.number[slots], self.past[slots] = 0, 1, 0
