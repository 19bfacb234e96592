"""A loaded model: `load` returns an `LM`.

Invariant: every argument is checked here, by name, before the first forward; none that is accepted is ignored.
Run it:  python -c "import blockpress; print(blockpress.load('sudoku-nano').generate('5' * 81))"
"""

from blockpress.lm.loading import load
from blockpress.lm.model import LM

__all__ = ["LM", "load"]
