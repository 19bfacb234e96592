"""The training objective: denoise one corrupted canvas of a row, and predict the row's next tokens causally.

    row       p p p p | a a a a | a a a e        prompt, then canvases; the last is padded with eos, which is trained
    causal    --------------------------->       one pass over the clean row: keys, values, next-token loss
    canvas              x a x a                  one canvas, each token replaced with probability t by a random one
    context   p p p p                            what it attends to: everything strictly before it, never its clean text

    L = CE(canvas, every position alike) + causal_weight * CE(next token, the whole row)

A first denoising pass without gradient gives logits that condition the second with probability `self_conditioning`;
the loss is on the second only. Gradients flow through the context's keys and values. On-policy draws are not corrupted
answers but canvases that the sampler has reached, read with the self-conditioning embedding that it carries
(`rollouts.py`).
Source: technical report, section 8; reference model, section 6. On-policy draws are this package's own.

Invariant: a draw is a function of the generator passed in, so a step can be repeated from (seed, step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn import functional as F

from blockpress.errors import ConfigError, renamed_fields
from blockpress.model import Network
from blockpress.model.masks import canvas_mask, causal_mask
from blockpress.model.network import CachedAttention

Denoise = Callable[[Tensor | slice, Tensor | None], Tensor]

_OLDER = {"ages": "max_trajectory_steps", "past": "steps_past_settling", "groups": "row_groups"}  # until version 0.3


@renamed_fields(**_OLDER)
@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is drawn for each row, and how the parts of the loss weigh.

    draws: canvases for one causal pass over a row. time_range: bounds of t. self_conditioning: the share of corrupted
    draws whose second pass is conditioned. causal_weight: weight of the next-token loss; at 0 it is not computed, nor
    any context that no canvas attends to. stratified: spread t and the conditioned draws evenly over the batch; each
    draw keeps its distribution, the step's loss varies less.
    on_policy: how many of the draws are states of the sampler; the others are corrupted answers. max_trajectory_steps:
    most steps of a trajectory before it restarts. steps_past_settling: how many it continues for after it has settled.
    row_groups: how many groups of rows have trajectories in progress; training steps take them in turn.
    symmetries: at each visit a row and its trajectories are shown under another symmetry of the task, which the source
    must know: a row that looks the same at each visit is memorised while its trajectories last.
    """

    draws: int = 1
    time_range: tuple[float, float] = (1e-4, 1 - 1e-4)
    self_conditioning: float = 0.5
    causal_weight: float = 1.0
    stratified: bool = False
    on_policy: int = 0
    max_trajectory_steps: int = 16
    steps_past_settling: int = 0
    row_groups: int = 1
    symmetries: bool = False

    def __post_init__(self) -> None:
        low, high = self.time_range
        for ok, name, need in (
            (self.draws >= 1, "draws", "at least 1"),
            (0 <= low < high <= 1, "time_range", "two numbers from 0 to 1, the lower first"),
            (0 <= self.self_conditioning <= 1, "self_conditioning", "a probability"),
            (self.causal_weight >= 0, "causal_weight", "0 or more"),
            (0 <= self.on_policy <= self.draws, "on_policy", f"from 0 to draws, {self.draws}"),
            (self.max_trajectory_steps >= 1, "max_trajectory_steps", "at least 1"),
            (self.steps_past_settling >= 0, "steps_past_settling", "0 or more steps"),
            (self.row_groups >= 1, "row_groups", "at least 1"),
        ):
            if not ok:
                raise ConfigError(f"objective field {name} is {getattr(self, name)!r}", hint=f"{name} must be {need}")


def rename_saved(saved: Any) -> Any:
    """What a run saved of its settings, in its state or `training.json`, with today's names of `Objective`'s fields."""
    if isinstance(saved, list):
        return [rename_saved(each) for each in saved]
    if not isinstance(saved, dict):
        return saved
    objective = {_OLDER.get(name, name): value for name, value in saved.get("objective", {}).items()}
    return {name: objective if name == "objective" else rename_saved(value) for name, value in saved.items()}


@dataclass(frozen=True)
class TrainingBatch:
    """Clean rows: prompt, then whole canvases; right-padded to the longest."""

    tokens: Int[Tensor, "rows length"]
    prompts: Int[Tensor, " rows"]
    canvases: Int[Tensor, " rows"]

    def lengths(self, canvas_length: int) -> Int[Tensor, " rows"]:
        return self.prompts + self.canvases * canvas_length

    def part(self, chosen: Int[Tensor, " some"], longest: int) -> TrainingBatch:
        """The rows with these numbers, their tokens cut to `longest`."""
        return TrainingBatch(self.tokens[chosen, :longest], self.prompts[chosen], self.canvases[chosen])


@dataclass(frozen=True)
class Visited:
    """States of the sampler, `on_policy` for each row, in row order: where the canvas starts in its row, its true
    tokens, its current tokens, and the self-conditioning embedding that its last step left."""

    starts: Int[Tensor, " visited"]
    clean: Int[Tensor, "visited canvas"]
    canvas: Int[Tensor, "visited canvas"]
    signal: Float32[Tensor, "visited canvas hidden"]


@dataclass(frozen=True)
class Draw:
    """What one step drew: for every row `draws` canvases, in row order; `conditioned` indexes the conditioned ones.

    visited: indexes the on-policy ones; signal: their self-conditioning embeddings, one after another.
    """

    starts: Int[Tensor, " drawn"]
    clean: Int[Tensor, "drawn canvas"]
    noisy: Int[Tensor, "drawn canvas"]
    conditioned: Int[Tensor, " chosen"]
    visited: Int[Tensor, " visited"] | None = None
    signal: Float32[Tensor, "visited canvas hidden"] | None = None


@dataclass(frozen=True)
class Losses:
    """Both losses, in nats a token; the share of positions whose argmax is right; the logits of on-policy draws."""

    canvas: Float32[Tensor, ""]
    causal: Float32[Tensor, ""]
    accuracy: Float32[Tensor, ""]
    logits: Float32[Tensor, "visited canvas vocab"] | None = None


def draw_batch(
    rows: TrainingBatch,
    canvas_length: int,
    vocab: int,
    objective: Objective,
    generator: torch.Generator,
    visited: Visited | None = None,
) -> Draw:
    """Choose canvases, times, corrupted tokens and the conditioned share of one step; `visited` joins them.

    Args:
        generator: on any device: what it draws is moved to the rows' device.
        visited: `objective.on_policy` states for every row.
    """
    per_row = objective.draws - objective.on_policy
    device, count = rows.tokens.device, len(rows.tokens) * per_row

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=generator.device).to(device)

    def shuffled() -> Tensor:
        return torch.randperm(count, generator=generator, device=generator.device).to(device)

    canvases = rows.canvases.repeat_interleave(per_row)
    chosen = (uniform(count) * canvases).long().clamp(max=canvases - 1)
    starts = rows.prompts.repeat_interleave(per_row) + chosen * canvas_length
    positions = starts[:, None] + torch.arange(canvas_length, device=device)
    clean = rows.tokens.repeat_interleave(per_row, 0).gather(1, positions)
    order = shuffled()
    times = (order + uniform(1)) / max(1, count) if objective.stratified else uniform(count)
    low, high = objective.time_range
    times = low + (high - low) * times
    noise = (uniform(count, canvas_length) * vocab).long().clamp(max=vocab - 1)
    noisy = torch.where(uniform(count, canvas_length) < times[:, None], noise, clean)
    coins = shuffled() / max(1, count) if objective.stratified else uniform(count)
    conditioned = (coins < objective.self_conditioning).nonzero().squeeze(1)
    if visited is None:
        return Draw(starts, clean, noisy, conditioned)
    index = torch.arange(len(rows.tokens) * objective.draws, device=device).view(-1, objective.draws)

    def join(drawn: Tensor, states: Tensor) -> Tensor:
        """Row by row: the corrupted draws, then the sampler's states."""
        parts = (x.reshape(len(rows.tokens), -1 if len(x) else 0, *x.shape[1:]) for x in (drawn, states))
        return torch.cat(tuple(parts), 1).flatten(0, 1)

    return Draw(
        starts=join(starts, visited.starts),
        clean=join(clean, visited.clean),
        noisy=join(noisy, visited.canvas),
        conditioned=index[:, :per_row].flatten()[conditioned],
        visited=index[:, per_row:].flatten(),
        signal=visited.signal,
    )


def losses(network: Network, rows: TrainingBatch, drawn: Draw, objective: Objective) -> Losses:
    """Both parts of the loss for one step's draw; takes and returns tensors only, so that it compiles.

    Without a causal loss the rows' tokens may end where the last canvas starts.
    """
    config = network.config
    length = rows.tokens.shape[1]
    positions = torch.arange(length, device=rows.tokens.device).expand(len(rows.tokens), length)
    no_padding = torch.zeros_like(rows.prompts)
    causal_masks = {
        layer.kind: causal_mask(no_padding[:1], 0, length, config.sliding_window if layer.sliding else None)
        for layer in config.layers
    }
    causal_attention = [
        CachedAttention(None, causal_masks[layer.kind], network.attention_op) for layer in config.layers
    ]
    hidden = network.run(network.embed(rows.tokens), positions, causal_attention, causal=True)
    causal = next_token_loss(network, hidden, rows) if objective.causal_weight else hidden.new_zeros(()).float()

    contexts = [tuple(x.repeat_interleave(objective.draws, 0) for x in layer.new_kv) for layer in causal_attention]
    canvas = drawn.noisy.shape[1]
    masks = {
        layer.kind: canvas_mask(drawn.starts, length, canvas, config.sliding_window if layer.sliding else None)
        for layer in config.layers
    }
    canvas_positions = drawn.starts[:, None] + torch.arange(canvas, device=drawn.starts.device)

    def denoise(rows: Tensor | slice, signal: Tensor | None) -> Tensor:
        attention = [
            CachedAttention((key[rows], value[rows]), masks[layer.kind][rows], network.attention_op)
            for layer, (key, value) in zip(config.layers, contexts, strict=True)
        ]
        x = network.condition(drawn.noisy[rows], signal)
        return network.logits(network.run(x, canvas_positions[rows], attention, causal=False))

    logits = denoise(slice(None), signals(network, denoise, drawn))
    canvas_loss = F.cross_entropy(logits.flatten(0, 1), drawn.clean.flatten())
    right = (logits.argmax(-1) == drawn.clean).float().mean()
    visited_logits = None if drawn.visited is None else logits.detach()[drawn.visited]
    return Losses(canvas_loss, causal, right, visited_logits)


def signals(network: Network, denoise: Denoise, drawn: Draw) -> Float[Tensor, "drawn canvas hidden"]:
    """The self-conditioning embedding of each draw: from a pass without gradient for the conditioned ones, the carried
    one for the sampler's states, exact zeros for the others."""
    hidden = network.config.hidden_size
    signal = torch.zeros(*drawn.noisy.shape, hidden, dtype=network.dtype, device=network.device)
    if drawn.visited is not None and drawn.signal is not None:
        signal = signal.index_copy(0, drawn.visited, drawn.signal.to(signal.dtype))
    if len(drawn.conditioned) == 0:
        return signal
    with torch.no_grad():
        embedding = network.soft_embedding(denoise(drawn.conditioned, None))
    return signal.index_copy(0, drawn.conditioned, embedding.to(signal.dtype))


def next_token_loss(
    network: Network, hidden: Float[Tensor, "rows length hidden"], rows: TrainingBatch
) -> Float32[Tensor, ""]:
    """Cross-entropy of every next token of the clean row, in nats: the mean of each row, then over rows."""
    logits = network.logits(hidden[:, :-1])
    target = rows.tokens[:, 1:]
    positions = torch.arange(1, rows.tokens.shape[1], device=target.device)
    real = (positions < rows.lengths(network.config.canvas_length)[:, None]).float()
    per_token = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(real)
    return ((per_token * real).sum(1) / real.sum(1)).mean()
