"""The measuring of a sudoku model: what is counted as solved, and what the table says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from blockpress import sudoku
from blockpress.config import PRESETS, Sampling
from blockpress.model import Network
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer
from blockpress.train import measure
from blockpress.train.measure import Score, score, table

PUZZLES = [sudoku.generate(seed, 60) for seed in range(3)]


def test_a_score_counts_shares_steps_and_its_standard_error():
    got = score("x", [True, False, True, True], [4, 16, 8, 6], 16, 2.5)
    assert got == Score("x", 4, 0.75, math.sqrt(0.75 * 0.25 / 4), 8.5, 6.0, 0.75, 2.5)
    assert score("x", [False], [3], 3, 1.0).steps_solved == 0


def test_the_table_has_a_line_a_score():
    lines = table([score("one", [True, False], [4, 16], 16, 2.5), score("two", [True], [2], 16, 1.0)]).split("\n")
    assert len(lines) == 4
    assert lines[2] == "| one | 2 | 50.0 % ± 35.4 | 10.00 | 4.00 | 50 % |"
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
    assert (got.puzzles, got.solved, got.mean_steps, got.settled) == (3, pytest.approx(2 / 3), 2.0, 1.0)


def test_held_out_grids_are_no_images_of_the_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pool = sudoku.pool(4, 3)
    monkeypatch.setattr(measure, "sudoku_pool", lambda *asked: pool)
    asked = {}
    monkeypatch.setattr(measure.sudoku, "held_out", lambda *a, avoid: asked.update(avoid=avoid, rest=a) or [])
    measure.puzzles(7, (30, 40), tmp_path, 1)
    assert asked["rest"] == (measure.HELD_OUT_SEED, 7, (30, 40))
    assert asked["avoid"] == {sudoku.fingerprint("".join(map(str, grid))) for grid in pool[0].tolist()}
