"""How far a changed model (quantised, pruned, merged) is from the original: on the same canvases, and in a free run.

    same canvas    step 1: noise, no conditioning; step 2: the same canvas, conditioned on each model's own step 1
    free run       one canvas a prompt, same seed: steps to settle, and how many tokens are the same

A step's error enters the next one through self-conditioning, which one forward cannot show: step 2 and the free run do.

Invariant: both recordings use the same prompts, noise and positions, all functions of the seed; a model that is
compared with itself has no divergence and agrees everywhere.

Run it:  blockpress quantize sudoku-nano ./smaller --format int4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from blockpress.errors import RequestError
from blockpress.lm import LM

POSITIONS = 16
"""Positions of a canvas whose whole distributions are kept: 16 MiB a prompt and step at 262,144 tokens."""

MAX_BYTES = 1 << 30
"""Most bytes of distributions in a recording: with many prompts, fewer positions of each, at least one."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One model's outputs. For each prompt and step: log-probabilities at some positions; argmax and entropy at all."""

    seed: int
    probabilities: Float32[Tensor, "prompts 2 positions vocab"]
    argmax: Int[Tensor, "prompts 2 canvas"]
    entropy: Float32[Tensor, "prompts 2 canvas"]
    answers: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepFidelity:
    """One step on the same canvases: KL(original || changed) in nats, mean and maximum over positions; the share of
    positions with the same argmax; mean entropies in nats."""

    kl: float
    kl_largest: float
    agreement: float
    entropy_original: float
    entropy_changed: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Both steps, and the free run: mean steps per canvas, and the share of answer tokens that are the same."""

    prompts: int
    positions: int
    seed: int
    first: StepFidelity
    second: StepFidelity
    steps_original: float
    steps_changed: float
    tokens_same: float


@torch.inference_mode()
def record(lm: LM, prompts: Sequence[Sequence[int]], seed: int = 0, batch: int = 16) -> Recording:
    """Run a model on the prompts.

    Args:
        prompts: token ids.
        batch: prompts of the free run that run together.

    Raises:
        RequestError: no prompts, or what `LM.generate` refuses.
    """
    if not prompts:
        raise RequestError("prompts is empty", hint="give at least one prompt")
    length, vocab = lm.config.canvas_length, lm.config.vocab_size
    chosen = torch.linspace(0, length - 1, _positions(length, len(prompts) * 2 * vocab * 4)).round().long()
    log_probabilities, argmax, entropy = [], [], []
    for index, prompt in enumerate(prompts):
        noise = torch.Generator().manual_seed(seed + index)
        canvas = torch.randint(0, vocab, (length,), generator=noise)
        first = lm.denoise_logits(prompt, canvas)
        second = lm.denoise_logits(prompt, canvas, first / lm.generation.sampling.t_max)
        steps = [logits.log_softmax(-1).cpu() for logits in (first, second)]
        log_probabilities.append(torch.stack([step[chosen] for step in steps]))
        argmax.append(torch.stack([step.argmax(-1) for step in steps]))
        entropy.append(torch.stack([-(step.exp() * step).sum(-1) for step in steps]))
    replies = []
    for start in range(0, len(prompts), batch):
        some = [list(prompt) for prompt in prompts[start : start + batch]]
        replies += lm.generate(some, max_tokens=length, seed=[seed + start + index for index in range(len(some))])
    return Recording(
        seed=seed,
        probabilities=torch.stack(log_probabilities),
        argmax=torch.stack(argmax),
        entropy=torch.stack(entropy),
        answers=tuple(tuple(reply.tokens) for reply in replies),
        steps=tuple(reply.usage.steps for reply in replies),
    )


def compare_recordings(original: Recording, changed: Recording) -> Fidelity:
    """How far the second recording is from the first.

    Raises:
        RequestError: the recordings differ in prompts, seed or vocabulary.
    """
    shapes = [(tuple(r.probabilities.shape), r.seed) for r in (original, changed)]
    if shapes[0] != shapes[1]:
        raise RequestError(
            f"the recordings differ in shape or seed: {shapes[0]} and {shapes[1]}",
            hint="record both models on the same prompts with the same seed",
        )
    same = [_token_agreement(a, b) for a, b in zip(original.answers, changed.answers, strict=True)]
    return Fidelity(
        prompts=len(same),
        positions=original.probabilities.shape[2],
        seed=original.seed,
        first=_step(original, changed, 0),
        second=_step(original, changed, 1),
        steps_original=sum(original.steps) / len(same),
        steps_changed=sum(changed.steps) / len(same),
        tokens_same=sum(same) / len(same),
    )


def _positions(canvas: int, size: int) -> int:
    """How many positions of each canvas are kept if one position of every canvas takes `size` bytes."""
    return min(POSITIONS, canvas, max(1, MAX_BYTES // size))


def _step(original: Recording, changed: Recording, step: int) -> StepFidelity:
    pairs = zip(original.probabilities[:, step], changed.probabilities[:, step], strict=True)
    # Prompt by prompt: in float64 all of them together would take many times the memory of a recording.
    kl = torch.stack([_divergence(p.double(), q.double()) for p, q in pairs])
    return StepFidelity(
        kl=float(kl.mean()),
        kl_largest=float(kl.max()),
        agreement=float((original.argmax[:, step] == changed.argmax[:, step]).double().mean()),
        entropy_original=float(original.entropy[:, step].mean()),
        entropy_changed=float(changed.entropy[:, step].mean()),
    )


def _divergence(p: Float64[Tensor, "positions vocab"], q: Float64[Tensor, "positions vocab"]) -> Tensor:
    """KL(p || q) of log-probabilities, in nats; clamped, since rounding may leave it slightly below 0."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def _token_agreement(original: Sequence[int], changed: Sequence[int]) -> float:
    """The share of positions with the same token; a position that only one of them has does not agree."""
    longest = max(len(original), len(changed))
    return sum(a == b for a, b in zip(original, changed, strict=False)) / longest if longest else 1.0
