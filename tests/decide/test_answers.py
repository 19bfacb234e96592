"""From log-probabilities to answers: the arithmetic, against sums in plain probabilities."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpress.decide import Choice, ChoiceAnswer, Decision, DecisionUsage, Score, ScoreAnswer, YesNo, YesNoAnswer
from blockpress.decide.answers import answer_question
from blockpress.errors import EngineError, RequestError

RAW = st.lists(st.floats(1e-30, 1.0), min_size=1, max_size=9)


@given(raw=RAW)
def test_probabilities_are_shares_of_the_label_mass(raw: list[float]) -> None:
    raw = [each / max(1.0, sum(raw)) for each in raw]
    got = answer_question(
        Choice("?", options=[f"option {n}" for n in range(len(raw))]), [math.log(each) for each in raw]
    )
    assert isinstance(got, ChoiceAnswer)
    assert got.label_mass == pytest.approx(sum(raw))
    assert list(got.probabilities.values()) == pytest.approx([each / sum(raw) for each in raw])
    assert sum(got.probabilities.values()) == pytest.approx(1)
    assert got.confidence == pytest.approx(max(raw))
    assert got.confidence == pytest.approx(got.probabilities[got.value] * got.label_mass)
    assert 0 <= got.confidence <= 1 and 0 <= got.label_mass <= 1


def test_each_kind_of_answer_says_what_it_is_asked() -> None:
    logs = [math.log(0.1), math.log(0.3)]
    got = answer_question(YesNo("?", name="so"), logs)
    assert isinstance(got, YesNoAnswer) and got.name == "so" and got.value is False
    assert (got.probability, got.confidence, got.label_mass) == pytest.approx((0.25, 0.3, 0.4))
    level = answer_question(Score("?", levels=[10, 20]), logs)
    assert isinstance(level, ScoreAnswer)
    assert level.value == pytest.approx(17.5) and level.level == "20" and level.confidence == pytest.approx(0.3)
    assert answer_question(Choice("?", options=[True, "true"]), logs).value == "true"


def test_of_options_alike_the_first_is_chosen() -> None:
    assert answer_question(Choice("?", options=["b", "a"]), [-1.0, -1.0]).value == "b"
    assert answer_question(YesNo("?"), [-1.0, -1.0]).value is True


def test_probabilities_too_small_for_a_float_still_have_shares() -> None:
    got = answer_question(Choice("?", options=["a", "b"]), [-900.0 - math.log(4), -900.0])
    assert isinstance(got, ChoiceAnswer)
    assert got.label_mass == 0 and got.probabilities["b"] == pytest.approx(0.8)


@pytest.mark.parametrize("log", [math.nan, math.inf, -math.inf])
def test_a_network_that_gives_no_number_gives_no_answer(log: float) -> None:
    with pytest.raises(EngineError, match="NaN or infinity where question 'Is it so"):
        answer_question(YesNo("Is it so?"), [log, -1.0])


def test_a_decision_finds_answers_by_number_and_name() -> None:
    first, second = answer_question(YesNo("?", name="a"), [-1.0, -2.0]), answer_question(YesNo("?"), [-2.0, -1.0])
    usage = DecisionUsage(input_tokens=1, output_tokens=2, canvases=1, forwards=2)
    decision = Decision(answers=(first, second), usage=usage)
    assert list(decision) == [first, second] == [decision["a"], decision[-1]] and len(decision) == 2
    with pytest.raises(RequestError, match=r"no question has the name 'b' \(hint: the names are \['a', None\]"):
        decision["b"]
