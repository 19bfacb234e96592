"""Which optimizer updates which parameter, and the schedule of the learning rate.

Matrices of the layers go to Muon (orthogonalised momentum), everything else (embedding, norms, stacked experts, the
router) to torch's AdamW; with `muon_rate=None` AdamW takes all. Muon is our own: torch's computes in bfloat16 on every
processor, one matrix after another (ADR 0005).

    rate    /---------\\           warm-up, a plateau, then linear decay to `final`
           /           \\
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import swa_utils

from blockpress.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Rates are per step. `decay`: the last share of the run, in which the rate falls to `final` times its full value.

    muon_rate: Muon's rate, scaled to AdamW's step size; None leaves all to AdamW. clip: largest norm of the whole
    gradient. ema: decay of the weights' moving average per step; None: no average is kept.
    """

    rate: float = 1e-3
    muon_rate: float | None = None
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay: float = 1.0
    final: float = 0.0
    clip: float = 1.0
    ema: float | None = None

    def __post_init__(self) -> None:
        for ok, name, need in (
            (self.rate > 0, "rate", "above 0"),
            (self.muon_rate is None or self.muon_rate > 0, "muon_rate", "above 0, or None"),
            (all(0 <= b < 1 for b in self.betas), "betas", "two numbers from 0 to below 1"),
            (self.weight_decay >= 0, "weight_decay", "0 or more"),
            (self.warmup >= 0, "warmup", "0 or more steps"),
            (0 <= self.decay <= 1, "decay", "a share of the run from 0 to 1"),
            (0 <= self.final <= 1, "final", "a share of the rate from 0 to 1"),
            (self.clip > 0, "clip", "above 0"),
            (self.ema is None or 0 < self.ema < 1, "ema", "between 0 and 1, or None"),
        ):
            if not ok:
                raise ConfigError(f"optimizer field {name} is {getattr(self, name)!r}", hint=f"{name} must be {need}")

    def factor(self, step: int, steps: int) -> float:
        """What the rates are multiplied by at `step` (from 0) of `steps`.

        >>> [round(OptimizerConfig(warmup=2, decay=0.5).factor(step, 8), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.decay * steps
        left = min(1.0, (steps - step) / falling) if falling else 1.0
        return warm * (self.final + (1 - self.final) * left)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by approximately the nearest orthogonal one, with the RMS of an AdamW step.

    Matrices of one shape are orthogonalised together. `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` does the
    same in bfloat16. Source: Jordan, "Muon" (2024); Liu et al., arXiv 2502.16982, for the step size.

    Args:
        dtype: in which the products of the orthogonalisation are computed.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every matrix that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in alike.items():
                self._move(group, matrices, group["lr"] * 0.2 * max(shape) ** 0.5)
        return loss

    def _move(self, group: dict[str, Any], matrices: list[nn.Parameter], rate: float) -> None:
        lookahead = []
        for matrix in matrices:
            assert matrix.grad is not None
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix.grad)
            state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
            lookahead.append(matrix.grad.lerp(state["momentum_buffer"], group["momentum"]))  # Nesterov
        for matrix, direction in zip(matrices, orthogonal(torch.stack(lookahead).to(self.dtype)), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction.to(matrix.dtype), alpha=rate)


def orthogonal(x: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices rows columns"]:
    """Matrices with the same singular vectors and singular values of about 0.7 to 1.2, by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build_optimizers(
    network: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.bfloat16
) -> list[torch.optim.Optimizer]:
    """Optimizers over all parameters of the network; each group keeps its full rate as `base`.

    Args:
        dtype: of Muon's products.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        orthogonal = config.muon_rate is not None and parameter.ndim == 2 and name.endswith("_proj.weight")
        (matrices if orthogonal else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    ]
    if config.muon_rate is not None:
        optimizers.append(
            Muon(
                matrices,
                lr=config.muon_rate,
                momentum=config.betas[0],
                weight_decay=config.weight_decay,
                dtype=dtype,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` times its full one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor


def build_average(network: nn.Module, decay: float) -> swa_utils.AveragedModel:
    """Torch's exponential moving average of the network's weights, starting from their current values."""
    return swa_utils.AveragedModel(network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
