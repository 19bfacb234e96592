"""Panels and their picture: well-formed, whole, and with every figure as text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from blockpress import costs
from blockpress.bench.chart import crossed, svg
from blockpress.bench.panels import Curve, Panel, crossing, crossover_table, roofline

SPACE = "{http://www.w3.org/2000/svg}"


def panel(first: list[float], second: list[float]) -> Panel:
    users = [1, 2, 4, 8][: len(first)]
    curves = (
        Curve(name="diffusion", points=tuple(zip(users, first, strict=True))),
        Curve(name="autoregressive", points=tuple(zip(users, second, strict=True))),
    )
    return Panel(title="a <machine> & its like", note="a note", curves=curves)


CASES = {
    "between two points": (panel([100, 100, 100, 100], [20, 50, 80, 200]), (4, 8)),
    "never": (panel([100, 200, 400, 800], [10, 20, 40, 80]), None),
    "from the first": (panel([10, 10, 10, 10], [20, 30, 40, 50]), (1, 1)),
    "one point": (panel([10], [5]), None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_holds_the_figures(case: str) -> None:
    drawn, between = CASES[case]
    text = svg([drawn, drawn])
    root = ET.fromstring(text)
    said = "".join(root.find(f"{SPACE}desc").itertext())  # type: ignore[union-attr]
    for row in crossover_table(drawn)[1:]:
        assert "\t".join(row) in said
    assert "a <machine> & its like" in said and crossed(drawn) in said
    for line in root.iter(f"{SPACE}polyline"):
        places = [tuple(map(float, place.split(","))) for place in line.get("points", "").split()]
        assert len(places) == len(drawn.curves[0].points)
        assert all(0 <= x <= 640 and 0 <= y <= 360 for x, y in places)
    assert len(list(root.iter(f"{SPACE}circle"))) == (0 if between is None else 2)
    assert svg([drawn, drawn]) == text
    if between is None:
        assert drawn.crossing is None
    else:
        assert drawn.crossing is not None and between[0] <= drawn.crossing[0] <= between[1]


def test_the_crossing_is_on_both_lines() -> None:
    users, speed = crossing(((2, 64.0), (8, 256.0)), ((2, 16.0), (8, 1024.0)))  # type: ignore[misc]
    assert (users, speed) == pytest.approx((4, 128))


@pytest.mark.parametrize(
    ("device", "steps", "users"), [("h200", 16, 75), ("h200", 27, 36), ("h100", 16, 128), ("h100", 34, 44)]
)
def test_crossings_are_near_those_of_the_reference(device: str, steps: int, users: int) -> None:
    """Reference kernels, section 1, counts the commit as a forward of its own; here it shares one with a step."""
    found = roofline(costs.DEVICES[device], form="bf16", steps=steps, users=(1, 4, 16, 32, 64, 128, 256, 512)).crossing
    assert found is not None and found[0] == pytest.approx(users, rel=0.15)


def test_weights_that_do_not_fit_are_said_so() -> None:
    assert "do not fit" in roofline(costs.DEVICES["rtx5090"], form="bf16").note
    assert "do not fit" not in roofline(costs.DEVICES["rtx5090"], form="w4").note
