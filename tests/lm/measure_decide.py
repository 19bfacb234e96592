"""What one denoising step reads of a grid, and what decisions cost. The figures are in docs/log.md.

Run it:  python -m tests.lm.measure_decide puzzles --count 300       python -m tests.lm.measure_decide cost
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import blockpress
from blockpress import Choice, Decision, YesNo, sudoku
from blockpress.bench.subject import bench_4k, bench_262k
from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.decoding import slots
from blockpress.evals.sudoku import puzzles
from blockpress.hardware import machine
from blockpress.lm import LM
from blockpress.text import Tokenizer
from tests.chat_tokenizer import TOKENIZER
from tests.conftest import GEMMA, make_random_network

DIGITS = list("123456789")
BINS = (0.0, 0.5, 0.9, 0.99, 0.999, 1.01)


def read_puzzles(count: int) -> None:
    """The empty cells of held-out puzzles of 30 to 40 givens, the givens pinned: how many are read rightly."""
    lm = blockpress.load("sudoku-nano")
    held_out = puzzles(count, (30, 40), Path("runs/sudoku/sudoku-pool.npz"), 1)
    ways: dict[str, dict[str, int]] = {
        "1 step": {},
        "1 step, 8 draws": {"draws": 8},
        "4 steps": {"steps": 4},
        "12 steps": {"steps": 12},
    }
    written = [lm.generate(sudoku.layout(puzzle.puzzle), 90) for puzzle in held_out]
    for name, options in {"written (LM.generate)": None, **ways}.items():
        right, solved, sure, started = 0, 0, [], time.process_time()
        for puzzle, reply in zip(held_out, written, strict=True):
            grid, solution = sudoku.layout(puzzle.puzzle), sudoku.layout(puzzle.solution)
            empty = [cell for cell, digit in enumerate(grid) if digit == "0"]
            if options is None:
                values = [(reply.text or "").ljust(90)[cell] for cell in empty]
            else:
                questions = [Choice("digit", options=DIGITS) for _ in empty]
                decision = lm.decide(grid, questions, form=grid.split("0"), **options)  # type: ignore[call-overload]
                values = [answer.value for answer in decision]
                sure += [(a.confidence, a.value == solution[cell]) for a, cell in zip(decision, empty, strict=True)]
            hits = [value == solution[cell] for value, cell in zip(values, empty, strict=True)]
            right, solved = right + sum(hits), solved + all(hits)
        cells = sum(puzzle.puzzle.count("0") for puzzle in held_out)
        line = f"{name}: {right / cells:.2%} of {cells} cells, {solved / count:.1%} of {count} grids"
        print(f"{line}, {time.process_time() - started:.0f} s of processor time", flush=True)
        for low, high in pairwise(BINS):
            inside = [(each, hit) for each, hit in sure if low <= each < high]
            if inside:
                share = sum(hit for _, hit in inside) / len(inside)
                print(f"    confidence {low} to {min(high, 1)}: {len(inside)} cells, {share:.2%} right", flush=True)


def measure_cost(config: ModelConfig, tokenizer: Tokenizer, repeats: int) -> None:
    """Prefill and step of 1, 8 and 64 questions, and a step of a whole canvas, in turns; processor time, one thread."""
    network, generation = make_random_network(config), GenerationConfig(stop_ids=(1,))
    lm, bare = (LM(path=Path(), network=network, generation=generation, tokenizer=each) for each in (tokenizer, None))
    spent: dict[str, float] = {}

    def timed(name: str) -> Any:
        function: Callable[..., Any] = getattr(slots, name)

        def call(*arguments: Any) -> Any:
            started = time.process_time()
            result = function(*arguments)
            spent[name] = spent.get(name, 0.0) + time.process_time() - started
            return result

        return patch.object(slots, name, call)

    def whole_step() -> float:
        started = time.process_time()
        reply = bare.generate([2, 3], config.canvas_length, sampling=Sampling(steps=2))
        return (time.process_time() - started) / reply.usage.steps

    def decided(count: int) -> tuple[float, float, Decision]:
        spent.clear()
        with timed("_read"), timed("_denoise"):
            decision = lm.decide("It rains.", [YesNo("Is it wet?") for _ in range(count)])
        return spent["_read"], spent["_denoise"], decision

    whole_step(), decided(1)
    rounds = [(whole_step(), {count: decided(count) for count in (1, 8, 64)}) for _ in range(repeats)]
    step = min(whole for whole, _ in rounds)
    print(f"{config.vocab_size} tokens, canvas of {config.canvas_length}: a step {step * 1000:.0f} ms", flush=True)
    for count in (1, 8, 64):
        read, denoised, _ = (min(each[count][part] for _, each in rounds) for part in (0, 1, 0))
        usage = rounds[0][1][count][2].usage
        print(
            f"    {count} questions: step {denoised * 1000:.1f} ms, {denoised / step:.3f} of a whole canvas's; prefill of "
            f"{usage.input_tokens} tokens {read * 1000:.0f} ms; {usage.canvases} canvases",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["puzzles", "cost"])
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if options.what == "puzzles":
        read_puzzles(options.count)
    else:
        measure_cost(bench_4k(), TOKENIZER, 5)
        measure_cost(bench_262k(), Tokenizer.from_directory(GEMMA), 3)


if __name__ == "__main__":
    main()
