"""Panels drawn by matplotlib, as one SVG: curves on logarithmic axes, where they cross, and all figures as text.

Users are in powers of 2, tokens a second in powers of 10. Text stays text in the file, so that it can be searched and
read aloud, and the description in its metadata holds every figure.

Invariant: the same panels give the same bytes. matplotlib is imported when something is drawn, and only here.
Run it:  blockpress bench --sweep --device h200 --out sweep.svg
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Any

from blockpress.bench.panels import Panel, crossover_table
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b5fff", "#c2410c")
PANEL_INCHES = (5.6, 4.0)
NOTE_WIDTH = 85
"""Characters of a note that fit in a line above its panel."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "blockpress",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
}
"""Over matplotlib's own defaults, whatever somebody's matplotlibrc says. The salt keeps the file's ids the same."""


def check_matplotlib() -> None:
    """Raises RequestError: matplotlib is not installed. For callers that measure for long before they draw."""
    if find_spec("matplotlib") is None:
        raise RequestError(
            "--sweep draws with matplotlib, which is not installed", hint="pip install 'blockpress[bench]'"
        )


def svg(panels: Sequence[Panel]) -> str:
    """The panels, two in a row, as one SVG document.

    Raises:
        RequestError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib import style

    out = StringIO()
    metadata = {"Title": "Throughput against users", "Description": described(panels), "Date": None}
    with style.context(["default", STYLE]):
        figure(panels).savefig(out, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def figure(panels: Sequence[Panel]) -> Figure:
    """The panels as a figure of matplotlib, to be saved in a format of choice."""
    from matplotlib import style
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style.context(["default", STYLE]):
        drawing = Figure(figsize=(columns * PANEL_INCHES[0], rows * PANEL_INCHES[1]), layout="constrained")
        for place, panel in enumerate(panels):
            _draw(drawing.add_subplot(rows, columns, place + 1), panel)
    return drawing


def described(panels: Sequence[Panel]) -> str:
    """The figures of all panels as text."""
    parts = []
    for panel in panels:
        rows = "\n".join("\t".join(row) for row in crossover_table(panel))
        parts.append(f"{panel.title}: {panel.note}\n{crossed(panel)}\ntokens a second in total\n{rows}")
    return "\n\n".join(parts)


def crossed(panel: Panel) -> str:
    """The crossing in words."""
    most = panel.curves[0].points[-1][0]
    if panel.crossing is None:
        return f"diffusion is faster up to {most} users and more"
    users = panel.crossing[0]
    least = panel.curves[0].points[0][0]
    return f"autoregressive is faster from {users:.0f} users on" if users > least else "autoregressive is faster"


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator

    users = [count for count, _ in panel.curves[0].points]
    for index, curve in enumerate(panel.curves):
        line, marker = ("--", "") if curve.dashed else ("-", ".")
        axes.plot(*zip(*curve.points, strict=True), line, marker=marker, color=COLOURS[index % 2], label=curve.name)
    if panel.crossing is not None:
        axes.plot(*panel.crossing, "o", markersize=10, color="black", fillstyle="none")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(users, [str(count) for count in users])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.set_xlabel("users at once")
    axes.set_ylabel("tokens/s, all users together")
    axes.grid(color="#d0d7de", linewidth=0.6)
    note = [*textwrap.wrap(panel.note, NOTE_WIDTH), crossed(panel)]
    axes.set_title(panel.title, loc="left", weight="bold", pad=8 + 10 * len(note))
    axes.annotate("\n".join(note), (0, 1), (0, 5), "axes fraction", "offset points", fontsize="small")
    axes.legend(loc="best")
