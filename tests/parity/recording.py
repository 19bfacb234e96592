"""Trajectories: what `transformers` drew and decided while it generated, replayed in our loop and compared.

    theirs   noise -> [read, sampled, accepted, argmax, renoise] -> ... -> argmax canvas       recorded by `record`
    ours     the same noise, samples and renoise tokens, injected through `generate(make_draws=)`    run by `replay`

Invariant: a difference is forgiven only where the decision that made it was a near-tie: its margin, in the oracle's own
numbers, below 1e-5; and of such only one in 100,000 decisions. Behind a forgiven one the row is not compared further.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from blockpress.config import Sampling
from blockpress.decoding import Denoised, Done, Reply, SequenceState
from blockpress.decoding.generate import generate
from blockpress.model import Network

NEAR, FORGIVEN = 1e-5, 100_000
PAD = 0


@dataclass(frozen=True)
class TheirStep:
    """One step of one row: the canvas that it read, what it drew and decided, and how nearly it decided otherwise.

    lead: the best scaled logit less the second best. before: sum of the entropies of the surer positions.
    """

    read: Tensor
    sample: Tensor
    argmax: Tensor
    lead: Tensor
    entropy: Tensor
    before: Tensor
    accepted: Tensor


@dataclass
class TheirCanvas:
    """noise[0] is the first canvas, noise[n] the uniform tokens drawn after step n."""

    noise: list[Tensor]
    steps: list[TheirStep] = field(default_factory=list)


@dataclass(frozen=True)
class Recording:
    """One row of the oracle: prompt, canvases, and the returned tokens behind the prompt, padded as it pads them."""

    prompt: Tensor
    canvases: list[TheirCanvas]
    tokens: list[int]


class RecordingSampler(EntropyBoundSampler):
    """The oracle's sampler, unchanged but for the notes that it takes; one row."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.canvases: list[TheirCanvas] = []
        self._renoising = False

    def initialize_canvas(self, batch_size: int, device: torch.device) -> Tensor:
        tokens = super().initialize_canvas(batch_size, device)
        if self._renoising:
            self.canvases[-1].noise.append(tokens[0])
        else:
            self.canvases.append(TheirCanvas([tokens[0]]))
        return tokens

    def accept_canvas(self, current_canvas: Tensor, denoiser_canvas: Tensor, logits: Tensor, cur_step: int) -> Tensor:
        out = super().accept_canvas(current_canvas, denoiser_canvas, logits, cur_step)
        entropy = torch.distributions.Categorical(logits=logits).entropy()[0]
        ordered, order = torch.sort(entropy)
        best = logits[0].topk(2, dim=-1)
        self.canvases[-1].steps.append(
            TheirStep(
                read=current_canvas[0],
                sample=denoiser_canvas[0],
                argmax=logits[0].argmax(-1),
                lead=best.values[:, 0] - best.values[:, 1],
                entropy=entropy,
                before=torch.empty_like(entropy).scatter(0, order, ordered.cumsum(0) - ordered),
                accepted=self.accepted_token_mask[0],
            )
        )
        return out

    def renoise_canvas(self, accepted_canvas: Tensor, cur_step: int) -> Tensor:
        self._renoising = True
        out = super().renoise_canvas(accepted_canvas, cur_step)
        self._renoising = False
        return out


def record(
    theirs: DiffusionGemmaForBlockDiffusion,
    prompt: Tensor,
    sampling: Sampling,
    canvases: int,
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> Recording:
    """The oracle's `generate` over one row, with every setting given, at most `canvases` canvases long."""
    samplers: list[RecordingSampler] = []

    def sampler(config: DiffusionGemmaGenerationConfig) -> RecordingSampler:
        samplers.append(
            RecordingSampler(
                config=config.sampler_config,
                canvas_length=theirs.config.canvas_length,
                vocab_size=theirs.config.text_config.vocab_size,
                max_denoising_steps=config.max_denoising_steps,
            )
        )
        return samplers[-1]

    settings = DiffusionGemmaGenerationConfig(
        max_new_tokens=canvases * theirs.config.canvas_length,
        max_denoising_steps=sampling.steps,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=float(sampling.entropy_bound)),
        t_min=sampling.t_min,
        t_max=sampling.t_max,
        stability_threshold=sampling.stability,
        confidence_threshold=float(sampling.confidence),
        eos_token_id=list(stop_ids) or None,
        pad_token_id=PAD,
        cache_implementation="dynamic",
    )
    theirs._prepare_sampler = sampler
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = theirs.generate(input_ids=prompt[None], generation_config=settings)
    finally:
        del theirs._prepare_sampler
    return Recording(prompt, samplers[0].canvases, out.sequences[0, len(prompt) :].tolist())


@dataclass(frozen=True)
class OurStep:
    """One step of one row of ours."""

    read: Tensor
    event: Denoised


@dataclass
class OurRow:
    """What our loop did to one row: steps by canvas, and the reply."""

    canvases: list[list[OurStep]] = field(default_factory=list)
    reply: Reply | None = None


class Replay:
    """The oracle's draws for the rows of one canvas; a row's seed is its place among the recordings."""

    def __init__(self, recordings: Sequence[Recording], seeds: Sequence[int], canvases: Sequence[int]) -> None:
        self._rows = [
            recordings[row].canvases[number] if number < len(recordings[row].canvases) else TheirCanvas([])
            for row, number in zip(seeds, canvases, strict=True)
        ]
        self._blank = torch.zeros_like(recordings[0].canvases[0].noise[0])

    def noise(self, rows: Tensor, step: int) -> Tensor:
        return torch.stack([self._at(self._rows[row].noise, step) for row in rows.tolist()])

    def sample(self, rows: Tensor, step: int, scaled: Tensor) -> Tensor:
        return torch.stack([self._at([s.sample for s in self._rows[row].steps], step - 1) for row in rows.tolist()])

    def _at(self, recorded: list[Tensor], place: int) -> Tensor:
        """Where ours goes on longer than theirs there is nothing to replay, and the comparison fails anyway."""
        return recorded[place] if place < len(recorded) else self._blank


def replay(
    network: Network,
    recordings: Sequence[Recording],
    sampling: Sampling,
    canvases: int,
    stop_ids: Collection[int] = (),
) -> list[OurRow]:
    """Our loop over all rows in one batch, with the oracle's draws."""
    length = network.config.canvas_length
    reads: list[Tensor] = []
    denoise = network.denoise

    def spy(canvas: Tensor, *args: Any) -> Tensor:
        reads.append(canvas)
        return denoise(canvas, *args)

    def keyed(seeds: Sequence[int], numbers: Sequence[int], **_: Any) -> Replay:
        return Replay(recordings, seeds, numbers)

    rows = [
        SequenceState(
            index,
            recording.prompt.tolist(),
            index,
            stop_ids=stop_ids,
            canvas_length=length,
            room=network.config.context_length - len(recording.prompt),
            max_tokens=canvases * length,
        )
        for index, recording in enumerate(recordings)
    ]
    ours = [OurRow() for _ in rows]
    network.denoise = spy
    try:
        seen, place = 0, 0
        for event in generate(network, rows, sampling, make_draws=keyed):
            if isinstance(event, Denoised):
                place = place + 1 if len(reads) == seen else 0
                seen = len(reads)
                done = ours[event.row].canvases
                if event.step == 1:
                    done.append([])
                done[-1].append(OurStep(reads[-1][place], event))
            elif isinstance(event, Done):
                ours[event.row].reply = event.reply
    finally:
        del network.denoise
    return ours


@dataclass
class Tally:
    """How much was compared, and how it went. `entropy`: the largest difference seen, in nats."""

    near: float = NEAR
    canvases: int = 0
    early: int = 0
    steps: int = 0
    partial: int = 0
    decisions: int = 0
    forgiven: int = 0
    entropy: float = 0.0

    def check(self, early: float = 1 / 3, partial: float = 1 / 2) -> None:
        """The run was no trivial one, and hardly anything was forgiven.

        At least that share of the canvases stopped before the last step, and in that share of the steps at least 2
        positions and not all of them were accepted.
        """
        assert self.canvases and self.early >= early * self.canvases, f"only {self.early} of {self.canvases} stop early"
        assert self.partial >= partial * self.steps, f"only {self.partial} of {self.steps} steps accept a part"
        assert self.forgiven <= math.ceil(self.decisions / FORGIVEN), f"{self.forgiven} in {self.decisions}"


def compare(
    recordings: Sequence[Recording],
    ours: Sequence[OurRow],
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    near: float = NEAR,
) -> Tally:
    """Canvases, masks, argmax, step counts and sequences of every row; AssertionError where they part.

    Args:
        near: below what margin (logits or nats) a decision may fall either way.
    """
    tally = Tally(near=near)
    for theirs, row in zip(recordings, ours, strict=True):
        for canvas in theirs.canvases:
            length = len(canvas.noise[0])
            tally.canvases += 1
            tally.early += len(canvas.steps) < sampling.steps
            tally.steps += len(canvas.steps)
            tally.partial += sum(2 <= int(step.accepted.sum()) <= length - 1 for step in canvas.steps)
        if _same_row(theirs, row, sampling, tally):
            _same_sequence(theirs, row, stop_ids)
    return tally


def _same_row(theirs: Recording, ours: OurRow, sampling: Sampling, tally: Tally) -> bool:
    """Whether the row agrees to its end; False where a near-tie parted it."""
    for number, (canvas, steps) in enumerate(zip(theirs.canvases, ours.canvases, strict=False)):
        for n, (their_step, our_step) in enumerate(zip(canvas.steps, steps, strict=False), 1):
            where = f"canvas {number}, step {n}"
            last = n == len(canvas.steps)
            if not _same_step(their_step, our_step, sampling, last and n < sampling.steps, n, where, tally):
                return False
        assert len(steps) == len(canvas.steps), f"canvas {number}: {len(steps)} steps, theirs {len(canvas.steps)}"
    assert len(ours.canvases) == len(theirs.canvases), "another number of canvases"
    return True


def _same_step(
    theirs: TheirStep, ours: OurStep, sampling: Sampling, settled: bool, n: int, where: str, tally: Tally
) -> bool:
    event = ours.event
    assert event.step == n, where
    assert torch.equal(ours.read, theirs.read), f"{where}: another canvas was read"
    tally.entropy = max(tally.entropy, float((event.entropy - theirs.entropy).abs().max()))
    tally.decisions += 2 * len(theirs.read) + (n < sampling.steps)
    other = event.argmax != theirs.argmax
    if bool(other.any()):
        return _forgive(theirs.lead[other], f"{where}: argmax", tally)
    other = event.accepted != theirs.accepted
    if bool(other.any()):
        return _forgive(_acceptance_margin(theirs, other, sampling.entropy_bound), f"{where}: accepted", tally)
    if n < sampling.steps and event.settled != settled:
        margin = (theirs.entropy.mean() - sampling.confidence).abs()[None]
        return _forgive(margin, f"{where}: settled {event.settled}", tally)
    return True


def _acceptance_margin(theirs: TheirStep, other: Tensor, bound: float) -> Tensor:
    """How near each differing position was: to the bound, or to another differing one whose rank it could have had."""
    entropy = theirs.entropy[other]
    gaps = (entropy[:, None] - entropy[None]).abs().fill_diagonal_(math.inf).amin(-1)
    return torch.minimum((theirs.before[other] - bound).abs(), gaps)


def _forgive(margins: Tensor, what: str, tally: Tally) -> bool:
    assert float(margins.max()) < tally.near, f"{what} differs, and by {float(margins.max()):.2e} it was no near-tie"
    tally.forgiven += 1
    return False


def _same_sequence(theirs: Recording, ours: OurRow, stop_ids: Collection[int]) -> None:
    """Ours is cut behind the first stop id, theirs padded behind it to the canvas's end."""
    assert ours.reply is not None
    tokens = ours.reply.tokens
    stopped = bool(tokens) and tokens[-1] in stop_ids
    assert ours.reply.finish_reason == ("stop" if stopped else "length")
    assert theirs.tokens == tokens + [PAD] * (len(theirs.tokens) - len(tokens))
    assert stopped or len(theirs.tokens) == len(tokens)
    assert ours.reply.usage.canvases == len(theirs.canvases)
    assert ours.reply.usage.steps == sum(len(canvas.steps) for canvas in theirs.canvases)
