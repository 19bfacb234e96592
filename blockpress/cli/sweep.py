"""`blockpress bench --sweep`: throughput against users, measured on this machine, from the roofline for cards.

Invariant: a sweep of cards alone needs no torch and no model.

Run it:  blockpress bench --sweep --device h200 --out sweep.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpress.cli import options
from blockpress.cli.animate import save
from blockpress.cli.subject import SubjectOptions, open_subject
from blockpress.cli.terminal import note
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.bench.panels import Panel

CARDS = ("h100", "h200", "rtx5090")
FORMATS = ("bf16", "fp8", "fp8-all", "w4a16", "w4", "w4a8")


def sweep(
    shape: SubjectOptions,
    devices: list[str],
    users: tuple[int, ...] | None,
    steps: int | None,
    form: str,
    out: Path | None,
    json: bool,
) -> None:
    """A panel for every device, measured here or computed for cards; SVG to a file, the figures printed."""
    from blockpress import costs
    from blockpress.bench.chart import check_matplotlib, crossed, svg
    from blockpress.bench.panels import CARD_USERS, STEPS, USERS, crossover_table, roofline

    if out is None:
        raise RequestError("--sweep is given without --out", hint="give --out FILE.svg")
    if out.is_dir():
        raise RequestError(f"--out is {out}, a folder", hint=f"give a file, such as {out / 'sweep.svg'}")
    if not out.parent.is_dir():
        raise RequestError(f"--out is {out}", hint=f"make the folder {out.parent} first")
    if all(device in CARDS for device in devices):
        for name in shape.named:
            raise RequestError(
                f"{name} is given with --device {devices[0]} alone",
                hint="cards are computed with the published model; add --device cpu to measure yours",
            )
    check_matplotlib()
    panels = []
    for device in devices:
        if device in CARDS:
            card = costs.DEVICES[device]
            panels.append(roofline(card, form=form, users=users or CARD_USERS, steps=steps or STEPS))
        else:
            panels.append(_measured(shape, device, users or USERS, steps or STEPS))
    save(out, svg(panels))
    if json:
        options.print_json({"out": str(out), "panels": [_panel(panel) for panel in panels]})
        return
    for panel in panels:
        print(f"{panel.title}: {panel.note}\n{crossed(panel)}")
        print("\n".join("".join(f"{cell:>24}" for cell in row) for row in crossover_table(panel)))
    print(f"drawn in {out}")


def _measured(shape: SubjectOptions, device: str, users: tuple[int, ...], steps: float) -> Panel:
    from blockpress.bench.ceilings import measure_device
    from blockpress.bench.sweep import measure_curves

    subject = open_subject(shape, device)
    return measure_curves(subject, measure_device(subject.network), users=users, steps=steps, progress=note)


def _panel(panel: Panel) -> dict[str, Any]:
    curves = {curve.name: dict(curve.points) for curve in panel.curves}
    return {"title": panel.title, "note": panel.note, "crossing": panel.crossing, "curves": curves}


def counts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts) or sorted({int(p) for p in parts}) != [
        int(p) for p in parts
    ]:
        raise RequestError(f"--users is {text}", hint="--users takes growing whole numbers, such as 1,2,4,8")
    return tuple(int(part) for part in parts)
