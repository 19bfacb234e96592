"""Panels and their picture: well-formed, whole, and with every figure as text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from matplotlib import rc_context
from matplotlib.text import Text

from blockpress import costs
from blockpress.bench.chart import crossed, figure, svg
from blockpress.bench.panels import Curve, Panel, crossing, crossover_table, roofline

SVG, DC = "{http://www.w3.org/2000/svg}", "{http://purl.org/dc/elements/1.1/}"


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
def test_the_chart_shows_the_figures(case: str) -> None:
    drawn, between = CASES[case]
    text = svg([drawn, drawn])
    root = ET.fromstring(text)
    said = next(root.iter(f"{DC}description")).text or ""
    for row in crossover_table(drawn)[1:]:
        assert "\t".join(row) in said
    assert "a <machine> & its like" in said and crossed(drawn) in said
    labels = [label.text for label in root.iter(f"{SVG}text")]
    for label in (
        drawn.title,
        drawn.note,
        crossed(drawn),
        "users at once",
        "tokens/s, all users together",
        "diffusion",
    ):
        assert labels.count(label) == 2, label
    assert all(labels.count(str(users)) >= 2 for users, _ in drawn.curves[0].points)
    if between is None:
        assert drawn.crossing is None
    else:
        assert drawn.crossing is not None and between[0] <= drawn.crossing[0] <= between[1]


def test_the_same_panels_give_the_same_bytes() -> None:
    panels = [panel for panel, _ in CASES.values()]
    text = svg(panels)
    with rc_context({"font.size": 30, "axes.facecolor": "black", "svg.hashsalt": None}):  # somebody's matplotlibrc
        assert svg(panels) == text
    assert "dc:date" not in text


@pytest.mark.parametrize(
    "panels", [[roofline(costs.DEVICES["rtx5090"])], [panel for panel, _ in CASES.values()]], ids=len
)
def test_no_text_overlaps_another_or_leaves_the_picture(panels: list[Panel]) -> None:
    drawing = figure(panels)
    drawing.draw_without_rendering()
    boxes = []
    for axes in drawing.axes:
        low, high = axes.get_ylim()
        unseen = [label for label in axes.get_yticklabels() if not low <= label.get_position()[1] <= high]
        texts = [text for text in axes.findobj(Text) if text.get_text() and text.get_visible()]
        boxes += [text.get_window_extent() for text in texts if text not in unseen]
    assert len(boxes) > 12 * len(panels)
    for index, box in enumerate(boxes):
        assert drawing.bbox.x0 <= box.x0 and box.x1 <= drawing.bbox.x1
        assert drawing.bbox.y0 <= box.y0 and box.y1 <= drawing.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


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


def test_weights_that_do_not_fit_are_reported() -> None:
    assert "do not fit" in roofline(costs.DEVICES["rtx5090"], form="bf16").note
    assert "do not fit" not in roofline(costs.DEVICES["rtx5090"], form="w4").note
