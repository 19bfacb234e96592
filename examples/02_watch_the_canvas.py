"""Watch a canvas settle: what each step accepted, its entropy, and what it changed.

Run it:  python examples/02_watch_the_canvas.py
"""

import blockpress
from blockpress import sudoku

lm = blockpress.load("sudoku-nano")
puzzle = sudoku.generate_puzzle(seed=5, givens=45)

for event in lm.stream(sudoku.layout(puzzle.puzzle), seed=0):
    match event:
        case blockpress.Denoised():
            shown = "".join(
                digit if accepted else "·"
                for digit, accepted in zip(lm.decode(event.argmax), event.accepted.tolist(), strict=False)
                if digit != "\n"
            )
            print(f"{event.step:2}  {shown}  {event.entropy.mean():.3f} nats, {int(event.changed.sum())} changed")
        case blockpress.Done(reply=reply):
            print(f"{reply.finish_reason}: {reply.usage}")
