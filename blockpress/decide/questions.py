"""Typed questions: yes or no, one of several options, a level of a scale.

Invariant: a question that exists can be asked: its texts are not empty, and no two of its options are alike.
Run it:  python -m pytest tests/decide/test_questions.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

from blockpress.config.checks import is_number, value_text
from blockpress.errors import RequestError

MOST_QUESTIONS = 64
"""Most questions of one decision, as in vLLM."""


@final
@dataclass(frozen=True)
class QuestionOption:
    """One possible answer: its value in the answer, its text in the prompt, and what it means, if that is said."""

    value: bool | str | float
    text: str
    description: str | None = None


@final
@dataclass(frozen=True)
class YesNo:
    """Whether something is so (OpenAI's predicate, TypeSafe's noul).

    Args:
        question: a question or a statement. None: `yes` or `no` says it all.
        yes, no: what either answer means, if that needs words.
        name: under which the answer is found.

    Raises:
        RequestError: a text that is empty or none; it names the field.
    """

    question: str | None
    _: KW_ONLY
    yes: str | None = None
    no: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        _check_text(self, "yes", self.yes)
        _check_text(self, "no", self.no)
        _check_head(self, or_else=self.yes or self.no)

    @property
    def listed(self) -> tuple[QuestionOption, ...]:
        return QuestionOption(True, "yes", self.yes), QuestionOption(False, "no", self.no)


@final
@dataclass(frozen=True)
class Choice:
    """Which of several options, in no order.

    Args:
        question: None: the options say it all.
        options: texts or booleans, each once; or a mapping from each to what it means, or None.
        name: under which the answer is found.

    Raises:
        RequestError: a text that is empty or none, no options, two alike; it names the field.
    """

    question: str | None
    _: KW_ONLY
    options: Sequence[str | bool] | Mapping[str, str | None] | Mapping[str | bool, str | None]
    name: str | None = None

    def __post_init__(self) -> None:
        _check_head(self, or_else=True)
        given = _listed(self, "options", self.options)
        object.__setattr__(self, "options", _copied(self.options))
        for number, (value, _) in enumerate(given):
            if not isinstance(value, bool):
                _check_text(self, f"options[{number}]", value, needed=True)
        _check_distinct(self, "options", [(type(value), value) for value, _ in given])

    @property
    def listed(self) -> tuple[QuestionOption, ...]:
        given = _listed(self, "options", self.options)
        texts = [str(value).lower() if isinstance(value, bool) else value for value, _ in given]
        return tuple(QuestionOption(value, text, said) for (value, said), text in zip(given, texts, strict=True))


@final
@dataclass(frozen=True)
class Score:
    """Which level of an ordered scale.

    Args:
        question: None: the levels say it all.
        levels: from the lowest: texts, which count 0, 1, 2, ..., or a mapping from each to what it means, or None; or
            numbers, which count as what they are.
        name: under which the answer is found.

    Raises:
        RequestError: a text that is empty or none, no levels, two alike; it names the field.
    """

    question: str | None
    _: KW_ONLY
    levels: Sequence[str] | Sequence[float] | Mapping[str, str | None]
    name: str | None = None

    def __post_init__(self) -> None:
        _check_head(self, or_else=True)
        given = _listed(self, "levels", self.levels)
        object.__setattr__(self, "levels", _copied(self.levels))
        numbers = [is_number(level) for level, _ in given]
        for number, (level, _) in enumerate(given):
            if not all(numbers):
                _check_text(self, f"levels[{number}]", level, needed=True)
        _check_distinct(self, "levels", [level for level, _ in given])

    @property
    def listed(self) -> tuple[QuestionOption, ...]:
        given = _listed(self, "levels", self.levels)
        if all(is_number(level) for level, _ in given):
            return tuple(QuestionOption(float(level), str(level)) for level, _ in given)
        return tuple(QuestionOption(float(index), level, said) for index, (level, said) in enumerate(given))


Question = YesNo | Choice | Score


def check_questions(questions: Any) -> tuple[Question, ...]:
    """The questions of one decision. Raises RequestError: none, more than MOST_QUESTIONS, or two of one name."""
    if isinstance(questions, str | bytes | Mapping) or not isinstance(questions, Sequence):
        raise RequestError(f"questions is {value_text(questions)}", hint="give a list of YesNo, Choice and Score")
    for number, question in enumerate(questions):
        if not isinstance(question, Question):
            raise RequestError(
                f"questions[{number}] is {value_text(question)}", hint="each must be a YesNo, a Choice or a Score"
            )
    if not 1 <= len(questions) <= MOST_QUESTIONS:
        raise RequestError(
            f"questions holds {len(questions)} questions", hint=f"ask 1 to {MOST_QUESTIONS} questions at once"
        )
    names = [question.name for question in questions]
    for number, name in enumerate(names):
        if name is not None and name in names[:number]:
            raise RequestError(
                f"questions[{number}].name is {name!r:.80}, which questions[{names.index(name)}] has too",
                hint="give each question a name of its own, or none",
            )
    return tuple(questions)


def _about(question: Any) -> str:
    return f"{type(question).__name__}({value_text(question.question)})"


def _check_head(question: Any, *, or_else: object) -> None:
    _check_text(question, "name", question.name)
    _check_text(question, "question", question.question, needed=not or_else)


def _check_text(question: Any, field: str, value: object, *, needed: bool = False) -> None:
    if (value is None and not needed) or (isinstance(value, str) and value.strip()):
        return
    raise RequestError(
        f"{_about(question)}: {field} is {value_text(value)}",
        hint=f"{field} must be a text of at least one character" + ("" if needed else ", or None"),
    )


def _listed(question: Any, field: str, given: Any) -> list[tuple[Any, str | None]]:
    """Each option with what it means."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence | Mapping) or not given:
        raise RequestError(
            f"{_about(question)}: {field} is {value_text(given)}",
            hint=f"{field} must be a list of at least one text, or a mapping from texts to what they mean",
        )
    if not isinstance(given, Mapping):
        return [(value, None) for value in given]
    for value, said in given.items():
        _check_text(question, f"{field}[{value_text(value)}]", said)
    return list(given.items())


def _copied(given: Sequence[Any] | Mapping[Any, Any]) -> tuple[Any, ...] | dict[Any, Any]:
    """What the caller cannot change any more."""
    return dict(given) if isinstance(given, Mapping) else tuple(given)


def _check_distinct(question: Any, field: str, given: Sequence[Any]) -> None:
    for number, value in enumerate(given):
        if value in given[:number]:
            shown = value[1] if isinstance(value, tuple) else value
            raise RequestError(
                f"{_about(question)}: {field} has {value_text(shown)} twice", hint=f"give each of the {field} once"
            )
