"""What constraints do to answers, and what they and edits of the logits cost. The figures are in docs/log.md.

Run it:  python -m tests.constrain.measure puzzles --count 300       python -m tests.constrain.measure cost
         python -m tests.constrain.measure holes --count 100         python -m tests.constrain.measure drafts --count 100
         python -m tests.constrain.measure edits --turns 2
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import blockpress
from blockpress import sudoku
from blockpress.bench.subject import bench_262k
from blockpress.config import GenerationConfig, Sampling
from blockpress.constrain import ConstraintState
from blockpress.evals.sudoku import puzzles
from blockpress.hardware import machine
from blockpress.lm import LM
from tests.conftest import GEMMA, make_random_network

FORM = r"([1-9]{9}\n){8}[1-9]{9}"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age", "email"],
    "additionalProperties": False,
}
ITEM = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "qty": {"type": "integer", "minimum": 1},
        "note": {"type": "string"},
    },
    "required": ["sku", "qty"],
}
SHAPES: dict[str, dict[str, Any]] = {
    "a choice of five": {"choice": ["positive", "negative", "neutral", "mixed", "unknown"]},
    "a date": {"regex": r"\d{4}-\d{2}-\d{2}"},
    "a person": {"schema": PERSON},
    "up to five items": {"schema": {"type": "array", "minItems": 1, "maxItems": 5, "items": ITEM}},
    "any JSON": {"schema": {}},
}


EDITS: dict[str, dict[str, Any]] = {
    "a bias of ten tokens": {"logit_bias": {7 * token: 1.0 for token in range(10)}},
    "a thousand tokens allowed": {"allowed_token_ids": range(1000)},
    "penalties": {"frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "top_k 64": {"top_k": 64},
    "top_k 64, top_p 0.95": {"top_k": 64, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 64 and a penalty": {"top_k": 64, "presence_penalty": 0.5},
    "top_p 0.95": {"top_p": 0.95},
}


def givens(puzzle: str) -> str:
    """The grid's form with the givens in their places."""
    rows = (puzzle[start : start + 9] for start in range(0, 81, 9))
    return r"\n".join(row.replace("0", "[1-9]") for row in rows)


def kept_out(count: int) -> list[sudoku.Puzzle]:
    """Held-out puzzles of 30 to 40 givens."""
    return puzzles(count, (30, 40), Path("runs/sudoku/sudoku-pool.npz"), 1)


def pinned(lm: LM, puzzle: str) -> dict[int, int]:
    """The givens and the line ends at their positions in the answer."""
    assert lm.tokenizer is not None
    tokens = lm.tokenizer.encode(sudoku.layout(puzzle), add_special=False)
    return {place: token for place, token in enumerate(tokens) if sudoku.layout(puzzle)[place] != "0"}


def measure_holes(count: int) -> None:
    """Holes of 1 to 20 characters anywhere in solved grids, of 24 at most: how many are filled rightly."""
    lm, rng = blockpress.load("sudoku-nano"), random.Random(0)
    rows: dict[str, list[tuple[bool, bool, int]]] = {}
    for puzzle in kept_out(count):
        before, grid = sudoku.layout(puzzle.puzzle), sudoku.layout(puzzle.solution)
        length = rng.randint(1, 20)
        start = rng.randint(0, 89 - length)
        hole, rest = grid[start : start + length], grid[start + length :]
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "after the puzzle": (before, {}),
            "puzzle as instruction": ("", {"instruction": before}),
            "length given": (before, {"regex": rf"[1-9\n]{{{length}}}"}),
            "without the puzzle": ("", {}),
        }
        for name, (shown, options) in calls.items():
            reply = lm.infill(shown + grid[:start], rest, 24, **options)
            assert reply.whole.removeprefix(before) == grid[:start] + reply.text + rest
            rows.setdefault(name, []).append((reply.text == hole, len(reply.text) == length, reply.usage.steps))
    for name, outcomes in rows.items():
        right, fits, steps = (sum(values) / count for values in zip(*outcomes, strict=True))
        print(
            f"{name}: right {right:.1%}, of the right length {fits:.1%}, {steps:.1f} steps, trials included; n {count}"
        )


def measure_drafts(count: int) -> None:
    """Answers that start from the right grid with ten digits changed, by noise level; no pins."""
    lm, rng = blockpress.load("sudoku-nano"), random.Random(0)
    cases = []
    for puzzle in kept_out(count):
        grid = list(sudoku.layout(puzzle.solution))
        for place in rng.sample([i for i in range(89) if grid[i] != "\n"], 10):
            grid[place] = rng.choice("123456789")
        cases.append((sudoku.layout(puzzle.puzzle), sudoku.layout(puzzle.solution), "".join(grid)))
    for noise in (None, 0.0, 0.25, 0.5, 0.75, 1.0):
        given: list[dict[str, Any]] = [{} if noise is None else {"draft": wrong, "noise": noise} for *_, wrong in cases]
        replies = [lm.generate(case[0], 90, **each) for case, each in zip(cases, given, strict=True)]
        solved = sum(reply.text == case[1] for reply, case in zip(replies, cases, strict=True)) / count
        steps = sum(reply.usage.steps for reply in replies) / count
        print(f"noise {noise}: solved {solved:.1%} of {count}, {steps:.2f} steps", flush=True)


def compare_puzzles(count: int) -> None:
    """Held-out puzzles of 30 to 40 givens: plain, held to the grid's form, and with the givens pinned; paired."""
    lm, held_out = blockpress.load("sudoku-nano"), kept_out(count)
    shapes: dict[str, Callable[[str], dict[str, Any]]] = {
        "plain": lambda _: {},
        "form": lambda _: {"regex": FORM},
        "givens": lambda puzzle: {"regex": givens(puzzle)},
        "pinned": lambda puzzle: {"pins": pinned(lm, puzzle)},
        "pinned, form": lambda puzzle: {"pins": pinned(lm, puzzle), "regex": FORM},
    }
    solved: dict[str, list[bool]] = {}
    for name, shape in shapes.items():
        started, steps, valid = time.process_time(), 0, True
        solved[name] = []
        for puzzle in held_out:
            reply = lm.generate(sudoku.layout(puzzle.puzzle), 90, **shape(puzzle.puzzle))
            solved[name].append(reply.text == sudoku.layout(puzzle.solution))
            steps, valid = steps + reply.usage.steps, valid and reply.invalid is None
        pairs = list(zip(solved["plain"], solved[name], strict=True))
        print(
            f"{name}: solved {sum(solved[name]) / count:.1%} of {count}, {steps / count:.2f} steps, all valid: {valid}, "
            f"only plain {pairs.count((True, False))}, only this {pairs.count((False, True))}, "
            f"{time.process_time() - started:.0f} s of processor time",
            flush=True,
        )


def bench_model() -> LM:
    """bench-262k in float32 with the published tokenizer."""
    tokenizer = blockpress.text.Tokenizer.from_directory(GEMMA)
    generation, network = GenerationConfig(stop_ids=(1, 106)), make_random_network(bench_262k())
    return LM(path=Path(), network=network, generation=generation, tokenizer=tokenizer)


def measure_edits(turns: int) -> None:
    """Steps of bench-262k, free and with edited logits, in turns; processor time, one thread."""
    lm, sampling = bench_model(), replace(Sampling(), steps=2)

    def step(**edits: Any) -> float:
        started = time.process_time()
        reply = lm.generate("hi", lm.config.canvas_length, sampling=sampling.with_(**edits))
        return (time.process_time() - started) / reply.usage.steps

    step()
    for name, edits in EDITS.items():
        pairs = [(step(), step(**edits)) for _ in range(turns)]
        ratios = ", ".join(f"{edited / free:.2f} ({edited:.2f}/{free:.2f} s)" for free, edited in pairs)
        print(f"{name}: {ratios} times a free step", flush=True)


def measure_cost(turns: int) -> None:
    """Steps of bench-262k with the published tokenizer, free and constrained, in turns; processor time, one thread."""
    lm, sampling = bench_model(), replace(Sampling(), steps=4)
    config = lm.config

    def step(**shape: Any) -> float:
        started = time.process_time()
        reply = lm.generate("hi", config.canvas_length, sampling=sampling, **shape)
        return (time.process_time() - started) / reply.usage.steps

    def compiled(shape: dict[str, Any]) -> tuple[float, ConstraintState]:
        started = time.process_time()
        state = lm.build_requests("hi", config.canvas_length, **shape)[0].row.constraint
        assert state is not None
        return time.process_time() - started, state

    first, _ = compiled({"choice": ["a"]})
    print(
        f"the first constraint of a model, which reads its vocabulary: {first:.2f} s; memory of a free step {peak(step)} MB"
    )
    for name, shape in SHAPES.items():
        (cold, state), (warm, _) = compiled(shape), compiled(shape)
        held = peak(lambda shape=shape: step(**shape))  # type: ignore[misc]
        pairs = [(step(), step(**shape)) for _ in range(turns)]
        ratios = sorted(constrained / free for free, constrained in pairs)
        automaton = state.constraint.automaton
        print(
            f"{name}: {len(automaton.accepting)} states, {automaton.num_classes} classes, {len(automaton.source)} edges; "
            f"compiled in {cold:.2f} s, again {warm * 1000:.1f} ms; a step {ratios[len(ratios) // 2]:.2f} times a free one "
            f"({', '.join(f'{b:.2f}/{a:.2f} s' for a, b in pairs)}); memory {held} MB",
            flush=True,
        )


def peak(run: Callable[[], object]) -> int:
    """The megabytes that a call holds at most beyond those before it (Linux)."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["puzzles", "holes", "drafts", "cost", "edits"])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if options.what == "puzzles":
        compare_puzzles(options.count)
    elif options.what == "holes":
        measure_holes(options.count)
    elif options.what == "drafts":
        measure_drafts(options.count)
    elif options.what == "edits":
        measure_edits(options.turns)
    else:
        measure_cost(options.turns)


if __name__ == "__main__":
    main()
