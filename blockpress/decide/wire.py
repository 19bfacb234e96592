"""Decisions on the wire: the bodies of OpenAI's `POST /v1/decisions` and of TypeSafe's `POST /v1/systemone`.

    body --parse--> DecisionRequest --LM.decide--> Decision --format--> body

    here      OpenAI (SDK 3.26 and newer)           TypeSafe (SDK 0.7), vLLM
    YesNo     predicate: probability                noul: noul
    Choice    choice: choice, confidence, ...       the same; `criteria` are options and what they mean
    Score     score: levels count 0, 1, 2, ...      the same; `criteria` are the levels, `legend` repeats them

Three fields more than theirs are taken in both: `seed`, `steps` and `draws` of `LM.decide`.

Invariant: a field is honoured, or refused by its path; those that only name or cache a request (`safety_identifier`,
`prompt_cache_key`, `prompt_cache_options`, `prompt_cache_breakpoint`, an item's `id` and `status`) change nothing.
Run it:  python -m pytest tests/decide/test_wire.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

from blockpress.decide.answers import Answered, ChoiceAnswer, Decision, ScoreAnswer, YesNoAnswer
from blockpress.decide.questions import Choice, Question, Score, YesNo, check_questions
from blockpress.decide.wire_input import as_messages, need, no_other_fields, text_or_json
from blockpress.errors import RequestError

MOST_LEVELS, MOST_CHOICES = 10, 255
"""OpenAI's limits."""

_OPTIONS = frozenset({"seed", "steps", "draws"})
_CACHING = frozenset({"prompt_cache_key", "prompt_cache_options", "safety_identifier"})


@final
@dataclass(frozen=True, kw_only=True)
class DecisionRequest:
    """What a body asks: `context`, `questions` and `options` are those of `LM.decide`."""

    model: str
    context: str | list[dict[str, Any]]
    questions: tuple[Question, ...]
    options: dict[str, int] = field(default_factory=dict)


def parse_decisions(body: Any) -> DecisionRequest:
    """The body of `POST /v1/decisions`. Raises RequestError, which names the first field that is wrong."""
    need(isinstance(body, Mapping), "body", body, "a JSON object")
    no_other_fields(body, "", {"model", "input", "questions", *_CACHING, *_OPTIONS})
    given = body.get("questions")
    need(isinstance(given, list), "questions", given, "a list of questions")
    questions = [_openai_question(each, f"questions[{number}]") for number, each in enumerate(given)]
    context = body.get("input")
    return DecisionRequest(
        model=_model(body),
        context=context if isinstance(context, str) and context else as_messages(context, "input"),
        questions=check_questions(questions),
        options=_options(body),
    )


def parse_systemone(body: Any) -> DecisionRequest:
    """The body of `POST /v1/systemone`. Raises RequestError, which names the first field that is wrong."""
    need(isinstance(body, Mapping), "body", body, "a JSON object")
    no_other_fields(body, "", {"model", "state", "questions", *_OPTIONS})
    given = body.get("questions")
    need(isinstance(given, Mapping), "questions", given, "an object of questions by their names")
    questions = [_systemone_question(name, each) for name, each in given.items()]
    return DecisionRequest(
        model=_model(body),
        context=text_or_json(body.get("state"), "state"),
        questions=check_questions(questions),
        options=_options(body),
    )


def format_decisions(decision: Decision, model: str) -> dict[str, Any]:
    """The body of the answer to `POST /v1/decisions`."""
    return {
        "model": model,
        "answers": [_openai_answer(answer) for answer in decision],
        "usage": {
            "input_tokens": decision.usage.input_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": decision.usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": decision.usage.input_tokens + decision.usage.output_tokens,
        },
    }


def format_systemone(decision: Decision, model: str) -> dict[str, Any]:
    """The body of the answer to `POST /v1/systemone`, with vLLM's `diagnostics`, which TypeSafe's client ignores."""
    named = {str(answer.name): answer for answer in decision}
    return {
        "model": model,
        "answers": {name: _systemone_answer(answer) for name, answer in named.items()},
        "usage": {"input_tokens": decision.usage.input_tokens, "output_tokens": decision.usage.output_tokens},
        "diagnostics": {name: {"label_mass": answer.label_mass} for name, answer in named.items()},
    }


def _openai_question(given: Any, at: str) -> Question:
    need(isinstance(given, Mapping), at, given, "an object")
    kind, name = given.get("type"), given.get("name")
    lists = {"predicate": None, "choice": "choices", "score": "levels"}
    need(isinstance(kind, str) and kind in lists, f"{at}.type", kind, f"one of {', '.join(lists)}")
    listed = lists[kind]
    no_other_fields(given, at, {"type", "name", "instructions", *([listed] if listed else [])})
    instructions = text_or_json(given.get("instructions"), f"{at}.instructions", parts=True)
    with _at(at):
        if listed is None:
            return YesNo(instructions, name=name)
        entries = given.get(listed)
        need(isinstance(entries, list), f"{at}.{listed}", entries, "a list of objects")
        most, key = (MOST_CHOICES, "value") if kind == "choice" else (MOST_LEVELS, "label")
        need(2 <= len(entries) <= most, f"{at}.{listed}", entries, f"2 to {most} of them")
        options: list[tuple[Any, str | None]] = []
        for number, entry in enumerate(entries):
            path = f"{at}.{listed}[{number}]"
            need(isinstance(entry, Mapping), path, entry, "an object")
            no_other_fields(entry, path, {key, "description"})
            value, said = entry.get(key), entry.get("description")
            need(isinstance(value, str | bool) if key == "value" else isinstance(value, str), f"{path}.{key}", value,
                 "text or a boolean" if key == "value" else "text")  # fmt: skip
            need(said is None or isinstance(said, str), f"{path}.description", said, "text")
            twice = (type(value), value) in [(type(other), other) for other, _ in options]
            need(not twice, f"{path}.{key}", value, "one that no other of them has")
            options.append((value, said or None))
        if kind == "choice":
            return Choice(instructions, options=dict(options), name=name)
        return Score(instructions, levels=dict(options), name=name)


def _systemone_question(name: Any, given: Any) -> Question:
    at = f"questions.{name}" if isinstance(name, str) else "questions"
    need(isinstance(name, str) and bool(name.strip()), "questions", name, "an object whose names are texts")
    need(isinstance(given, Mapping), at, given, "an object")
    kind = given.get("type")
    need(kind in ("noul", "choice", "score"), f"{at}.type", kind, "one of noul, choice, score")
    no_other_fields(given, at, {"type", "instructions", "criteria"})
    asked = given.get("instructions")
    question = None if asked is None else text_or_json(asked, f"{at}.instructions")
    criteria = given.get("criteria")
    with _at(at):
        if kind == "noul":
            criteria = {} if criteria is None else criteria
            need(isinstance(criteria, Mapping), f"{at}.criteria", criteria, "an object, or null")
            no_other_fields(criteria, f"{at}.criteria", {"true", "false"})
            yes, no = (_said(criteria.get(key), f"{at}.criteria.{key}") for key in ("true", "false"))
            return YesNo(question, yes=yes, no=no, name=name)
        if kind == "choice":
            need(isinstance(criteria, Mapping), f"{at}.criteria", criteria, "an object of options by their names")
            options = {key: _said(value, f"{at}.criteria.{key}") for key, value in criteria.items()}
            return Choice(question, options=options, name=name)
        need(isinstance(criteria, list), f"{at}.criteria", criteria, "a list of levels")
        levels = [text_or_json(level, f"{at}.criteria[{number}]") for number, level in enumerate(criteria)]
        return Score(question, levels=levels, name=name)


def _said(value: Any, at: str) -> str | None:
    return None if value is None or value == "" else text_or_json(value, at)


def _openai_answer(answer: Answered) -> dict[str, Any]:
    fields: dict[str, Any]
    shares: list[dict[str, Any]]
    if isinstance(answer, YesNoAnswer):
        return {"type": "predicate", "name": answer.name, "probability": answer.probability}
    if isinstance(answer, ChoiceAnswer):
        shares = [{"value": value, "probability": share} for value, share in answer.probabilities.items()]
        fields = {"type": "choice", "name": answer.name, "choice": answer.value}
    else:
        levels = enumerate(answer.probabilities.items())
        shares = [{"label": label, "value": index, "probability": share} for index, (label, share) in levels]
        fields = {"type": "score", "name": answer.name, "score": _position(answer)}
    return {**fields, "confidence": answer.confidence, "probabilities": shares}


def _systemone_answer(answer: Answered) -> dict[str, Any]:
    fields: dict[str, Any]
    if isinstance(answer, YesNoAnswer):
        return {"type": "noul", "noul": answer.probability}
    if isinstance(answer, ChoiceAnswer):
        shares = {str(value): share for value, share in answer.probabilities.items()}
        fields = {"type": "choice", "choice": str(answer.value)}
    else:
        shares = {str(index): share for index, share in enumerate(answer.probabilities.values())}
        legend = {str(index): label for index, label in enumerate(answer.probabilities)}
        fields = {"type": "score", "score": _position(answer), "legend": legend}
    return {**fields, "confidence": answer.confidence, "probabilities": shares}


def _position(answer: ScoreAnswer) -> float:
    """The expected level where levels count 0, 1, 2, ..., as they do on the wire."""
    return sum(index * share for index, share in enumerate(answer.probabilities.values()))


def _model(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    need(isinstance(model, str) and bool(model), "model", model, "the name of a model")
    return str(model)


def _options(body: Mapping[str, Any]) -> dict[str, int]:
    options = {name: body[name] for name in sorted(_OPTIONS) if body.get(name) is not None}
    for name, value in options.items():
        need(isinstance(value, int) and not isinstance(value, bool), name, value, "a whole number")
    return options


@contextmanager
def _at(path: str) -> Iterator[None]:
    """Puts a question's path before what the question itself refuses."""
    try:
        yield
    except RequestError as error:
        if error.message.startswith(path):
            raise
        raise RequestError(f"{path}: {error.message}", hint=error.hint) from error
