"""How many held-out puzzles the shipped model solves in `transformers`' own class, beside ours, on the same puzzles.

A measurement and no test: it takes minutes. The two draw their noise from different generators, so single puzzles fall
out differently; the shares should agree within their errors.
Run it:  python -m tests.parity.rate --count 200
"""

from __future__ import annotations

import argparse
import math

import torch

import blockpress
from blockpress.sudoku import held_out, layout
from tests.parity.oracle import load_shipped

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    count = parser.parse_args().count
    torch.manual_seed(0)
    torch.set_num_threads(1)
    theirs, lm, puzzles = load_shipped(), blockpress.load("sudoku-nano"), held_out(0, count)
    canvas = lm.config.canvas_length
    solved = {"transformers": 0, "blockpress": 0}
    for start in range(0, count, BATCH):
        some = puzzles[start : start + BATCH]
        prompts = [layout(puzzle.puzzle) for puzzle in some]
        ids = torch.tensor([lm.encode(prompt) for prompt in prompts])
        sequences = theirs.generate(input_ids=ids, max_new_tokens=canvas).sequences[:, ids.shape[1] :]
        replies = lm.generate(prompts, max_tokens=canvas, seed=0)
        for puzzle, row, reply in zip(some, sequences.tolist(), replies, strict=True):
            solved["transformers"] += lm.decode(row) == layout(puzzle.solution)
            solved["blockpress"] += reply.text == layout(puzzle.solution)
    for name, right in solved.items():
        share = right / count
        print(f"{name:13} {right} of {count}: {100 * share:.1f} % ± {100 * math.sqrt(share * (1 - share) / count):.1f}")


if __name__ == "__main__":
    main()
