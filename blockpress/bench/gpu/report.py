"""Figures: a line of JSON as soon as each is known, so that an interrupted run leaves results; a table last.

    {"part": "experts", "name": "bf16 M=256", "value": 0.41, "unit": "ms", "floor": 0.354, "share": 0.863}

`floor` is the best value that the device's limits allow (for a rate: the ceiling); `share` is 1 where the value reaches
it.

Invariant: every figure printed is in the table.
Run it:  python -m pytest blockpress/bench/gpu/report.py
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import TextIO

TIMES = ("ms", "us", "s")
"""Units where less is better; in all others, more is."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value in its unit, and the best value that the device's limits allow, if known."""

    part: str
    name: str
    value: float
    unit: str
    floor: float | None = None

    @property
    def share(self) -> float | None:
        """Floor over time, or rate over ceiling.

        >>> Figure(part="a", name="b", value=2.0, unit="ms", floor=1.0).share
        0.5
        >>> Figure(part="a", name="b", value=3.0, unit="TB/s", floor=4.0).share
        0.75
        """
        if self.floor is None or not self.value:
            return None
        return self.floor / self.value if self.unit in TIMES else self.value / self.floor


@dataclass(kw_only=True)
class GpuReport:
    """The figures of one run, part by part."""

    part: str
    out: TextIO = field(default_factory=lambda: sys.stdout)
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, floor: float | None = None) -> None:
        """Print a figure, and keep it for the table."""
        figure = Figure(part=self.part, name=name, value=value, unit=unit, floor=floor)
        self.figures.append(figure)
        line = {"part": figure.part, "name": name, "value": _short(value), "unit": unit, "floor": _short(floor)}
        print(json.dumps(line | {"share": _short(figure.share)}), file=self.out, flush=True)

    def note(self, text: str) -> None:
        """Print a remark: what could not be measured, and why."""
        print(json.dumps({"part": self.part, "note": text}), file=self.out, flush=True)

    def table(self) -> str:
        """All figures, a line each.

        >>> import io
        >>> report = GpuReport(part="ceilings", out=io.StringIO())
        >>> report.add("copy", 4.1, "TB/s", floor=4.3)
        >>> print(report.table())
        ceilings copy      4.100 TB/s   floor      4.300   95%
        """
        width = max((len(figure.name) for figure in self.figures), default=0)
        return "\n".join(_line(figure, width) for figure in self.figures)


def _line(figure: Figure, width: int) -> str:
    floor = "" if figure.floor is None else f"   floor {figure.floor:10.3f} {figure.share or 0:5.0%}"
    return f"{figure.part} {figure.name:<{width}} {figure.value:10.3f} {figure.unit}{floor}"


def _short(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")
