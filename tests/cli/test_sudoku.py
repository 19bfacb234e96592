"""`blockpress sudoku`: what an answer is worth, where puzzles come from, and who gets to read what."""

from __future__ import annotations

import json
import os
import re
import select
import sys
from pathlib import Path

import pytest

import blockpress
from blockpress import sudoku
from blockpress.cli import canvas, puzzles
from blockpress.cli.canvas import SudokuView
from blockpress.cli.doctor import PUZZLE
from blockpress.cli.sudoku import Answer
from tests.forks import python

from .conftest import Call, Screen

SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
ESCAPE = "\x1b"


def answered(text: str, puzzle: str = PUZZLE) -> Answer:
    return Answer(
        puzzle=puzzle,
        text=text,
        steps=3,
        forwards=3,
        tokens_per_forward=30.0,
        seconds=0.5,
        entropy=0.00314,
        settled=True,
    )


def test_a_solved_answer_is_recognised() -> None:
    done = answered(sudoku.layout(SOLUTION))
    assert done.grid == SOLUTION and done.valid and done.solved
    assert done.verdict == "solved in 3 steps; the model is sure: 0.0031 nats a token"


@pytest.mark.parametrize(
    ("text", "valid", "word"),
    [
        (sudoku.layout(SOLUTION.translate(str.maketrans("123456789", "234567891"))), True, "given was changed"),
        (sudoku.layout(SOLUTION[:-1] + "1"), False, "contradicts itself"),
        (sudoku.layout("0" + SOLUTION[1:]), False, "contradicts itself"),
        (sudoku.layout(SOLUTION) + "\n", False, "no grid"),
        (sudoku.layout(SOLUTION)[:-1], False, "no grid"),
        (SOLUTION, False, "no grid"),
        ("", False, "no grid"),
    ],
)
def test_unsolved_answers_are_recognised(text: str, valid: bool, word: str) -> None:
    done = answered(text)
    assert (done.valid, done.solved) == (valid, False)
    assert done.verdict.startswith("NOT solved: ") and word in done.verdict
    assert done.to_dict()["answer"] == (text.replace("\n", "") if done.grid else text)


def test_without_a_terminal_stdout_is_only_the_grid(call: Call) -> None:
    done = call("sudoku", PUZZLE)
    assert done.code == 0 and re.fullmatch(r"([1-9]{9}\n){9}", done.out)
    assert done.out == sudoku.layout(SOLUTION) + "\n"
    assert re.fullmatch(r"solved in [0-9]+ steps; the model is sure: 0\.00[0-4][0-9] nats a token\n", done.err)


@pytest.mark.parametrize("form", [PUZZLE.replace("0", "."), sudoku.layout(PUZZLE), f" {PUZZLE}\n"])
def test_a_puzzle_is_read_in_every_form(form: str, call: Call) -> None:
    expected = sudoku.layout(PUZZLE) + "\n"
    assert call("sudoku", form, "--puzzle-only").out == expected
    assert call("sudoku", "-", "--puzzle-only", stdin=form).out == expected


def test_puzzles_are_read_from_a_file(call: Call, tmp_path: Path) -> None:
    other = sudoku.generate_puzzle(5, 50).puzzle
    file = tmp_path / "puzzles"
    file.write_text(f"\ufeff# two\n{PUZZLE}\n\n  {other.replace('0', '.')}  \n")
    done = call("sudoku", "--file", file, "--puzzle-only")
    assert done.out == f"{sudoku.layout(PUZZLE)}\n\n{sudoku.layout(other)}\n" and not done.err
    assert call("sudoku", "--file", "-", "--puzzle-only", stdin=file.read_text("utf-8-sig")).out == done.out


def test_random_puzzles_come_from_their_seed(call: Call) -> None:
    done = call("sudoku", "--random", 3, "--givens", 50, "--seed", 7, "--puzzle-only")
    grids = [grid.replace("\n", "") for grid in done.out.strip().split("\n\n")]
    assert grids == [sudoku.generate_puzzle(7 + place, 50).puzzle for place in range(3)]
    assert done.err == "seed 7 (the same again: --random 3 --givens 50 --seed 7)\n"


def test_without_a_seed_it_is_drawn_and_printed(call: Call) -> None:
    done = call("sudoku", "-n", 1, "--puzzle-only", "--json")
    assert not done.err and json.loads(done.out)["givens"] == puzzles.GIVENS
    done = call("sudoku", "-n", 1, "--puzzle-only")
    seed = re.match(r"seed (\d+) ", done.err)
    assert seed and call("sudoku", "-n", 1, "--puzzle-only", "--seed", seed[1]).out == done.out


def test_json_is_an_object_a_puzzle_and_a_summary(call: Call, untrained: Path) -> None:
    done = call("sudoku", "-n", 3, "--seed", 1, "--json", "--steps", 2, "--batch", 2, "-m", untrained)
    *answers, summary = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0 and not done.err and len(answers) == 3
    for place, answer in enumerate(answers):
        assert list(answer) == [
            *(
                "puzzle",
                "answer",
                "valid",
                "solved",
                "settled",
                "entropy",
                "steps",
                "forwards",
                "seconds",
                "givens",
                "tokens_per_forward",
            )
        ]
        assert answer["puzzle"] == sudoku.generate_puzzle(1 + place, 40).puzzle
        assert answer["steps"] == answer["forwards"] == 2 and not answer["solved"] and answer["seconds"] > 0
    assert answers[0]["seconds"] == answers[1]["seconds"] != answers[2]["seconds"]
    assert summary["summary"] is True and summary["puzzles"] == 3 and summary["solved"] == 0
    assert summary["mean_steps"] == 2 and summary["model"] == str(untrained) and summary["seed"] == 1
    assert summary["seconds"] == pytest.approx(sum(answer["seconds"] for answer in answers), abs=1e-5)


def test_the_answer_is_the_first_sample_of_one_canvas(call: Call, untrained: Path) -> None:
    lm = blockpress.load(untrained)
    grids = [sudoku.generate_puzzle(seed, 45).puzzle for seed in (3, 4, 5)]
    arguments = ("--givens", 45, "--steps", 3, "--json", "-m", untrained, "--noise-seed", 9)
    together = call("sudoku", "-n", 3, "--seed", 3, *arguments).out.splitlines()
    for place, grid in enumerate(grids):
        reply = lm.generate(sudoku.layout(grid), lm.config.canvas_length, 9, lm.generation.sampling.with_(steps=3))
        answer = json.loads(together[place])["answer"]
        assert answer == (reply.text if len(answer) != 81 else (reply.text or "").replace("\n", ""))
        assert reply.usage.canvases == 1


def test_an_unsolved_answer_is_reported_and_shown(call: Call, untrained: Path) -> None:
    done = call("sudoku", "-n", 2, "--seed", 1, "--steps", 2, "-m", untrained)
    lines = done.err.splitlines()
    assert done.code == 0 and len([line for line in lines if "NOT solved: " in line]) == 2
    assert lines[-1].startswith("0 of 2 solved (0.0%), 2.0 steps on average")
    assert ESCAPE not in done.out + done.err


def test_a_terminal_shows_the_canvas(call: Call, screen: Screen) -> None:
    done = call("sudoku", "-n", 1, "--givens", 60, "--seed", 2, "--fast", screen=screen)
    assert done.code == 0 and ESCAPE in done.out
    for word in ("noise", "accepted", "changed", "settled", "given", "step 1 of at most 48", "nats", "ms per forward"):
        assert word in done.out
    assert "solved in" in done.out and "--seed 2" in done.out and "┌─────────┬" in done.out
    assert done.out.endswith("\x1b[?25h")  # the cursor is back


def test_ctrl_c_leaves_the_terminal_as_it_was(call: Call, screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(canvas.time, "sleep", interrupt)
    done = call("sudoku", PUZZLE, screen=screen)
    assert (done.code, done.err) == (130, "\nblockpress: interrupted\n") and done.out.endswith("\x1b[?25h")


def test_no_color_keeps_the_text_marks(call: Call, screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = call("sudoku", PUZZLE, "--fast", screen=screen).out
    codes = {part for code in re.findall(r"\x1b\[([0-9;]*)m", out) for part in code.split(";")}
    assert codes and not any(30 <= int(code or 0) <= 49 or int(code or 0) >= 90 for code in codes)
    assert {"1", "4"} <= codes  # bold and underlined


def test_a_dumb_terminal_gets_plain_lines(call: Call, screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert call("sudoku", PUZZLE, screen=screen).out == sudoku.layout(SOLUTION) + "\n"


def test_json_and_many_puzzles_are_not_shown(call: Call, screen: Screen, untrained: Path) -> None:
    assert ESCAPE not in call("sudoku", PUZZLE, "--json", screen=screen).out
    many = call("sudoku", "-n", 10, "--steps", 1, "-m", untrained, screen=Screen())
    assert ESCAPE not in many.out and many.err.count("NOT solved") == 10


def test_a_view_is_never_larger_than_its_terminal(untrained: Path) -> None:
    lm = blockpress.load(untrained)
    view = SudokuView(lm, PUZZLE, lm.generation.sampling, "title")
    for event in lm.stream(sudoku.layout(PUZZLE), 90, 0, lm.generation.sampling.with_(steps=3)):
        view.meter.see(event)
        view.see(event)
        for width, height in ((80, 23), (60, 20), (31, 14), (20, 12), (5, 3)):
            lines = view.draw(width, height)
            assert len(lines) <= height and max(line.cell_len for line in lines) <= width


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_a_pseudo_terminal_shows_the_canvas() -> None:
    import pty

    command = [*python(), "-m", "blockpress", "sudoku", PUZZLE]
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm", COLUMNS="80", LINES="24", OMP_NUM_THREADS="1")
        os.execv(command[0], command)
    written = b""
    while select.select([terminal], [], [], 120)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        written += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    text = written.decode()
    assert "solved in" in text and "accepted" in text and text.count("\x1b[?25l") == text.count("\x1b[?25h")
