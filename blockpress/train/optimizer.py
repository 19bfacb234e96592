"""Which rule moves which parameter, and how the learning rate runs.

Matrices of the layers go to Muon (orthogonalised momentum), everything else (embedding, norms, stacked experts, the
router) to AdamW; with `muon_rate=None` AdamW takes all. Both are torch's own.

    rate    /---------\\           warm-up steps, a plateau, then a straight line down to `final`
           /           \\
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from blockpress.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Rates are per step. `decay`: the share of the run, at its end, in which the rate falls to `final` times itself.

    muon_rate: Muon's rate, scaled to AdamW's size of step ("match_rms_adamw"); None leaves all to AdamW.
    clip: largest norm of the whole gradient.
    """

    rate: float = 1e-3
    muon_rate: float | None = None
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay: float = 1.0
    final: float = 0.0
    clip: float = 1.0

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
        ):
            if not ok:
                raise ConfigError(f"optimizer field {name} is {getattr(self, name)!r}", hint=f"{name} must be {need}")

    def factor(self, step: int, steps: int) -> float:
        """What the rates are multiplied with at `step` (from 0) of `steps`.

        >>> [round(OptimizerConfig(warmup=2, decay=0.5).factor(step, 8), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.decay * steps
        left = min(1.0, (steps - step) / falling) if falling else 1.0
        return warm * (self.final + (1 - self.final) * left)


def build_optimizers(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Optimizers over all of the network's parameters; each group remembers its full rate as `base`."""
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
            torch.optim.Muon(
                matrices,
                lr=config.muon_rate,
                momentum=config.betas[0],
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
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
