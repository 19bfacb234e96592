"""What can be asked: values of questions that are refused name the question, the field and the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blockpress.decide import Choice, Score, YesNo
from blockpress.decide.questions import MOST_QUESTIONS, check_questions
from blockpress.errors import RequestError


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: YesNo(""), "YesNo(''): question is ''"),
        (lambda: YesNo("  \n"), "question is "),
        (lambda: YesNo(None), "YesNo(None): question is None"),
        (lambda: YesNo(3), "question is 3"),  # type: ignore[arg-type]
        (lambda: YesNo("?", yes=""), "yes is ''"),
        (lambda: YesNo("?", no=4), "no is 4"),  # type: ignore[arg-type]
        (lambda: YesNo("?", name=""), "name is ''"),
        (lambda: YesNo("?", name=7), "name is 7"),  # type: ignore[arg-type]
        (lambda: Choice("Which?", options=[]), "Choice('Which?'): options is []"),
        (lambda: Choice("?", options={}), "options is {}"),
        (lambda: Choice("?", options="abc"), "options is 'abc'"),
        (lambda: Choice("?", options=None), "options is None"),  # type: ignore[arg-type]
        (lambda: Choice("?", options=iter("ab")), "options is <str"),  # type: ignore[arg-type]
        (lambda: Choice("?", options=["a", ""]), "options[1] is ''"),
        (lambda: Choice("?", options=["a", " "]), "options[1] is ' '"),
        (lambda: Choice("?", options=["a", 1]), "options[1] is 1"),  # type: ignore[list-item]
        (lambda: Choice("?", options=["a", "b", "a"]), "options has 'a' twice"),
        (lambda: Choice("?", options=[True, False, True]), "options has True twice"),
        (lambda: Choice("?", options={"a": "", "b": None}), "options['a'] is ''"),
        (lambda: Score("How much?", levels=[]), "Score('How much?'): levels is []"),
        (lambda: Score("?", levels="low"), "levels is 'low'"),
        (lambda: Score("?", levels=["low", "low"]), "levels has 'low' twice"),
        (lambda: Score("?", levels=[1, 1.0]), "levels has 1.0 twice"),
        (lambda: Score("?", levels=[1, "two"]), "levels[0] is 1"),  # type: ignore[list-item]
        (lambda: Score("?", levels=[1, float("nan")]), "levels[0] is 1"),
        (lambda: Score("?", levels=["low", ""]), "levels[1] is ''"),
        (lambda: Score("?", levels=["low", True]), "levels[1] is True"),  # type: ignore[list-item]
        (lambda: Score("?", levels={"low": 3}), "levels['low'] is 3"),  # type: ignore[dict-item]
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_by_its_field(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        make()
    assert said in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([], "questions holds 0 questions"),
        ([YesNo("?")] * 65, "questions holds 65 questions"),
        (YesNo("?"), "questions is YesNo"),
        ("?", "questions is '?'"),
        ({"a": YesNo("?")}, "questions is {"),
        (None, "questions is None"),
        ([YesNo("?"), "Which?"], "questions[1] is 'Which?'"),
        ([YesNo("?", name="a"), YesNo("?"), YesNo("!", name="a")], "questions[2].name is 'a', which questions[0] has"),
    ],
)
def test_questions_that_cannot_be_asked_together_are_refused(questions: Any, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_questions(questions)
    assert said in refused.value.message and refused.value.hint


def test_what_can_be_asked() -> None:
    asked = [YesNo("Is it so?"), *[YesNo(f"{n}?", name=f"{n}") for n in range(MOST_QUESTIONS - 1)]]
    assert check_questions(asked) == tuple(asked)
    assert YesNo(None, yes="it rains").listed[0].description == "it rains"
    assert [option.text for option in Choice(None, options=[True, "true"]).listed] == ["true", "true"]


def test_a_question_does_not_change_with_the_list_that_it_was_made_from() -> None:
    options, levels = ["a", "b"], {"low": None}
    choice, score = Choice("?", options=options), Score("?", levels=levels)
    options.append("a")
    levels["high"] = None
    assert choice == Choice("?", options=("a", "b")) and score == Score("?", levels={"low": None})


def test_levels_count_from_zero_or_as_the_numbers_that_they_are() -> None:
    assert [level.value for level in Score("?", levels=["low", "mid", "high"]).listed] == [0, 1, 2]
    assert [level.value for level in Score("?", levels={"low": "little", "high": None}).listed] == [0, 1]
    assert [(level.value, level.text) for level in Score("?", levels=[1, 2.5, 5]).listed] == [
        (1.0, "1"),
        (2.5, "2.5"),
        (5.0, "5"),
    ]
