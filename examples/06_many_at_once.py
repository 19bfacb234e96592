"""One engine, many callers: eight puzzles in one event loop, each answered as soon as its canvas has settled.

All canvases in progress share every forward, each at a step of its own; one caller leaves early.
Run it:  python examples/06_many_at_once.py
"""

import asyncio

import blockpress
from blockpress import sudoku
from blockpress.engine import EngineCore, EngineOptions, ThreadedEngine

lm = blockpress.load("sudoku-nano")
puzzles = [sudoku.generate_puzzle(seed=seed, givens=45) for seed in range(8)]


async def ask(engine: ThreadedEngine, number: int) -> None:
    [request] = lm.build_requests(sudoku.layout(puzzles[number].puzzle), seed=number)
    async for event in engine.stream(request):
        match event:
            case blockpress.Denoised() if number == 7:
                print(f"puzzle {number}: its caller has left")
                return  # leaving the loop cancels the request
            case blockpress.Done(reply=reply):
                right = reply.text == sudoku.layout(puzzles[number].solution)
                print(f"puzzle {number}: {'solved' if right else 'wrong'} in {reply.usage.steps} steps")


async def main() -> None:
    with ThreadedEngine(EngineCore(lm.network, EngineOptions(max_running=4))) as engine:
        await asyncio.gather(*(ask(engine, number) for number in range(8)))
        print(f"{engine.core.stats.forwards} forwards for all of them")


asyncio.run(main())
