"""Load the shipped model and answer three prompts in one batch.

Run it:  python examples/01_generate.py
"""

import blockpress
from blockpress import sudoku

lm = blockpress.load("sudoku-nano")
puzzles = sudoku.held_out(seed=1, count=3, givens=(45, 50))

for puzzle, reply in zip(puzzles, lm.generate([sudoku.layout(p.puzzle) for p in puzzles], seed=0), strict=True):
    verdict, usage = "solved" if reply.text == sudoku.layout(puzzle.solution) else "not solved", reply.usage
    print(f"{puzzle.givens} givens: {verdict} in {usage.steps} steps, {usage.tokens_per_forward:.1f} tokens a forward")
    print(reply.text, end="\n\n")
