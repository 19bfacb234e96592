"""`python -m blockpress` is the command `blockpress`."""

from __future__ import annotations

import sys

from blockpress.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
