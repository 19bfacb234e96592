"""The measuring of a sudoku model: what is counted as solved, and what the table says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from blockpress import sudoku
from blockpress.config import PRESETS, Sampling
from blockpress.evals import sudoku as measure
from blockpress.model import Network
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer
from blockpress.train import card
from blockpress.train.card import (
    Measured,
    PuzzleOutcome,
    SolvedShare,
    calibration,
    calibration_table,
    score,
    steps_table,
)

PUZZLES = [sudoku.generate_puzzle(seed, 60) for seed in range(3)]


OUTCOMES = [
    PuzzleOutcome(True, 4, True, 0.004),
    PuzzleOutcome(False, 16, False, 0.3),
    PuzzleOutcome(True, 8, True, 0.0049),
    PuzzleOutcome(True, 16, False, 0.005),
    PuzzleOutcome(False, 3, True, 0.0),
]


def test_a_score_counts_shares_steps_and_its_standard_error():
    got = score("x", OUTCOMES, 2.5)
    assert got == SolvedShare("x", 5, 0.6, math.sqrt(0.6 * 0.4 / 5), 47 / 5, 28 / 3, 0.2, 0.4, 2.5)
    assert score("x", OUTCOMES[1:2], 1.0).steps_solved == 0


def test_calibration_counts_every_answer_in_one_class():
    found = calibration([*OUTCOMES, PuzzleOutcome(True, 90, True)])
    assert [(c.low, c.high, c.answers, c.right) for c in found] == [
        (0.0, 0.005, 3, 2), (0.005, 0.01, 1, 1), (0.01, 0.02, 0, 0), (0.02, 0.05, 0, 0), (0.05, None, 1, 0),
    ]  # fmt: skip
    lines = calibration_table(found).split("\n")
    assert lines[2:] == [
        "| below 0.005 | 3 | 66.7 % |", "| 0.005 to 0.01 | 1 | 100.0 % |", "| 0.01 to 0.02 | 0 |  |",
        "| 0.02 to 0.05 | 0 |  |", "| 0.05 and more | 1 | 0.0 % |",
    ]  # fmt: skip


def test_the_table_has_a_row_a_score():
    lines = steps_table([score("one", OUTCOMES[:2], 2.5), score("two", OUTCOMES[2:3], 1.0)]).split("\n")
    assert len(lines) == 4
    assert lines[2] == "| one | 2 | 50.0 % ± 35.4 | 10.00 | 4.00 | 0.0 % | 50.0 % |"
    assert len({line.count("|") for line in lines}) == 1


class Knows(Network):
    """Writes the solution of every puzzle but the first, whose first row it leaves blank."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(PRESETS["sudoku-nano"]())
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed_tokens.weight[:, :16] = torch.eye(16)
        self.tokenizer = tokenizer
        self.answers: dict[tuple[int, ...], list[int]] = {}
        for place, puzzle in enumerate(PUZZLES):
            grid = puzzle.solution if place else "0" * 9 + puzzle.solution[9:]
            answer = [*tokenizer.encode(sudoku.layout(grid), add_special=False), 1]
            self.answers[tuple(tokenizer.encode(sudoku.layout(puzzle.puzzle)))] = answer
        self.prompts: list[tuple[int, ...]] = []

    def read(self, tokens, cache, counts=None, images=None):  # type: ignore[no-untyped-def]
        if not cache.width:
            self.prompts = [tuple(row) for row in tokens.tolist()]
        return super().read(tokens, cache, counts)

    def denoise(self, canvas, cache, signal):  # type: ignore[no-untyped-def]
        answers = torch.tensor([self.answers[prompt] for prompt in self.prompts])
        return torch.nn.functional.one_hot(answers, 192).float() * 100


@pytest.mark.parametrize("batch", [1, 3])
def test_only_the_whole_grid_counts_as_solved(tmp_path: Path, batch: int):
    write_digits_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    got = measure.diffusion(Knows(tokenizer), tokenizer, PUZZLES, Sampling(steps=5), batch)
    assert [(outcome.solved, outcome.steps, outcome.settled) for outcome in got] == [
        (False, 2, True), (True, 2, True), (True, 2, True),
    ]  # fmt: skip
    assert all(outcome.entropy is not None and outcome.entropy < 1e-3 for outcome in got)


def test_the_model_card_has_the_history_and_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(card, "load_config", lambda path: PRESETS["sudoku-nano"]())
    run = {"step": 7, "draws": 70, "seconds": 3600, "hardware": "a processor", "parameters": 2_487_960, "seed": 3}
    first = run | {"recipe": "sudoku", "segments": [{}, {}, {}]}
    second = run | {"recipe": "sudoku-on-policy", "segments": [{}], "weights": "their moving average", "before": first}
    (tmp_path / "training.json").write_text(json.dumps(second))
    scores = [score("one", OUTCOMES, 1.0)]
    page = card.card(tmp_path, Measured(scores, scores, calibration(OUTCOMES)), (30, 40), "a processor")
    order = (
        "`blockpress train sudoku`: 7 steps",
        "2 times",
        "`blockpress train sudoku-on-policy`: 7 steps",
        "moving average",
    )
    words = " ".join(page.split())
    assert [words.index(part) for part in order] == sorted(words.index(part) for part in order)
    assert page.count("| one |") == 2 and "| 0.05 and more | 1 | 0.0 % |" in page


def test_held_out_grids_are_no_symmetric_images_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pool = sudoku.puzzle_pool(4, 3)
    monkeypatch.setattr(measure, "sudoku_pool", lambda *asked: pool)
    asked = {}
    monkeypatch.setattr(measure.sudoku, "held_out", lambda *a, avoid: asked.update(avoid=avoid, rest=a) or [])
    measure.puzzles(7, (30, 40), tmp_path, 1)
    assert asked["rest"] == (measure.HELD_OUT_SEED, 7, (30, 40))
    assert asked["avoid"] == {sudoku.fingerprint("".join(map(str, grid))) for grid in pool[0].tolist()}
