"""A bar for work of which it is known how many bytes there are.

Invariant: nothing is drawn but on a terminal, and on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockpress.cli import terminal


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (bytes done, bytes in all) that moves the bar."""
    if not terminal.is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=terminal.console(sys.stderr)) as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
