"""Panels as SVG, written by hand: axes, curves, the crossing, and the figures as text for whoever cannot see them.

Both axes are logarithmic, users in powers of 2, tokens a second in powers of 10. Colours follow the reader's: dark text
on light paper, light on dark.

Invariant: the same panels give the same bytes, and every figure stands in the file as text.
Run it:  python -m pytest tests/bench/test_chart.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from blockpress.bench.panels import Panel, crossover_table

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 58, 46
STYLE = """\
  svg { font: 13px sans-serif } .title { font-weight: bold; font-size: 15px }
  .paper { fill: #ffffff } text { fill: #1f2328 } .grid { stroke: #d0d7de; stroke-width: 1 }
  .curve { fill: none; stroke-width: 2.5 } .dashed { stroke-dasharray: 5 5 }
  .a { stroke: #0b5fff } .b { stroke: #c2410c } .mark { fill: none; stroke: #1f2328; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #3d444d }
    .a { stroke: #79b0ff } .b { stroke: #ffa657 } .mark { stroke: #e6edf3 }
  }
"""


def svg(panels: Sequence[Panel]) -> str:
    """The panels, one below the other, as one SVG document."""
    height = HEIGHT * len(panels)
    body = [line for place, panel in enumerate(panels) for line in _panel(panel, place)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
            f'height="{height}" aria-labelledby="title desc">',
            '<title id="title">Throughput against users</title>',
            f'<desc id="desc">{escape(described(panels))}</desc>',
            f"<style>\n{STYLE}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
            *body,
            "</svg>\n",
        ]
    )


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
    return f"token by token is faster from {users:.0f} users on" if users > least else "token by token is faster"


def _panel(panel: Panel, place: int) -> Iterator[str]:
    scale = _Scale(panel)
    yield f'<g transform="translate(0 {place * HEIGHT})">'
    yield f'<text class="title" x="{LEFT}" y="22">{escape(panel.title)}</text>'
    yield f'<text x="{LEFT}" y="41">{escape(panel.note)}</text>'
    yield from scale.axes()
    for index, curve in enumerate(panel.curves):
        kind = f"curve {'ab'[index % 2]}{' dashed' if curve.dashed else ''}"
        points = " ".join(f"{scale.x(users):.1f},{scale.y(speed):.1f}" for users, speed in curve.points)
        yield f'<polyline class="{kind}" points="{points}"/>'
        if not curve.dashed:
            users, speed = curve.points[len(curve.points) // 3]
            yield f'<text x="{scale.x(users):.1f}" y="{scale.y(speed) - 10:.1f}">{escape(curve.name)}</text>'
    if panel.crossing is not None:
        x, y = scale.x(panel.crossing[0]), scale.y(panel.crossing[1])
        yield f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        yield f'<text x="{x:.1f}" y="{y + 24:.1f}" text-anchor="middle">{panel.crossing[0]:.0f} users</text>'
    yield "</g>"


class _Scale:
    """From users and tokens a second to places in a panel."""

    def __init__(self, panel: Panel) -> None:
        speeds = [speed for curve in panel.curves for _, speed in curve.points]
        self.users = [users for users, _ in panel.curves[0].points]
        self.low, self.high = math.floor(math.log10(min(speeds))), math.ceil(math.log10(max(speeds)))
        self.high = max(self.high, self.low + 1)

    def x(self, users: float) -> float:
        first, last = math.log2(self.users[0]), math.log2(self.users[-1])
        share = (math.log2(users) - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, speed: float) -> float:
        share = (math.log10(speed) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> Iterator[str]:
        left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
        for power in range(self.low, self.high + 1):
            y = self.y(10**power)
            yield f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
            yield f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10**power:,}</text>'
        for users in self.users:
            x = self.x(users)
            yield f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{users}</text>'
        yield f'<text x="{right}" y="{bottom + 36}" text-anchor="end">users at once</text>'
        yield f'<text x="{left}" y="{bottom + 36}">tokens a second, all users together</text>'
