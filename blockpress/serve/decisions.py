"""Typed decisions: OpenAI's `/v1/decisions` and TypeSafe's `/v1/systemone`, which share the first path.

Invariant: shapes are told apart by the body alone: TypeSafe's has a `state`.
Source: the shapes are those of `blockpress.decide.wire`.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request

from blockpress.decide.wire import DecisionRequest, format_decisions, format_systemone, parse_decisions, parse_systemone
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import Refusals
from blockpress.serve.prompts import plain_messages
from blockpress.serve.service import Service
from blockpress.serve.tracing import current_span, record_cost

router = APIRouter()


_INPUT = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
_TEXT = {"type": "string", "minLength": 1}
_OPENAI = {
    "type": "object",
    "required": ["model", "input", "questions"],
    "properties": {
        "model": _TEXT,
        "input": _INPUT,
        "questions": {
            "type": "array",
            "minItems": 1,
            "maxItems": 64,
            "items": {
                "type": "object",
                "required": ["type", "instructions"],
                "properties": {"type": {"enum": ["predicate", "choice", "score"]}, "instructions": _INPUT},
            },
        },
    },
}
_TYPESAFE = {
    "type": "object",
    "required": ["model", "state", "questions"],
    "properties": {
        "model": _TEXT,
        "state": {},
        "questions": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 64,
            "additionalProperties": {
                "type": "object",
                "required": ["type", "instructions"],
                "properties": {"type": {"enum": ["noul", "choice", "score"]}},
            },
        },
    },
}


def _documented(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post("/v1/decisions", openapi_extra=_documented({"anyOf": [_OPENAI, _TYPESAFE]}))
async def decisions(http: Request) -> dict[str, Any]:
    """The probabilities of all answers, in the shape in which the questions came."""
    body = await _object(http)
    return await _decide(http, body, typesafe="state" in body)


@router.post("/v1/systemone", openapi_extra=_documented(_TYPESAFE))
async def systemone(http: Request) -> dict[str, Any]:
    """The same in TypeSafe's shape."""
    return await _decide(http, await _object(http), typesafe=True)


async def _object(http: Request) -> dict[str, Any]:
    try:
        body = json.loads(await http.body())
    except (ValueError, RecursionError) as error:
        raise _FieldError("body", f"the body is not JSON: {error}", "send a JSON object") from error
    if not isinstance(body, dict):
        raise _FieldError("body", f"the body is {body!r:.80}", "send a JSON object")
    return body


async def _decide(http: Request, body: dict[str, Any], *, typesafe: bool) -> dict[str, Any]:
    service: Service = http.app.state.service

    def answer() -> dict[str, Any]:
        asked: DecisionRequest = (parse_systemone if typesafe else parse_decisions)(body)
        service.check_model(asked.model)
        context: str | list[dict[str, Any]] = asked.context
        if not isinstance(context, str):
            context = plain_messages(context, Refusals(True), service.options)
        how: dict[str, Any] = {**asked.options}
        decision = service.lm.decide(context, asked.questions, **how)
        usage = decision.usage
        record_cost(
            current_span(),
            service.name,
            {
                "gen_ai.usage.input_tokens": usage.input_tokens,
                "gen_ai.usage.output_tokens": usage.output_tokens,
                "blockpress.forwards": usage.forwards,
                "blockpress.canvases": usage.canvases,
            },
        )
        return (format_systemone if typesafe else format_decisions)(decision, service.name)

    return await service.build(answer)
