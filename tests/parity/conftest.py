"""No gradients, no shape checks, and a table of the worst figure of every comparison at the end of the run.

A test says what it measured with `report(comparison, value, limit)`; properties travel with xdist's reports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version

import pytest
import torch

Report = Callable[[str, float, float], None]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """`report(comparison, value, limit)`: remember a figure for the table; the one nearest to its limit is shown."""

    def remember(comparison: str, value: float, limit: float) -> None:
        request.node.user_properties.append(("parity", (comparison, float(value), float(limit))))

    return remember


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for outcome in ("passed", "failed"):
        for done in terminalreporter.getreports(outcome):
            for name, value in done.user_properties if done.when == "call" else ():
                if name == "parity":
                    comparison, measured, limit = value
                    figures[comparison].append((measured, limit))
    if not figures:
        return
    terminalreporter.section(f"parity with transformers {version('transformers')}: the figure nearest to its limit")
    for comparison in sorted(figures):
        measured, limit = max(figures[comparison], key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0])
        count = len(figures[comparison])
        terminalreporter.write_line(f"{comparison:<64} {measured:>9.3g}   limit {limit:<9.3g} of {count}")
