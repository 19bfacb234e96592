"""A loaded model: `load` gives it, `LM` is it.

Invariant: whatever comes in is checked here, by name, before the first forward; nothing that is accepted is ignored.

Run it:  python -c "import blockpress; print(blockpress.load('sudoku-nano').generate('5' * 81))"
"""

from blockpress.lm.loading import load
from blockpress.lm.model import LM

__all__ = ["LM", "load"]
