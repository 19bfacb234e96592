"""Throughput against users, as values: the curves of a panel, where they cross, and the roofline's curves.

    tokens/s   diffusion ------.........      flat once it is compute-bound
                            x                 the crossing: beyond it, autoregressive decoding is faster
               autoregressive  ----------     grows with the users, who share one reading of the weights

Why: diffusion spends arithmetic to save readings of the weights, so its advantage is greatest with few users.

Invariant: no torch here, so that a curve can be drawn for a card that is not at hand.
Run it:  blockpress bench --sweep --device h200 --out sweep.svg
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blockpress import costs
from blockpress.config import PRESETS, ModelConfig

USERS = (1, 2, 4, 8, 16, 32, 64)
CARD_USERS = (*USERS, 128, 256)
"""Up to where the curves of a card cross, at the published formats and steps."""
STEPS = 12.0
"""Steps per canvas: the technical report's mean over its tasks (reference published, section 4)."""
MODEL, CONTEXT = "diffusiongemma-26B-A4B", 2048
MODES: tuple[Literal["diffusion", "autoregressive"], ...] = ("diffusion", "autoregressive")

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Tokens a second of all users together, by the number of users. `dashed`: computed, next to measured ones."""

    name: str
    points: Points
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: the curves of one machine. The first two are diffusion and autoregressive."""

    title: str
    note: str
    curves: tuple[Curve, ...]

    @property
    def crossing(self) -> tuple[float, float] | None:
        """Users and tokens a second at which the second curve overtakes the first."""
        return crossing(self.curves[0].points, self.curves[1].points)


def crossing(first: Points, second: Points) -> tuple[float, float] | None:
    """Where the second curve reaches the first from below, by linear interpolation with both axes logarithmic.

    None where it never does; the first point where it is already above there.

    >>> crossing(((1, 8.0), (4, 8.0)), ((1, 4.0), (4, 16.0)))
    (2.0, 8.0)
    >>> crossing(((1, 8.0), (4, 8.0)), ((1, 1.0), (4, 2.0))) is None
    True
    """
    before: tuple[float, float, float] | None = None
    for (users, upper), (_, lower) in zip(first, second, strict=True):
        gap, at, height = math.log2(upper / lower), math.log2(users), math.log2(upper)
        if gap <= 0:
            share = 0.0 if before is None else before[1] / (before[1] - gap)
            left, _, below = (at, 0.0, height) if before is None else before
            return 2 ** (left + share * (at - left)), 2 ** (below + share * (height - below))
        before = (at, gap, height)
    return None


def roofline_curves(
    config: ModelConfig,
    widths: costs.WeightFormats,
    device: costs.Device,
    *,
    users: Sequence[int] = USERS,
    steps: float = STEPS,
    context: int = CONTEXT,
) -> tuple[Curve, Curve]:
    """Both modes at the roofline."""
    diffusion, token = (
        Curve(
            name=mode,
            points=tuple(
                (
                    count,
                    costs.throughput(config, widths, device, count, mode=mode, context=context, steps=steps),
                )
                for count in users
            ),
        )
        for mode in MODES
    )
    return diffusion, token


def roofline(
    device: costs.Device,
    *,
    model: str = MODEL,
    form: str = "fp8",
    users: Sequence[int] = CARD_USERS,
    steps: float = STEPS,
    context: int = CONTEXT,
) -> Panel:
    """The panel of a card and a published model, computed.

    Args:
        form: the format of the weights, a key of `costs.WIDTHS`.

    >>> panel = roofline(costs.DEVICES["h200"], form="bf16", steps=16, users=(32, 64, 128))
    >>> 70 < panel.crossing[0] < 85
    True
    """
    config = PRESETS[model]()
    fits = sum(_stored(config, costs.WIDTHS[form]).values()) <= device.memory
    note = f"{model} in {form}, {context:,} tokens of context, {steps:g} steps a canvas"
    return Panel(
        title=f"{device.name}, roofline",
        note=note if fits else f"{note}; the weights do not fit its memory",
        curves=roofline_curves(config, costs.WIDTHS[form], device, users=users, steps=steps, context=context),
    )


def _stored(config: ModelConfig, widths: costs.WeightFormats) -> dict[str, float]:
    sizes = {"experts": widths.experts.size, "embedding": widths.embedding.size}
    return {part: count * sizes.get(part, widths.dense.size) for part, count in costs.parameters(config).items()}


def crossover_table(panel: Panel) -> list[list[str]]:
    """The figures as rows of strings: users, then each curve."""
    head = ["users", *(curve.name for curve in panel.curves)]
    counts = [users for users, _ in panel.curves[0].points]
    figures = [[f"{speed:.4g}" for _, speed in curve.points] for curve in panel.curves]
    return [head, *([str(users), *row] for users, *row in zip(counts, *figures, strict=True))]
