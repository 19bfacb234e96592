"""`blockpress decide`: questions from options and files, answers as lines or as a body, mistakes before the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import blockpress
from blockpress import Choice, Score, YesNo, sudoku
from blockpress.cli.doctor import PUZZLE
from blockpress.decide.wire import format_decisions, format_systemone

from .conftest import Call

GRID = sudoku.layout(PUZZLE)
FORM = GRID.replace("0", "{}", 2).replace("0", "1")
DIGITS = "1,2,3,4,5,6,7,8,9"
ASKED = ("--choice", f"first={DIGITS}", "--score", "second=1,2,3", "--form", FORM)


def expected(**options: int) -> blockpress.Decision:
    questions = [Choice("first", options=DIGITS.split(",")), Score("second", levels=["1", "2", "3"])]
    return blockpress.load("sudoku-nano").decide(GRID, questions, form=FORM.split("{}"), **options)  # type: ignore[call-overload, no-any-return]


def test_answers_come_a_line_each(call: Call) -> None:
    done = call("decide", "sudoku-nano", GRID, *ASKED)
    first, second = expected()
    assert done.code == 0 and not done.err
    line, other = done.out.splitlines()
    assert isinstance(first, blockpress.ChoiceAnswer)
    assert line.startswith(f"first: {first.value}  ({first.value} {first.probabilities[first.value]:.1%}, ")
    assert f"..., confidence {first.confidence:.3f}, label mass {first.label_mass:.3f})" in line.replace(";", ",")
    assert other.startswith(f"second: {second.value:.2f}  (")
    assert call("decide", "sudoku-nano", *ASKED, stdin=f"{GRID}\n").out == done.out


def test_json_is_the_body_of_the_shape_that_was_asked_in(call: Call, tmp_path: Path) -> None:
    done = call("decide", "sudoku-nano", GRID, *ASKED, "--json", "--draws", 2, "--steps", 2, "--seed", 3)
    assert json.loads(done.out) == format_decisions(expected(draws=2, steps=2, seed=3), "sudoku-nano")
    file = tmp_path / "questions.json"
    criteria = dict.fromkeys("123456789")
    questions: dict[str, Any] = {"first": {"type": "choice", "criteria": criteria}}
    lm = blockpress.load("sudoku-nano")
    named = lm.decide(GRID, [Choice(None, options=criteria, name="first")], form=["", "1"], draws=2)
    for body, context in (
        ({"model": "other", "state": GRID, "questions": questions, "draws": 2}, []),
        (questions, [GRID, "--draws", 2]),
    ):
        file.write_text(json.dumps(body), encoding="utf-8")
        done = call("decide", "sudoku-nano", *context, "--questions", file, "--form", "{}1", "--json")
        assert json.loads(done.out) == format_systemone(named, "sudoku-nano")


def test_questions_of_a_file_and_of_options_are_asked_together(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    listed = [{"type": "choice", "name": "a", "instructions": "?", "choices": [{"value": "1"}, {"value": "2"}]}]
    for body in (listed, {"questions": listed}, {"input": GRID, "questions": listed}):
        file.write_text(json.dumps(body), encoding="utf-8")
        context = [] if "input" in body else [GRID]
        done = call("decide", "sudoku-nano", *context, "--questions", file, "--choice", "b=3,4", "--form", "{}{}")
        assert [line.partition(":")[0] for line in done.out.splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "questions holds 0 questions"),
        (["--choice", "Which?"], "--choice or --score is 'Which?', without an equals sign"),
        (["--choice", "Which?="], "options[0] is ''"),
        (["--choice", "Which?=a,b,a"], "options has 'a' twice"),
        (["--score", "=a,b"], "question is ''"),
        (["--yes-no", ""], "question is ''"),
        (["--yes-no", "?"] * 65, "questions holds 65 questions"),
        (["--questions", "nowhere.json"], "--questions is 'nowhere.json': [Errno 2]"),
        (["--yes-no", "?", "--draws", "0"], "draws is 0"),
        (["--choice", "?=1,2", "--form", "1"], "form has 1 texts for 1 questions"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(call: Call, arguments: list[str], said: str) -> None:
    done = call("decide", "sudoku-nano", "12", *arguments)
    assert done.code == 2 and not done.out
    assert said in done.err and "hint:" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "--questions is"),
        ("3", "which holds no questions"),
        ('{"questions": 3}', "which holds no questions"),
        ('{"questions": []}', "questions holds 0"),
        ('[{"type": "noul"}]', "questions[0].type is 'noul'"),
        ('{"a": {"type": "predicate"}}', "questions.a.type is 'predicate'"),
        ('{"questions": {"a": {"type": "noul", "instructions": "?"}}, "state": "x"}', "CONTEXT is given"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_on_stderr(call: Call, tmp_path: Path, body: str, said: str) -> None:
    file = tmp_path / "questions.json"
    file.write_text(body, encoding="utf-8")
    done = call("decide", "sudoku-nano", "12", "--questions", file)
    assert done.code == 2 and not done.out and said in done.err


def test_questions_are_checked_before_the_weights_are_read(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockpress.lm.LM, "__init__", lambda *_, **__: pytest.fail("the weights were read"))
    assert call("decide", "sudoku-nano", "12", "--yes-no", " ").code == 2


def test_a_model_with_a_chat_template_is_asked_in_words(call: Call, seeing: Path) -> None:
    done = call("decide", seeing, "Hi", "--yes-no", "Is it a greeting?", "--choice", "Which?=good day,bye")
    first, second = done.out.splitlines()
    assert first.startswith(("Is it a greeting?: yes", "Is it a greeting?: no"))
    assert second.startswith(("Which?: good day", "Which?: bye"))
    lm = blockpress.load(seeing)
    asked = [YesNo("Is it a greeting?"), Choice("Which?", options=["good day", "bye"])]
    assert f"{lm.decide('Hi', asked)[0].confidence:.3f}" in first


def test_pictures_are_seen(seeing: Path) -> None:
    lm = blockpress.load(seeing)
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    decisions = [
        lm.decide([{"role": "user", "content": [{"type": "image", "image": image}]}], [YesNo("Is it red?")])
        for image in (red, red, blue)
    ]
    assert decisions[0] == decisions[1] != decisions[2]
