"""Progress bars for work whose number of bytes is known.

Invariant: bars are drawn on stderr, and only on a terminal.

Run it:  blockpress synthesize tiny ./random
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blockpress.cli import terminal

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (bytes done, bytes in all) that updates the bar."""
    if not terminal.is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    with byte_bars() as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def byte_bars() -> Progress:
    """Bars with counts, speed and time left on stderr; a context manager. Only for a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=terminal.console(sys.stderr))
