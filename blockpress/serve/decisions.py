"""Typed decisions: OpenAI's `/v1/decisions` and TypeSafe's `/v1/systemone`, which share the first path.

Invariant: shapes are told apart by the body alone: TypeSafe's has a `state`.
Source: the shapes are those of `blockpress.decide.wire`.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request

from blockpress.decide.wire import DecisionRequest, format_decisions, format_systemone, parse_decisions, parse_systemone
from blockpress.serve.errors import FieldError
from blockpress.serve.fields import Refusals
from blockpress.serve.prompts import plain_messages
from blockpress.serve.service import Service

router = APIRouter()


@router.post("/v1/decisions")
async def decisions(http: Request) -> dict[str, Any]:
    """The probabilities of all answers, in the shape in which the questions came."""
    body = await _object(http)
    return await _decide(http, body, typesafe="state" in body)


@router.post("/v1/systemone")
async def systemone(http: Request) -> dict[str, Any]:
    """The same in TypeSafe's shape."""
    return await _decide(http, await _object(http), typesafe=True)


async def _object(http: Request) -> dict[str, Any]:
    try:
        body = json.loads(await http.body())
    except ValueError as error:
        raise FieldError("body", f"the body is not JSON: {error}", "send a JSON object") from error
    if not isinstance(body, dict):
        raise FieldError("body", f"the body is {body!r:.80}", "send a JSON object")
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
        return (format_systemone if typesafe else format_decisions)(decision, service.name)

    return await service.build(answer)
