"""Output for a person at a terminal, or for a program.

Invariant: escape codes go to a terminal only, and never to a dumb one. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can move its cursor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def console(stream: TextIO) -> Console:
    """A rich console that prints text literally: no markup, no emoji names, no colouring of numbers."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False)


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a status line while the block runs, on a terminal only."""
    if not is_terminal(sys.stderr):
        yield
        return
    with console(sys.stderr).status(text):
        yield


def without_controls(text: str) -> str:
    """`text` made safe for a terminal: control characters other than line ends and tabs are escaped.

    >>> without_controls("a\\x1b[31mb\\n")
    'a\\\\x1b[31mb\\n'
    """
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
