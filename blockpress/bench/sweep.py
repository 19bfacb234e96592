"""Throughput against users on this machine: both modes of one network, measured, and their roofline.

Every user has a prompt of one canvas, so that the forward that reads it and takes the first step costs as much as a
commit and first step do later. A few of the other steps are measured, and their median stands for all:

    seconds a canvas  =  first forward  +  (steps - 1) x median of the others

In autoregressive decoding the figure is the median forward after the prompts.

Invariant: all users are in every forward that counts.
Run it:  blockpress bench --preset bench-4k --sweep --out sweep.svg
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from blockpress import costs
from blockpress.bench.drive import BenchRun, Forward, drive
from blockpress.bench.panels import STEPS, USERS, Curve, Panel, roofline_curves
from blockpress.bench.steppers import EngineStepper
from blockpress.bench.subject import Subject, stored_formats
from blockpress.bench.workload import Workload, requests

MEASURED = 4
"""Steps, or tokens, run for one point."""


def measure_curves(
    subject: Subject,
    device: costs.Device,
    *,
    users: Sequence[int] = USERS,
    steps: float = STEPS,
    progress: Callable[[str], None] | None = None,
) -> Panel:
    """The panel of this machine.

    Args:
        device: its ceilings, as `measure_device` measured them.
        progress: called with a line of text after every point.

    Raises:
        RequestError: a network without a canvas.
    """
    length = subject.config.canvas_length
    curves = []
    for mode in ("diffusion", "autoregressive"):
        points = []
        for count in users:
            speed = _point(subject, mode, count, steps)
            points.append((count, speed))
            if progress is not None:
                progress(f"{mode}, {count} users: {speed:.1f} tokens/s")
        curves.append(Curve(name=mode, points=tuple(points)))
    floors = roofline_curves(
        subject.config, stored_formats(subject.network), device, users=users, steps=steps, context=length
    )
    curves += [Curve(name=f"{curve.name}, floor", points=curve.points, dashed=True) for curve in floors]
    note = f"{subject.name} in {subject.in_types}, {length} tokens of context, {steps:g} steps a canvas; dashed: floors"
    return Panel(title=f"{device.name}, measured", note=note, curves=tuple(curves))


def _point(subject: Subject, mode: Literal["diffusion", "autoregressive"], users: int, steps: float) -> float:
    """Tokens a second of this many users together."""
    length = subject.config.canvas_length
    diffusion = mode == "diffusion"
    work = Workload(
        mode=mode,
        batch=users,
        prompt_len=length,
        max_tokens=length if diffusion else MEASURED,
        steps=max(2, min(MEASURED, int(steps))) if diffusion else None,
    )
    stepper = EngineStepper(subject.network, running=users, prefill=users * length)
    run = drive(stepper, work, requests(subject, work), subject.network.device).whole()
    full = [forward for forward in run.forwards if _has_all_users(forward.rows, users)]
    if not diffusion:
        return users / statistics.median(_later_seconds(run, full))
    first = next(forward.seconds for forward in full if forward.prefill)
    return users * length / (first + (steps - 1) * statistics.median(_later_seconds(run, full)))


def _later_seconds(run: BenchRun, full: Sequence[Forward]) -> list[float]:
    later = [forward.seconds for forward in full if not forward.prefill]
    assert later, f"{len(run.forwards)} forwards, none of them with all users past their prompts"
    return later


def _has_all_users(rows: costs.BatchShape, users: int) -> bool:
    return len(rows.canvases) == users or len(rows.logit_rows) == users
