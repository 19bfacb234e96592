"""Sudoku rows: tokens that are a puzzle and its solution, as a function of (seed, step), along the curriculum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blockpress import sudoku
from blockpress.config import PRESETS
from blockpress.errors import TrainingError
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer
from blockpress.train import data
from blockpress.train.data import Givens, SudokuRows, sudoku_pool, symmetries_of

CONFIG = PRESETS["sudoku-nano"]()
CURRICULUM = Givens(first=(60, 70), last=(40, 50), over=0.5)
BlockPool = tuple[NDArray[np.uint8], NDArray[np.int8]]


@pytest.fixture(scope="module")
def pool() -> BlockPool:
    return sudoku.puzzle_pool(4, 6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("digits")
    write_digits_tokenizer(folder)
    return Tokenizer.from_directory(folder)


def source(pool: BlockPool, seed: int = 1, givens: Givens = CURRICULUM) -> SudokuRows:
    return SudokuRows(CONFIG, *pool, givens, seed)


def test_tokens_are_the_puzzle_and_its_solution(pool: BlockPool, tokenizer: Tokenizer):
    rows = source(pool).rows(0, 12, 1.0)
    assert rows.tokens.dtype == torch.long
    assert rows.prompts.tolist() == [90] * 12
    assert rows.canvases.tolist() == [1] * 12
    for tokens in rows.tokens.tolist():
        prompt, canvas = tokens[:90], tokens[90:]
        puzzle, solution = tokenizer.decode(prompt), tokenizer.decode(canvas)
        assert prompt == tokenizer.encode(puzzle)
        assert canvas == [*tokenizer.encode(solution, add_special=False), CONFIG.eos_ids[0]]
        puzzle, solution = sudoku.parse_puzzle(puzzle), sudoku.parse_puzzle(solution)
        assert sudoku.is_solved(solution)
        assert sudoku.agrees(puzzle, solution)
        assert sudoku.count_solutions(puzzle) == 1


def test_a_longer_canvas_is_filled_with_eos(pool: BlockPool):
    longer = SudokuRows(PRESETS["diffusiongemma-26B-A4B"](), *pool, CURRICULUM, 1).rows(0, 2, 0.0)
    shorter = SudokuRows(PRESETS["tiny"](), *pool, CURRICULUM, 1).rows(0, 2, 0.0)
    assert (longer.canvases.tolist(), longer.tokens.shape) == ([1, 1], (2, 90 + 256))
    assert (shorter.canvases.tolist(), shorter.tokens.shape) == ([8, 8], (2, 90 + 96))
    assert (longer.tokens[:, 90 + 89 :] == 1).all()
    assert torch.equal(longer.tokens[:, : 90 + 96], shorter.tokens)


def test_rows_are_a_function_of_seed_and_step(pool: BlockPool):
    first = source(pool).rows(7, 8, 0.3).tokens
    assert torch.equal(first, source(pool).rows(7, 8, 0.3).tokens)
    assert not torch.equal(first, source(pool).rows(8, 8, 0.3).tokens)
    assert not torch.equal(first, source(pool, seed=2).rows(7, 8, 0.3).tokens)


def test_a_symmetry_moves_cells_and_leaves_a_puzzle_with_its_solution(pool: BlockPool, tokenizer: Tokenizer):
    rows = source(pool).rows(0, 24, 1.0)
    sources = source(pool).symmetries(rows, 5)
    assert torch.equal(sources.sort(dim=1).values, torch.arange(180).expand(24, 180))
    moved = rows.tokens.gather(1, sources)
    assert (moved != rows.tokens).any(dim=1).all()
    for before, tokens in zip(rows.tokens.tolist(), moved.tolist(), strict=True):
        assert (tokens[0], tokens[-1]) == (CONFIG.bos_id, CONFIG.eos_ids[0])
        puzzle, solution = (sudoku.parse_puzzle(tokenizer.decode(part)) for part in (tokens[1:90], tokens[90:]))
        assert sudoku.is_solved(solution) and sudoku.agrees(puzzle, solution)
        assert sorted(tokens) == sorted(before)


def test_symmetries_are_a_function_of_seed_and_step(pool: BlockPool):
    rows = source(pool).rows(0, 8, 1.0)
    first = source(pool).symmetries(rows, 5)
    assert torch.equal(first, source(pool).symmetries(rows, 5))
    assert not torch.equal(first, source(pool).symmetries(rows, 6))
    assert not torch.equal(first, source(pool, seed=2).symmetries(rows, 5))


def test_a_grid_of_several_canvases_has_no_symmetries(pool: BlockPool):
    short = SudokuRows(PRESETS["tiny"](), *pool, CURRICULUM, 1)
    with pytest.raises(TrainingError, match="canvas_length is 12"):
        symmetries_of(short)
    assert symmetries_of(source(pool))(source(pool).rows(0, 2, 0.0), 0).shape == (2, 180)


def test_the_pool_is_left_as_it_was(pool: BlockPool):
    before = [x.copy() for x in pool]
    source(pool).rows(0, 20, 0.5)
    assert all(np.array_equal(x, old) for x, old in zip(pool, before, strict=True))


def test_no_puzzle_comes_twice(pool: BlockPool):
    rows = source(pool).rows(0, 200, 0.5).tokens
    assert len(rows.unique(dim=0)) == 200


@pytest.mark.parametrize(("progress", "low", "high"), [(0.0, 60, 70), (0.25, 50, 60), (0.5, 40, 50), (1.0, 40, 50)])
def test_the_number_of_givens_follows_the_curriculum(pool: BlockPool, progress: float, low: int, high: int):
    prompts = source(pool).rows(3, 400, progress).tokens[:, :90]
    givens = ((prompts > 5) & (prompts <= 14)).sum(1)
    assert (int(givens.min()), int(givens.max())) == (low, high)
    counts = givens.bincount()[low:]
    assert counts.min() > 0.4 * 400 / 11


def test_a_grid_that_cannot_be_dug_further_keeps_its_givens(pool: BlockPool):
    rows = source(pool, givens=Givens(first=(17, 17), last=(17, 17), over=0.0)).rows(0, 12, 1.0)
    prompts = rows.tokens[:, :90]
    reached = 81 - (pool[1] >= 0).sum(1)
    assert set(((prompts > 5) & (prompts <= 14)).sum(1).tolist()) <= set(reached.tolist())


def test_a_curriculum_of_zero_length_is_at_its_end():
    assert Givens(first=(60, 70), last=(30, 40), over=0.0).range(0.0) == (30, 40)


def test_the_pool_is_made_once_and_kept(pool: BlockPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Here:
        """A pool of workers that does its work here."""

        def __init__(self, processes: int) -> None:
            self.processes = processes

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *error: object) -> None: ...

        map = staticmethod(map)

    keep = tmp_path / "deep" / "pool.npz"
    monkeypatch.setattr(data, "ProcessPoolExecutor", Here)
    made = sudoku_pool(4, 6, 3, keep)
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda processes: pytest.fail("made again"))
    again, fewer = sudoku_pool(4, 6, 1, keep), sudoku_pool(4, 2, 1, keep)
    for wanted, first, second, part in zip(pool, made, again, fewer, strict=True):
        assert np.array_equal(first, wanted)
        assert np.array_equal(second, wanted)
        assert np.array_equal(part, wanted[:2])
    monkeypatch.setattr(data, "ProcessPoolExecutor", Here)
    assert not np.array_equal(sudoku_pool(5, 2, 1, keep)[0], pool[0][:2])
    assert np.array_equal(sudoku_pool(4, 6, 1, keep)[0], pool[0])
