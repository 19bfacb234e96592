"""Bodies of /v1/decisions and /v1/systemone, in and out: the shapes of openai 3.57 and typesafe-sdk 0.7.5, recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from blockpress.chat.messages import check_messages
from blockpress.decide import (
    Choice,
    ChoiceAnswer,
    Decision,
    DecisionUsage,
    Score,
    ScoreAnswer,
    YesNo,
    YesNoAnswer,
)
from blockpress.decide.wire import (
    DecisionRequest,
    format_decisions,
    format_systemone,
    parse_decisions,
    parse_systemone,
)
from blockpress.errors import RequestError

Change = Callable[[dict[str, Any]], object]

DECISIONS: dict[str, Any] = {
    "model": "sudoku-nano",
    "input": "The package arrived with a broken screen.",
    "questions": [
        {"type": "predicate", "name": "damaged", "instructions": "Is the item damaged?"},
        {
            "type": "choice",
            "name": "team",
            "instructions": [{"type": "input_text", "text": "Which team?"}, {"type": "input_json", "data": {"a": 1}}],
            "choices": [{"value": "returns", "description": "sends back"}, {"value": True}, {"value": "true"}],
        },
        {"type": "score", "instructions": "How severe?", "levels": [{"label": "low"}, {"label": "high"}]},
    ],
}
SYSTEMONE: dict[str, Any] = {
    "model": "jev-latest",
    "state": {"ticket": "Charged twice \u00e9"},
    "questions": {
        "urgent": {"type": "noul", "instructions": "Urgent?", "criteria": {"true": "money moves", "false": None}},
        "team": {"type": "choice", "instructions": None, "criteria": {"billing": "payments", "shipping": None}},
        "tone": {"type": "score", "instructions": {"rate": "tone"}, "criteria": ["calm", {"mood": "angry"}]},
    },
}
DECISION = Decision(
    answers=(
        YesNoAnswer(name="urgent", probability=0.25, confidence=0.7, label_mass=0.93),
        ChoiceAnswer(name="team", value=True, probabilities={"a": 0.25, True: 0.75}, confidence=0.7, label_mass=0.93),
        ScoreAnswer(
            name="tone",
            value=17.5,
            level="20",
            probabilities={"10": 0.25, "20": 0.75},
            confidence=0.7,
            label_mass=0.93,
        ),
    ),
    usage=DecisionUsage(input_tokens=40, output_tokens=3, canvases=1, forwards=2),
)


def changed(body: dict[str, Any], change: Change) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(body))
    change(copy)
    return copy


def test_a_body_of_decisions_is_read() -> None:
    assert parse_decisions(DECISIONS) == DecisionRequest(
        model="sudoku-nano",
        context="The package arrived with a broken screen.",
        questions=(
            YesNo("Is the item damaged?", name="damaged"),
            Choice('Which team?\n{"a": 1}', options={"returns": "sends back", True: None, "true": None}, name="team"),
            Score("How severe?", levels={"low": None, "high": None}),
        ),
    )


def test_a_body_of_systemone_is_read() -> None:
    assert parse_systemone(SYSTEMONE) == DecisionRequest(
        model="jev-latest",
        context='{"ticket": "Charged twice \u00e9"}',
        questions=(
            YesNo("Urgent?", yes="money moves", name="urgent"),
            Choice(None, options={"billing": "payments", "shipping": None}, name="team"),
            Score('{"rate": "tone"}', levels=["calm", '{"mood": "angry"}'], name="tone"),
        ),
    )


@pytest.mark.parametrize(("parse", "body"), [(parse_decisions, DECISIONS), (parse_systemone, SYSTEMONE)])
def test_seed_steps_and_draws_are_taken_too(parse: Callable[..., DecisionRequest], body: dict[str, Any]) -> None:
    assert parse(body).options == {}
    assert parse({**body, "seed": 3, "steps": 2, "draws": None}).options == {"seed": 3, "steps": 2}
    for name in ("seed", "steps", "draws"):
        with pytest.raises(RequestError, match=f"{name} is 'x'"):
            parse({**body, name: "x"})


def test_what_names_or_caches_a_request_changes_nothing() -> None:
    cached = {"prompt_cache_key": "a", "prompt_cache_options": {"mode": "explicit"}, "safety_identifier": "me"}
    assert parse_decisions({**DECISIONS, **cached}) == parse_decisions(DECISIONS)


def test_a_conversation_becomes_messages_that_templates_read() -> None:
    items = [
        {"role": "system", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Look:"}, {"type": "input_json", "data": [{"a": 1}]}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Yes."}], "phase": "commentary"},
        {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"q": 1}', "id": "x", "status": "completed"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "ls"},
        {"type": "function_call_output", "call_id": "c1", "output": "found"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "files"}]},
        {"role": "developer", "content": "Decide."},
    ]  # fmt: skip
    context = parse_decisions({**DECISIONS, "input": items}).context
    assert isinstance(context, list)
    assert [message["role"] for message in context] == ["system", "user", "assistant", "assistant", "tool", "tool", "developer"]  # fmt: skip
    checked, media = check_messages(context)
    assert media == [] and checked[1]["content"][1] == {"type": "text", "text": '[{"a": 1}]'}
    assert [call["function"]["arguments"] for call in checked[3]["tool_calls"]] == [{"q": 1}, {"input": "ls"}]
    assert [message["content"] for message in checked[4:6]] == ["found", [{"type": "text", "text": "files"}]]


def test_a_picture_is_shown() -> None:
    part = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"}
    context = parse_decisions({**DECISIONS, "input": [{"role": "user", "content": [part]}]}).context
    _, media = check_messages(context)
    assert [(item.kind, item.source) for item in media] == [("image", "data:image/png;base64,AAAA")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.pop("model"), "model is None"),
        (lambda b: b.pop("input"), "input is None"),
        (lambda b: b.update(logit_bias={"5": 100}), "logit_bias is not known"),
        (lambda b: b.update(top_k=1), "top_k is not known"),
        (lambda b: b.update(input=""), "input is ''"),
        (lambda b: b.update(input=[]), "input is []"),
        (lambda b: b.update(input=[3]), "input[0] is 3"),
        (lambda b: b.update(input=[{"role": "tool", "content": "x"}]), "input[0].role is 'tool'"),
        (lambda b: b.update(input=[{"role": ["user"], "content": "x"}]), "input[0].role is ['user']"),
        (lambda b: b.update(input=[{"type": [], "content": "x"}]), "input[0].type is []"),
        (lambda b: b.update(input=[{"type": "reasoning"}]), "input[0].type is 'reasoning'"),
        (lambda b: b.update(input=[{"role": "user", "content": "x", "name": "a"}]), "input[0].name is not known"),
        (lambda b: b.update(input=[{"role": "user", "content": [{"type": "text"}]}]), "input[0].content[0].type is 'text'"),
        (lambda b: b.update(input=[{"role": "system", "content": [{"type": "input_image", "image_url": "x"}]}]), "input[0].content[0].type is 'input_image'"),
        (lambda b: b.update(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "x", "detail": "low"}]}]), "input[0].content[0].detail is 'low'"),
        (lambda b: b.update(input=[{"type": "function_call", "name": "f", "arguments": "{}"}]), "input[0].call_id is None"),
        (lambda b: b.update(questions={}), "questions is {}"),
        (lambda b: b.update(questions=[]), "questions holds 0"),
        (lambda b: b.update(questions=b["questions"][2:] * 65), "questions holds 65"),
        (lambda b: b.update(stream=True), "stream is not known"),
        (lambda b: b["questions"].append(3), "questions[3] is 3"),
        (lambda b: b["questions"][0].update(type="noul"), "questions[0].type is 'noul'"),
        (lambda b: b["questions"][0].update(type=["choice"]), "questions[0].type is ['choice']"),
        (lambda b: b["questions"][0].pop("instructions"), "questions[0].instructions is None"),
        (lambda b: b["questions"][0].update(instructions=" "), "questions[0].instructions is ' '"),
        (lambda b: b["questions"][0].update(name=""), "questions[0]: YesNo("),
        (lambda b: b["questions"][0].update(name="team"), "questions[1].name is 'team'"),
        (lambda b: b["questions"][0].update(choices=[]), "questions[0].choices is not known"),
        (lambda b: b["questions"][1].update(choices=None), "questions[1].choices is None"),
        (lambda b: b["questions"][1]["choices"].append({"value": "returns"}), "questions[1].choices[3].value is 'returns'"),
        (lambda b: b["questions"][1]["choices"].append({"value": 3}), "questions[1].choices[3].value is 3"),
        (lambda b: b["questions"][1]["choices"].append({"value": ""}), "options[3] is ''"),
        (lambda b: b["questions"][1]["choices"].append({"value": "x", "label": "x"}), "questions[1].choices[3].label is not"),
        (lambda b: b["questions"][1]["choices"].append("x"), "questions[1].choices[3] is 'x'"),
        (lambda b: b["questions"][1].update(choices=[{"value": "one"}]), "questions[1].choices is [{"),
        (lambda b: b["questions"][1]["instructions"].append({"type": "input_image"}), "questions[1].instructions[2].type"),
        (lambda b: b["questions"][2]["levels"].append({"label": "low"}), "questions[2].levels[2].label is 'low'"),
        (lambda b: b["questions"][2]["levels"].append({"label": True}), "questions[2].levels[2].label is True"),
        (lambda b: b["questions"][2].update(levels=[{"label": f"{n}"} for n in range(11)]), "questions[2].levels is [{"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_body_of_decisions_is_refused_by_its_path(change: Change, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_decisions(changed(DECISIONS, change))
    assert said in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.pop("model"), "model is None"),
        (lambda b: b.pop("state"), "state is None"),
        (lambda b: b.update(state=""), "state is ''"),
        (lambda b: b.update(state=5), "state is 5"),
        (lambda b: b.update(questions=[]), "questions is []"),
        (lambda b: b.update(questions={}), "questions holds 0"),
        (lambda b: b.update(assets={}), "assets is not known"),
        (lambda b: b["questions"].update({"": {"type": "noul", "instructions": "?"}}), "questions is ''"),
        (lambda b: b["questions"].update(spot={"type": "box"}), "questions.spot.type is 'box'"),
        (lambda b: b["questions"].update(spot=None), "questions.spot is None"),
        (lambda b: b["questions"]["urgent"].update(other=1), "questions.urgent.other is not known"),
        (lambda b: b["questions"]["urgent"].update(criteria=["a"]), "questions.urgent.criteria is ['a']"),
        (lambda b: b["questions"]["urgent"].update(criteria={"yes": "a"}), "questions.urgent.criteria.yes is not known"),
        (lambda b: b["questions"].update(bare={"type": "noul"}), "questions.bare: YesNo(None): question is None"),
        (lambda b: b["questions"]["team"].update(criteria={}), "questions.team: Choice(None): options is {}"),
        (lambda b: b["questions"]["team"].update(criteria=["a"]), "questions.team.criteria is ['a']"),
        (lambda b: b["questions"]["team"]["criteria"].update(other=3), "questions.team.criteria.other is 3"),
        (lambda b: b["questions"]["tone"].update(criteria=[]), "questions.tone: Score("),
        (lambda b: b["questions"]["tone"].update(criteria=["a", "a"]), "levels has 'a' twice"),
        (lambda b: b["questions"]["tone"].update(criteria=["a", None]), "questions.tone.criteria[1] is None"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_body_of_systemone_is_refused_by_its_path(change: Change, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_systemone(changed(SYSTEMONE, change))
    assert said in refused.value.message and refused.value.hint


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    for parse in (parse_decisions, parse_systemone):
        with pytest.raises(RequestError, match="body is "):
            parse(body)


def test_answers_have_the_shape_of_decisions() -> None:
    assert format_decisions(DECISION, "nano") == {
        "model": "nano",
        "answers": [
            {"type": "predicate", "name": "urgent", "probability": 0.25},
            {
                "type": "choice",
                "name": "team",
                "choice": True,
                "confidence": 0.7,
                "probabilities": [{"value": "a", "probability": 0.25}, {"value": True, "probability": 0.75}],
            },
            {
                "type": "score",
                "name": "tone",
                "score": 0.75,
                "confidence": 0.7,
                "probabilities": [
                    {"label": "10", "value": 0, "probability": 0.25},
                    {"label": "20", "value": 1, "probability": 0.75},
                ],
            },
        ],
        "usage": {
            "input_tokens": 40,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 43,
        },
    }


def test_answers_have_the_shape_of_systemone() -> None:
    assert format_systemone(DECISION, "nano") == {
        "model": "nano",
        "answers": {
            "urgent": {"type": "noul", "noul": 0.25},
            "team": {
                "type": "choice",
                "choice": "True",
                "confidence": 0.7,
                "probabilities": {"a": 0.25, "True": 0.75},
            },
            "tone": {
                "type": "score",
                "score": 0.75,
                "confidence": 0.7,
                "legend": {"0": "10", "1": "20"},
                "probabilities": {"0": 0.25, "1": 0.75},
            },
        },
        "usage": {"input_tokens": 40, "output_tokens": 3},
        "diagnostics": {name: {"label_mass": 0.93} for name in ("urgent", "team", "tone")},
    }
