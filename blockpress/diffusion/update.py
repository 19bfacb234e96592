"""The step rule: what becomes of a canvas after the denoiser's output. The reference loop, the engine and on-policy
training all call `update`; no other code decides which tokens stay.

    denoiser output         argmax     4 7 7 2      sample   4 7 9 1      entropy   0.0  0.0  0.4  1.1
    accept(entropy)                                          4 7 . .      which samples to keep
    canvas                  sample where accepted, noise elsewhere: 4 7 3 8
    settle(unchanged, entropy)                               for how many steps the argmax has been the same

Source: reference model, section 2.

Invariant: no shape depends on a value and nothing waits for the device: with the built-in rules, a CUDA graph can
capture it.
Run it:  python -m pytest tests/diffusion/test_update.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blockpress.config import Sampling
from blockpress.diffusion.accept import Accept, EntropyBound
from blockpress.diffusion.output import DenoiserOutput
from blockpress.diffusion.settle import Settle, StableAndConfident
from blockpress.errors import RequestError
from blockpress.shapes import Accepted, Canvas


@dataclass(frozen=True)
class Update:
    """The outcome of a step. canvas: what the next step reads. changed: positions whose argmax differs from that of the
    step before. unchanged: consecutive steps without a change. settled: rows that are finished, with their argmax."""

    canvas: Canvas
    accepted: Accepted
    changed: Bool[Tensor, "batch canvas"]
    unchanged: Int[Tensor, " batch"]
    settled: Bool[Tensor, " batch"]


def update(
    output: DenoiserOutput,
    noise: Canvas,
    previous: Canvas,
    unchanged: Int[Tensor, " batch"],
    accept: Accept,
    settle: Settle,
) -> Update:
    """One step for a batch of canvases.

    Args:
        noise: the tokens of positions that are not accepted.
        previous: the argmax of the previous step, -1 at the first one.
        unchanged: for each row, how many consecutive steps have left its argmax unchanged.

    Raises:
        RequestError: a rule does not return a bool for every position (accept) or row (settle).
    """
    accepted = check_answer("accept", accept(output.entropy), output.entropy)
    changed = output.argmax != previous
    unchanged = (unchanged + 1).masked_fill(changed.any(-1), 0)
    settled = check_answer("settle", settle(unchanged, output.entropy), unchanged)
    return Update(torch.where(accepted, output.sample, noise), accepted, changed, unchanged, settled)


def step_rules(sampling: Sampling) -> tuple[Accept, Settle]:
    """When to accept and when to settle: the rules in `sampling`, or the reference's with its numbers."""
    accept = EntropyBound(sampling.entropy_bound) if sampling.accept is None else sampling.accept
    settle = StableAndConfident(sampling.stability, sampling.confidence) if sampling.settle is None else sampling.settle
    return accept, settle


def check_answer(name: str, answer: Any, like: Tensor) -> Tensor:
    """The result of the rule `name`, which must be bool and of the shape of `like`.

    Raises:
        RequestError: it is something else.
    """
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != like.shape:
        got = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise RequestError(
            f"sampling.{name} gave {got} where torch.bool {list(like.shape)} is needed",
            hint=f"{name} must give a bool for every {'position' if like.ndim > 1 else 'row'}",
        )
    return answer
