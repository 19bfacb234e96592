"""Answers: what the log-probabilities of a question's options say.

    raw            P(option), by the network over its whole vocabulary
    label mass     the sum of them: how much of the probability was on any answer at all
    probabilities  raw / label mass
    confidence     the raw probability of the likeliest option, as in vLLM: its share times the label mass

Invariant: the probabilities of a question sum to 1.
Run it:  python -m pytest tests/decide/test_answers.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from blockpress.decide.questions import Choice, Question, YesNo
from blockpress.errors import EngineError, RequestError


@final
@dataclass(frozen=True, kw_only=True)
class YesNoAnswer:
    """The answer to a `YesNo`.

    probability: of yes, among the two answers. confidence: the probability of the likelier answer over the whole
    vocabulary. label_mass: that of both.
    """

    name: str | None
    probability: float
    confidence: float
    label_mass: float

    @property
    def probabilities(self) -> Mapping[bool, float]:
        """Of yes (True) and no (False), among the two."""
        return {True: self.probability, False: 1 - self.probability}

    @property
    def value(self) -> bool:
        """Whether yes is at least as likely as no."""
        return self.probability >= 0.5


@final
@dataclass(frozen=True, kw_only=True)
class ChoiceAnswer:
    """The answer to a `Choice`.

    value: the likeliest option, the first of those alike. probabilities: of each option, among the options.
    confidence: the probability of `value` over the whole vocabulary. label_mass: that of all options.
    """

    name: str | None
    value: str | bool
    probabilities: Mapping[str | bool, float]
    confidence: float
    label_mass: float


@final
@dataclass(frozen=True, kw_only=True)
class ScoreAnswer:
    """The answer to a `Score`.

    value: the expected level, by what the levels count. level: the likeliest level's text. probabilities: of each
    level's text, among the levels. confidence: the probability of `level` over the whole vocabulary. label_mass: that
    of all levels.
    """

    name: str | None
    value: float
    level: str
    probabilities: Mapping[str, float]
    confidence: float
    label_mass: float


Answered = YesNoAnswer | ChoiceAnswer | ScoreAnswer


@final
@dataclass(frozen=True, kw_only=True)
class DecisionUsage:
    """input_tokens: of the prompt. output_tokens: places that were read. canvases: each with some of the questions,
    once for every draw. forwards: of the prefill and of all canvases, which may share one."""

    input_tokens: int
    output_tokens: int
    canvases: int
    forwards: int


@final
@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answers to all questions about one context, in the order of the questions, and what they cost."""

    answers: tuple[Answered, ...]
    usage: DecisionUsage

    def __iter__(self) -> Iterator[Answered]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, key: int | str) -> Answered:
        """An answer by its number, or by the name of its question. RequestError: no question has the name."""
        if not isinstance(key, str):
            return self.answers[key]
        found = [answer for answer in self.answers if answer.name == key]
        if not found:
            names = [answer.name for answer in self.answers]
            raise RequestError(f"no question has the name {key!r:.80}", hint=f"the names are {names}")
        return found[0]


def answer_question(question: Question, logs: Sequence[float]) -> Answered:
    """The answer, from the log-probability of each option over the whole vocabulary.

    Raises:
        EngineError: a number is NaN or infinite.
    """
    if not all(math.isfinite(log) for log in logs):
        raise EngineError(
            f"the network gave NaN or infinity where question {question.question!r:.60} is answered",
            hint="check the checkpoint, or load it with another dtype",
        )
    mass, top = log_sum(logs), max(logs)
    shares = [math.exp(log - mass) for log in logs]
    best, listed = logs.index(top), question.listed
    certainty = {"confidence": min(1.0, math.exp(top)), "label_mass": min(1.0, math.exp(mass))}
    if isinstance(question, YesNo):
        return YesNoAnswer(name=question.name, probability=shares[0], **certainty)
    if isinstance(question, Choice):
        given = zip(listed, shares, strict=True)
        chosen = listed[best].value
        assert isinstance(chosen, str | bool)
        probabilities = {option.value: share for option, share in given if isinstance(option.value, str | bool)}
        return ChoiceAnswer(name=question.name, value=chosen, probabilities=probabilities, **certainty)
    expected = math.fsum(float(option.value) * share for option, share in zip(listed, shares, strict=True))
    return ScoreAnswer(
        name=question.name,
        value=expected,
        level=listed[best].text,
        probabilities={option.text: share for option, share in zip(listed, shares, strict=True)},
        **certainty,
    )


def log_sum(logs: Sequence[float]) -> float:
    """log(sum(exp(logs))).

    >>> round(math.exp(log_sum([math.log(0.25), math.log(0.5)])), 12)
    0.75
    """
    top = max(logs)
    return top + math.log(math.fsum(math.exp(log - top) for log in logs)) if math.isfinite(top) else top
