"""The bodies of OpenAI's chat completions and completions, with the fields that vLLM adds.

Source: https://platform.openai.com/docs/api-reference (the types of openai 3.57); vLLM's `ChatCompletionRequest`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import Fields, Positive, Refusals, SamplingFields

BUDGETS = {"minimal": 256, "low": 1024, "medium": 4096}
"""Most tokens of a thought by `reasoning_effort`; more effort has no limit."""


class JsonSchema(Fields):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema", "regex", "choice"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Fields):
    """vLLM's constraints; one of them. Others of its fields are refused by name (`constraint_of`)."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ConstrainedFields(SamplingFields):
    """With what an answer must be, in OpenAI's form or vLLM's."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream_options: StreamOptions | None = None


class Prediction(Fields):
    """What the answer will be like: it starts from this text in place of noise."""

    type: Literal["content"] = "content"
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text") or "") for part in self.content)


class ChatBody(ConstrainedFields):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Positive | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=128)] | None = None
    return_token_ids: bool | None = None
    prediction: Prediction | None = None


def constraint_of(body: ConstrainedFields) -> dict[str, Any]:
    """The constraint that a body asks for, as an argument of `LM.generate`. Raises _FieldError: a form without it."""
    form, outputs = body.response_format, body.structured_outputs
    if outputs is not None:
        return _structured(outputs)
    if form is None or form.type == "text":
        return {}
    if form.type == "json_object":
        return {"schema": {"type": "object"}}
    if form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            place = "response_format.json_schema.schema"
            raise _FieldError(place, "response_format has no schema", f"add {place}")
        return {"schema": form.json_schema.schema_}
    value = (form.model_extra or {}).get(form.type)
    if value is None:
        raise _FieldError(f"response_format.{form.type}", f"response_format has no {form.type}", f"add {form.type}")
    return {form.type: value}


def _structured(outputs: StructuredOutputs) -> dict[str, Any]:
    for name, value in (outputs.model_extra or {}).items():
        if value not in (None, False):
            at = f"structured_outputs.{name}"
            raise _FieldError(at, f"{at} is {value!r:.80}", "give json, json_object, regex or choice alone")
    given = outputs.model_dump(exclude_none=True, exclude=set(outputs.model_extra or ()))
    if given.pop("json_object", False):
        given.setdefault("json_", {"type": "object"})
    if "json_" in given:
        schema = given.pop("json_")
        try:
            given["schema"] = json.loads(schema) if isinstance(schema, str) else schema
        except (ValueError, RecursionError) as error:
            at = "structured_outputs.json"
            raise _FieldError(at, f"{at} is not JSON: {error}", "give a JSON schema, or its text") from error
    return given


def thinking_of(body: ChatBody, refusals: Refusals) -> tuple[bool, int | None]:
    """Whether the model is asked to think, and for how many tokens at most."""
    asked = (body.chat_template_kwargs or {}).get("enable_thinking")
    for name, value in (body.chat_template_kwargs or {}).items():
        if name not in ("enable_thinking", "thinking"):
            refusals.refuse(f"chat_template_kwargs.{name}", value, "only enable_thinking is read")
    effort = body.reasoning_effort
    thinking = bool(asked) if asked is not None else effort not in (None, "none")
    budget = body.thinking_token_budget or BUDGETS.get(effort or "")
    return thinking, budget if thinking else None
