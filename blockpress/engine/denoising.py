"""One denoising step of many canvases as tensors alone, each canvas at a step of its own.

    numbers --Canvases--> where each canvas waits, its seed, its step, its limits
    slots --begin--> rows of the stack      ... stack ...      hidden --finish--> slots, what the step did

Between the numbers and what is told no value decides what the processor does: no shape depends on one, none is waited
for. So one captured graph serves every step of as many canvases, and an eager forward runs the same lines.

Invariant: the slots change in the last lines of `finish_step`, and only those of its canvases.
Run it:  python -m pytest tests/engine/test_runner.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

from blockpress.config import Sampling
from blockpress.diffusion import (
    Accept,
    DenoiserOutput,
    EntropyBound,
    KeyedDraws,
    Pins,
    Schedule,
    Settle,
    StableAndConfident,
    update,
)
from blockpress.diffusion.noise import LOW
from blockpress.diffusion.update import check_answer
from blockpress.engine.batch import Part
from blockpress.engine.canvas_state import CanvasState, StepFeatures, slot_of
from blockpress.engine.options import SoftEmbedding
from blockpress.engine.request import Request
from blockpress.model import Network
from blockpress.ops import vocabulary
from blockpress.ops.transfer import to_device

Numbers = Int64[Tensor, "canvases fields"]
Flat = Float[Tensor, "1 rows hidden"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CanvasBatch:
    """Canvases as a step sees them, an entry each.

    slot: where it waits. context: tokens before it. rows: its length, or 0 for an entry that is nobody's. low, high: of
    its seed. canvas: its number among the row's. number: the step, from 1. last: whether it may have no other.
    stability, temperature, bound, confidence: as `Sampling` and `Schedule` have them.
    """

    slot: Int[Tensor, " canvases"]
    context: Int[Tensor, " canvases"]
    rows: Int[Tensor, " canvases"]
    low: Int[Tensor, " canvases"]
    high: Int[Tensor, " canvases"]
    canvas: Int[Tensor, " canvases"]
    number: Int[Tensor, " canvases"]
    last: Bool[Tensor, " canvases"]
    stability: Int[Tensor, " canvases"]
    temperature: Float32[Tensor, " canvases"]
    bound: Float32[Tensor, " canvases"]
    confidence: Float32[Tensor, " canvases"]

    @classmethod
    def of(cls, numbers: Numbers) -> CanvasBatch:
        """From what `packed_entry` and `padding_entry` wrote; further columns are left alone."""
        columns = numbers[:, :FIELDS].t().contiguous()
        whole, real = columns[:9], columns[9:].view(torch.float64).float()
        slot, context, rows, low, high, canvas, number, last, stability = whole
        return cls(
            slot=slot,
            context=context,
            rows=rows,
            low=low,
            high=high,
            canvas=canvas,
            number=number,
            last=last != 0,
            stability=stability,
            temperature=real[0],
            bound=real[1],
            confidence=real[2],
        )


FIELDS = 12


def packed_entry(part: Part) -> list[int]:
    """A canvas's numbers, floats as the bits of their float64."""
    request, sampling, number = part.request, part.request.sampling, part.request.step + 1
    assert isinstance(sampling, Sampling), "only diffusion has canvases"
    seed = request.row.seed
    whole = [
        slot_of(request),
        part.first,
        part.stop - part.start,
        seed & LOW,
        seed >> 32 & LOW,
        request.row.canvas_number,
    ]
    real = (Schedule.of(sampling).temperature(number).item(), sampling.entropy_bound, sampling.confidence)
    return [*whole, number, number == sampling.steps, sampling.stability, *map(_bits, real)]


def padding_entry(spare: int) -> list[int]:
    """The numbers of an entry that is nobody's, at the slot that is nobody's."""
    return [spare, *[0] * 5, 1, 0, 0, *[_bits(1.0)] * 3]


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """What `finish_step` has to know of a step that was begun; `x` are the rows of the stack."""

    x: Flat
    argmax: Int[Tensor, "canvases canvas"]
    unchanged: Int[Tensor, " canvases"]
    noise: Int[Tensor, "canvases canvas"]
    uniform: Float64[Tensor, "canvases canvas"]
    pins: Pins | None


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOutputs:
    """What a step did to its canvases.

    host_words: what the host waits for, per canvas: settled, steps done, whether every number is finite, and the
    argmax canvas, all integers.
    """

    argmax: Int[Tensor, "canvases canvas"]
    accepted: Bool[Tensor, "canvases canvas"]
    entropy: Float32[Tensor, "canvases canvas"]
    changed: Bool[Tensor, "canvases canvas"]
    host_words: Int64[Tensor, "canvases told"]


def begin_step(network: Network, slots: CanvasState, canvases: CanvasBatch, features: StepFeatures) -> StepInputs:
    """Embed and condition the canvases; those at step 1 are noise without a signal."""
    config, at = network.config, canvases.slot
    draws = KeyedDraws.from_words(
        canvases.low, canvases.high, canvases.canvas, length=slots.length, vocab=config.vocab_size
    )
    first, noise, uniform = draws.of_step(canvases.number)
    pins, every = None, torch.arange(len(at), device=at.device)
    if features.pinned:
        tokens = slots.pins.index_select(0, at)
        pins = Pins(tokens, network.embed(tokens.clamp(min=0)))
        first, noise = pins.hold(every, first), pins.hold(every, noise)
    canvas, signal = slots.canvas.index_select(0, at), slots.signal.index_select(0, at)
    argmax, unchanged = slots.argmax.index_select(0, at), slots.unchanged.index_select(0, at)
    if features.begins:
        fresh = canvases.number == 1
        canvas = torch.where(fresh[:, None], first, canvas)
        signal = signal.masked_fill(fresh[:, None, None], 0)
        argmax, unchanged = argmax.masked_fill(fresh[:, None], -1), unchanged.masked_fill(fresh, 0)
    x = network.condition(canvas, signal).flatten(0, 1)[None]
    return StepInputs(x=x, argmax=argmax, unchanged=unchanged, noise=noise, uniform=uniform, pins=pins)


def finish_step(
    network: Network,
    slots: CanvasState,
    canvases: CanvasBatch,
    features: StepFeatures,
    inputs: StepInputs,
    hidden: Float[Tensor, "rows hidden"],
    signal: SoftEmbedding,
    requests: Sequence[Request] = (),
) -> StepOutputs:
    """Read the canvases' final hidden states, and put what the next step begins with into their slots.

    `requests` are those of the canvases; they may be left out where none has rules of its own.
    """
    at, count, length = canvases.slot, len(canvases.slot), slots.length
    seen = vocabulary.sample_from_hidden(
        hidden,
        network.embed_tokens.weight,
        cap=network.config.softcap,
        temperature=canvases.temperature[:, None].expand(-1, length).flatten(),
        uniform=inputs.uniform.flatten(),
        banned=(slots.ids, slots.banned.index_select(0, at).flatten(0, 1)) if features.banned else None,
        signal=signal,
        scale=network.embed_scale(),
    )
    reading = DenoiserOutput.of(seen, count)
    if inputs.pins is not None:
        reading = inputs.pins(torch.arange(count, device=at.device), reading)
    accept, settle = custom_rules(canvases, requests)
    done = update(reading, inputs.noise, inputs.argmax, inputs.unchanged, accept, settle)
    flags = torch.stack((done.settled, done.settled | canvases.last, reading.entropy.isfinite().all(-1)), dim=1)
    told = torch.cat((flags.long(), reading.argmax), dim=1)
    slots.canvas.index_copy_(0, at, done.canvas)
    slots.signal.index_copy_(0, at, reading.signal)
    slots.argmax.index_copy_(0, at, reading.argmax)
    slots.unchanged.index_copy_(0, at, done.unchanged)
    return StepOutputs(
        argmax=reading.argmax, accepted=done.accepted, entropy=reading.entropy, changed=done.changed, host_words=told
    )


def custom_rules(canvases: CanvasBatch, requests: Sequence[Request]) -> tuple[Accept, Settle]:
    """When each canvas accepts and settles: by its numbers, or by the rule that its request brings along."""
    accept: Accept = EntropyBound(canvases.bound[:, None])
    settle: Settle = StableAndConfident(canvases.stability, canvases.confidence)
    samplings = [request.sampling for request in requests if isinstance(request.sampling, Sampling)]
    if not samplings:
        return accept, settle
    accepts, settles = [own.accept for own in samplings], [own.settle for own in samplings]
    return CustomRules("accept", accept, accepts), CustomRules("settle", settle, settles)


@dataclass(frozen=True, eq=False)
class CustomRules:
    """A rule for all canvases but those that have one of their own; canvases that share a rule are asked together."""

    name: str
    common: Callable[..., Tensor]
    custom: Sequence[Callable[..., Tensor] | None]

    def __call__(self, *given: Tensor) -> Tensor:
        answer = self.common(*given)
        for rule in {id(rule): rule for rule in self.custom if rule is not None}.values():
            rows = to_device(torch.tensor([row for row, own in enumerate(self.custom) if own is rule]), answer.device)
            found = check_answer(self.name, rule(*(each[rows] for each in given)), answer[rows])
            answer = answer.index_copy(0, rows, found)
        return answer
