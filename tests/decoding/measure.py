"""What verification and repairs do to answers, on puzzles whose answers are known. The figures are in docs/log.md.

Run it:  python -m tests.decoding.measure --count 300
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import blockpress
from blockpress import sudoku
from blockpress.config import Sampling
from blockpress.decoding import Denoised, Done
from blockpress.evals.sudoku import puzzles
from blockpress.hardware import machine

WAYS: dict[str, Sampling] = {
    "plain": Sampling(),
    "repair below 0.01, at most 4": Sampling(max_repairs=4),
    "repair below 0.1, at most 1": Sampling(max_repairs=1, repair_below=0.1),
    "verified, at most 4": Sampling(max_verifications=4),
}


def main() -> None:
    """Held-out puzzles of 30 to 40 givens, each in every way with the seed 0; paired."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--pool", type=Path, default=Path("runs/sudoku/sudoku-pool.npz"))
    given = parser.parse_args()
    print(machine())
    lm = blockpress.load("sudoku-nano")
    held_out = puzzles(given.count, (30, 40), given.pool, 1)
    plain: list[bool] = []
    for name, sampling in WAYS.items():
        started, settled, replies = time.process_time(), dict[int, bool](), dict[int, blockpress.Reply]()
        for first in range(0, given.count, 30):
            some = [sudoku.layout(puzzle.puzzle) for puzzle in held_out[first : first + 30]]
            for event in lm.stream(some, 90, 0, sampling):
                if isinstance(event, Denoised):
                    settled[first + event.row] = event.settled
                elif isinstance(event, Done):
                    replies[first + event.row] = event.reply
        solved = [replies[i].text == sudoku.layout(puzzle.solution) for i, puzzle in enumerate(held_out)]
        plain = plain or solved
        pairs, usages = list(zip(plain, solved, strict=True)), [reply.usage for reply in replies.values()]
        print(
            f"{name}: solved {sum(solved) / given.count:.1%}, unsettled {1 - sum(settled.values()) / given.count:.1%}, "
            f"{sum(usage.forwards for usage in usages) / given.count:.1f} forwards, "
            f"{sum(usage.repairs for usage in usages) / given.count:.2f} repairs, "
            f"only plain {pairs.count((True, False))}, only this {pairs.count((False, True))}, "
            f"{time.process_time() - started:.0f} s of processor time",
            flush=True,
        )


if __name__ == "__main__":
    main()
