"""One denoising step of many canvases in tensor operations only, each canvas at a step of its own.

    numbers --CanvasBatch--> the slot of each canvas, its seed, its step, its limits
    slots --begin_step--> rows of the stack      ... stack ...      hidden --finish_step--> slots, step outputs

From the numbers to the outputs, no shape depends on a value and nothing waits for the device. So one captured graph
serves every step of that many canvases, and an eager forward runs the same lines.

Invariant: slots change only in the last lines of `finish_step`, and only those of its canvases.
Run it:  python -m pytest tests/engine/test_runner.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

from blockpress.config import Sampling
from blockpress.decoding.edits import canvas_changes, truncation_of
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
from blockpress.diffusion.pins import UNPINNED, put_in
from blockpress.diffusion.update import check_answer
from blockpress.engine.batch import Part
from blockpress.engine.canvas_state import CanvasState, StepFeatures, needs_own_pass, slot_of
from blockpress.engine.options import SoftEmbedding
from blockpress.engine.request import Request
from blockpress.model import Network
from blockpress.ops import vocabulary
from blockpress.ops.transfer import to_device
from blockpress.ops.vocabulary import Room, SampleStats

Numbers = Int64[Tensor, "canvases fields"]
Flat = Float[Tensor, "1 rows hidden"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CanvasBatch:
    """The canvases of a step, one entry each.

    slot: its row in `CanvasState`. context: tokens before it. rows: its length, or 0 for padding. low, high: the halves
    of its seed. canvas: what keys its draws (`SequenceState.canvas_number`). number: the step, from 1. last: whether it
    is the last one allowed. greedy: whether likeliest tokens are kept, not samples. The others:
    stability, temperature, bound, confidence: from `Sampling` and `Schedule`.
    """

    slot: Int[Tensor, " canvases"]
    context: Int[Tensor, " canvases"]
    rows: Int[Tensor, " canvases"]
    low: Int[Tensor, " canvases"]
    high: Int[Tensor, " canvases"]
    canvas: Int[Tensor, " canvases"]
    number: Int[Tensor, " canvases"]
    last: Bool[Tensor, " canvases"]
    greedy: Bool[Tensor, " canvases"]
    stability: Int[Tensor, " canvases"]
    temperature: Float32[Tensor, " canvases"]
    bound: Float32[Tensor, " canvases"]
    confidence: Float32[Tensor, " canvases"]

    @classmethod
    def of(cls, numbers: Numbers) -> CanvasBatch:
        """From entries of `packed_entry` and `padding_entry`; further columns are ignored."""
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
            last=last & 1 != 0,
            greedy=last & 2 != 0,
            stability=stability,
            temperature=real[0],
            bound=real[1],
            confidence=real[2],
        )


FIELDS = 12


def packed_entry(part: Part) -> list[int]:
    """A canvas's numbers, with floats as the bits of their float64."""
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
    schedule = Schedule.of(sampling, request.row.skipped_steps(sampling.steps))
    real = (schedule.temperature(number).item(), sampling.entropy_bound, sampling.confidence)
    flags = request.at_last_step + 2 * sampling.greedy
    return [*whole, number, flags, sampling.stability, *map(_bits, real)]


def padding_entry(padding_slot: int) -> list[int]:
    """The numbers of a padding entry, at the padding slot."""
    return [padding_slot, *[0] * 5, 1, 0, 0, *[_bits(1.0)] * 3]


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """What `begin_step` hands on to `finish_step`; `x` are the rows of the stack."""

    x: Flat
    argmax: Int[Tensor, "canvases canvas"]
    unchanged: Int[Tensor, " canvases"]
    noise: Int[Tensor, "canvases canvas"]
    uniform: Float64[Tensor, "canvases canvas"]
    pins: Pins | None


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOutputs:
    """What a step did to its canvases.

    packed_results: what the host waits for, per canvas: whether it settled, is finished, has only finite
    numbers, and its argmax tokens.
    """

    argmax: Int[Tensor, "canvases canvas"]
    accepted: Bool[Tensor, "canvases canvas"]
    entropy: Float32[Tensor, "canvases canvas"]
    changed: Bool[Tensor, "canvases canvas"]
    packed_results: Int64[Tensor, "canvases words"]


def begin_step(network: Network, slots: CanvasState, canvases: CanvasBatch, features: StepFeatures) -> StepInputs:
    """Embed and condition the canvases; those at step 1 are noise without a self-conditioning embedding."""
    config, at = network.config, canvases.slot
    draws = KeyedDraws.from_words(
        canvases.low, canvases.high, canvases.canvas, length=slots.length, vocab=config.vocab_size
    )
    first, noise, uniform = draws.of_step(canvases.number)
    pins, all_rows = None, torch.arange(len(at), device=at.device)
    if features.begins:
        first = put_in(slots.start.index_select(0, at), first)
    if features.pinned:
        tokens = slots.pins.index_select(0, at)
        pins = Pins(tokens, network.embed(tokens.clamp(min=0)))
        first, noise = pins.hold(all_rows, first), pins.hold(all_rows, noise)
    canvas, signal = slots.canvas.index_select(0, at), slots.signal.index_select(0, at)
    argmax, unchanged = slots.argmax.index_select(0, at), slots.unchanged.index_select(0, at)
    if features.begins:
        first_step = canvases.number == 1
        canvas = torch.where(first_step[:, None], first, canvas)
        signal = signal.masked_fill(first_step[:, None, None], 0)
        argmax, unchanged = argmax.masked_fill(first_step[:, None], -1), unchanged.masked_fill(first_step, 0)
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
    """Compute a step from the canvases' final hidden states, and write the next step's canvases to their slots.

    `requests` are those of the canvases; they may be omitted if none has custom rules, a constraint or edits.
    """
    at = canvases.slot
    output = _output(network, slots, canvases, features, inputs, hidden, signal, requests)
    output = replace(output, sample=torch.where(canvases.greedy[:, None], output.argmax, output.sample))
    if inputs.pins is not None:
        output = inputs.pins(torch.arange(len(at), device=at.device), output)
    accept, settle = custom_rules(canvases, requests)
    result = update(output, inputs.noise, inputs.argmax, inputs.unchanged, accept, settle)
    flags = torch.stack((result.settled, result.settled | canvases.last, output.entropy.isfinite().all(-1)), dim=1)
    packed_results = torch.cat((flags.long(), output.argmax), dim=1)
    slots.canvas.index_copy_(0, at, result.canvas)
    if output.signal is not None:
        slots.signal.index_copy_(0, at, output.signal)
    slots.argmax.index_copy_(0, at, output.argmax)
    slots.unchanged.index_copy_(0, at, result.unchanged)
    if requests:
        slots.decided.index_copy_(0, at, result.canvas.where(result.accepted, UNPINNED))
    return StepOutputs(
        argmax=output.argmax,
        accepted=result.accepted,
        entropy=output.entropy,
        changed=result.changed,
        packed_results=packed_results,
    )


def _output(
    network: Network,
    slots: CanvasState,
    canvases: CanvasBatch,
    features: StepFeatures,
    inputs: StepInputs,
    hidden: Float[Tensor, "rows hidden"],
    signal: SoftEmbedding,
    requests: Sequence[Request],
) -> DenoiserOutput:
    """What the step computes from the vocabulary: passes for each canvas with a constraint or edits, one for all other
    rows."""
    count, length = len(canvases.slot), slots.length
    temperature = canvases.temperature[:, None].expand(-1, length).flatten()
    banned = slots.banned.index_select(0, canvases.slot).flatten(0, 1) if features.banned else None

    # A sparse one is read another way than none, so bits would depend on what else is in the forward.
    computed = signal if features.goes_on or signal == "sparse" else None

    def read(rows: Int[Tensor, " some"] | slice, how: Callable[..., SampleStats]) -> SampleStats:
        return how(
            hidden[rows],
            network.embed_tokens.weight,
            cap=network.config.softcap,
            temperature=temperature[rows],
            uniform=inputs.uniform.flatten()[rows],
            banned=None if banned is None else (slots.ids, banned[rows]),
            signal=computed,
            scale=network.embed_scale(),
        )

    own = [i for i, request in enumerate(requests) if needs_own_pass(request)]
    if not own:
        return DenoiserOutput.of(read(slice(None), vocabulary.sample_from_hidden), count)
    states = [state for i in own if (state := requests[i].row.constraint) is not None]
    for other in states[1:]:
        other.room.clear()
    room = states[0].room if states else None  # one for all; it goes with its request
    parts, places, free = list[SampleStats](), list[Tensor](), torch.ones(count * length, dtype=torch.bool)
    for i in own:
        for rows, how in _passes(network, slots, requests[i], length, room):
            rows = slice(i * length + rows.start, i * length + rows.stop)
            free[rows] = False
            places.append(torch.arange(rows.start, rows.stop))
            parts.append(read(rows, how))
    places.append(free.nonzero()[:, 0])
    parts.append(read(to_device(places[-1], hidden.device), vocabulary.sample_from_hidden))
    return DenoiserOutput.of(SampleStats.joined(parts, to_device(torch.cat(places).argsort(), hidden.device)), count)


def _passes(
    network: Network, slots: CanvasState, request: Request, length: int, room: Room | None
) -> Iterator[tuple[slice, Callable[..., SampleStats]]]:
    """How the vocabulary is read for the places of a canvas that its constraint holds, and for the others if there are
    edits."""
    row, device = request.row, network.device
    constraint, held = row.canvas_constraint, 0
    decided = slots.decided[slot_of(request)].tolist() if request.step and row.edits.has_penalties else ()
    changes = canvas_changes(row, decided, length, network.config.vocab_size, device)
    truncation = truncation_of(row.edits)
    if constraint is not None:
        held, classes = constraint.positions, constraint.automaton.classes(device)
        own = changes and changes.rows(slice(0, held))
        conditioned = partial(vocabulary.sample_conditioned, classes=classes, condition=constraint.condition, room=room)
        yield slice(0, held), partial(conditioned, changes=own, truncation=truncation)
    if changes is not None or truncation is not None:
        own = changes and changes.rows(slice(held, length))
        yield slice(held, length), partial(vocabulary.sample_from_hidden, changes=own, truncation=truncation)


def custom_rules(canvases: CanvasBatch, requests: Sequence[Request]) -> tuple[Accept, Settle]:
    """When each canvas accepts and settles: by its numbers, or by the custom rule in its request."""
    accept: Accept = EntropyBound(canvases.bound[:, None])
    settle: Settle = StableAndConfident(canvases.stability, canvases.confidence)
    samplings = [request.sampling for request in requests if isinstance(request.sampling, Sampling)]
    if not samplings:
        return accept, settle
    accepts, settles = [each.accept for each in samplings], [each.settle for each in samplings]
    return CustomRules("accept", accept, accepts, requests), CustomRules("settle", settle, settles, requests)


class _RuleStopped(Exception):
    """A custom rule raised what is no `Exception`, such as SystemExit: it concerns the requests with this rule only."""

    def __init__(self, requests: Sequence[Request], error: BaseException) -> None:
        super().__init__(str(error))
        self.requests, self.error = requests, error


@dataclass(frozen=True, eq=False)
class CustomRules:
    """A common rule for all canvases except those with a custom one; canvases that share a rule are passed together."""

    name: str
    common: Callable[..., Tensor]
    custom: Sequence[Callable[..., Tensor] | None]
    requests: Sequence[Request]

    def __call__(self, *inputs: Tensor) -> Tensor:
        answer = self.common(*inputs)
        for rule in {id(rule): rule for rule in self.custom if rule is not None}.values():
            users = [row for row, other in enumerate(self.custom) if other is rule]
            rows = to_device(torch.tensor(users), answer.device)
            try:
                result = check_answer(self.name, rule(*(tensor[rows] for tensor in inputs)), answer[rows])
            except Exception:
                raise
            except BaseException as error:
                raise _RuleStopped([self.requests[row] for row in users], error) from None
            answer = answer.index_copy(0, rows, result)
        return answer
