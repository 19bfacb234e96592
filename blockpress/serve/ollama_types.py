"""From the bodies of Ollama's chat and generate to a chat or a plain prompt.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md (the types of ollama 0.6.3).
Every field: docs/apis.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from blockpress.lm.arguments import Mode
from blockpress.serve.completions import CompletionBody, completion_job
from blockpress.serve.dialects import DialectBody, Talk, dialect_job
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import (
    MOST_COUNT,
    MOST_SEED,
    DiffusionFields,
    Fields,
    MinP,
    Penalty,
    Positive,
    Refusals,
    Repetition,
    TopK,
    TopP,
    Window,
)
from blockpress.serve.openai import Job
from blockpress.serve.openai_types import ConstrainedFields
from blockpress.serve.service import Service

EDITS = ("min_p", "presence_penalty", "frequency_penalty", "repeat_penalty", "repeat_last_n")
"""Options that edit the logits, beside those of every dialect."""
REPEAT_LAST_N = 64
"""How far back penalties look without `options.repeat_last_n`: Ollama's default."""
NAMES = {
    r"(messages\[\d+\])\.content\[(\d+)\](\.image_url)?": r"\1.images[\2]",
    "max_completion_tokens": "options.num_predict",
    "max_tokens": "options.num_predict",
    "schema": "format",
    "thinking": "think",
    "repetition_penalty": "options.repeat_penalty",
    **{name: f"options.{name}" for name in ("temperature", "top_p", "top_k", "seed", "stop")},
    **{name: f"options.{name}" for name in EDITS},
}
NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "mirostat": ((0,), "what may be drawn is cut down by top_k, top_p and min_p"),
    "tfs_z": ((1,), "what may be drawn is cut down by top_k, top_p and min_p"),
    "typical_p": ((1,), "what may be drawn is cut down by top_k, top_p and min_p"),
}
"""Options that are not honoured: the values (beside null) that ask for nothing, and why not."""


class Options(Fields):
    """What decides how an answer is drawn."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Repetition | None = None
    repeat_last_n: Window | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED)] | None = None
    num_predict: Annotated[int, Field(ge=-2, le=MOST_COUNT)] | None = None
    stop: str | list[str] | None = None


class OllamaBody(Fields):
    """The fields that chat and generate share."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=128)] | None = None
    keep_alive: float | str | None = None
    mode: Mode | None = None
    diffusion: DiffusionFields | None = None
    lenient: bool | None = None


class OllamaChatBody(OllamaBody):
    """The body of /api/chat."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateBody(OllamaBody):
    """The body of /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None
    steps: Positive | None = None


def plain_name(name: str) -> str:
    """A model's name without the tag that Ollama's clients add."""
    return name.removesuffix(":latest")


def _common(service: Service, body: OllamaBody) -> tuple[DialectBody, Refusals, dict[str, Any]]:
    """What every answer is drawn by, what is refused of it, and further fields of a chat."""
    options = body.options or Options()
    shared = DialectBody(
        model=plain_name(body.model),
        diffusion=body.diffusion,
        lenient=body.lenient,
        mode=body.mode,
        **{name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed")},
    )
    refusals = Refusals.of(service, shared.lenient)
    for name, (neutral, why) in NEUTRAL.items():
        value = (options.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            refusals.refuse(f"options.{name}", value, why)
    asked: dict[str, Any] = {"stop": options.stop, "response_format": _form(body.format)}
    asked |= {name: getattr(options, name) for name in EDITS}
    asked["repeat_last_n"] = REPEAT_LAST_N if options.repeat_last_n is None else options.repeat_last_n
    asked["max_tokens"] = options.num_predict if (options.num_predict or 0) > 0 else None
    if body.logprobs:
        asked |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.think is not None:
        asked |= {"chat_template_kwargs": {"enable_thinking": body.think is not False}}
        asked |= {"reasoning_effort": body.think} if isinstance(body.think, str) else {}
    return shared, refusals, asked


def hole_body(service: Service, body: GenerateBody) -> tuple[ConstrainedFields, int | None]:
    """What fills the hole between the prompt and the suffix, and in how many tokens. Raises BlockpressError."""
    shared, refusals, asked = _common(service, body)
    for name in ("system", "images", "think", "raw", "template", "context", "logprobs"):
        if getattr(body, name):
            refusals.refuse(name, getattr(body, name), "with a suffix, the two texts are all that is read")
    given = {name: getattr(shared, name) for name in DialectBody.model_fields if name != "stream"}
    plain = {name: asked[name] for name in ("stop", "response_format", *EDITS)}
    return ConstrainedFields(**given, **plain), asked["max_tokens"]


def ollama_job(service: Service, body: OllamaChatBody | GenerateBody) -> Job:
    """Check a body, and make its requests. Raises BlockpressError: whatever is wrong with it, in its own words."""
    shared, refusals, asked = _common(service, body)
    if isinstance(body, OllamaChatBody):
        tools = [{"type": "function", **_given(tool)} for tool in body.tools or ()]
        return dialect_job(service, shared, _talk(body), refusals, tools=tools or None, **asked)
    return _generate_job(service, body, shared, refusals, asked)


def _generate_job(
    service: Service, body: GenerateBody, shared: DialectBody, refusals: Refusals, asked: dict[str, Any]
) -> Job:
    if body.template:
        refusals.refuse("template", body.template, "a template in a request is not run")
    if body.context:
        refusals.refuse("context", body.context, "a conversation is sent as messages to /api/chat")
    if body.steps is not None:
        shared.diffusion = (body.diffusion or DiffusionFields()).model_copy(update={"steps": body.steps})
    if body.raw:
        for name in ("system", "images", "think"):
            if getattr(body, name):
                refusals.refuse(name, getattr(body, name), "with raw, the prompt is all that is read")
        plain = {name: asked[name] for name in ("max_tokens", "stop", "response_format", *EDITS)}
        given = {name: getattr(shared, name) for name in DialectBody.model_fields if name != "stream"}
        logprobs = asked.get("top_logprobs")
        return completion_job(service, CompletionBody(prompt=body.prompt or "", logprobs=logprobs, **given, **plain))[0]
    talk = Talk({**NAMES, r"prompt\.content\[(\d+)\](\.image_url)?": r"images[\1]"})
    if body.system:
        talk.add("system", "system", body.system)
    talk.add("prompt", "user", _shown(body.prompt or "", body.images, "images"))
    return dialect_job(service, shared, talk, refusals, **asked)


def _form(form: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(form, dict):
        return {"type": "json_schema", "json_schema": {"schema": form}}
    if form not in (None, "", "json"):
        raise _FieldError("format", f"format is {form!r:.80}", "give json or a JSON schema")
    return {"type": "json_object"} if form else None


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _talk(body: OllamaChatBody) -> Talk:
    talk = Talk(NAMES)
    for number, message in enumerate(body.messages or ()):
        at, role = f"messages[{number}]", message.get("role")
        said = message.get("content") or ""
        if not isinstance(said, str):
            raise _FieldError(f"{at}.content", f"{at}.content is {said!r:.80}", "give a text; images have a field")
        content = _shown(said, message.get("images"), f"{at}.images")
        if role == "tool":
            called = message.get("tool_name") or message.get("name")
            talk.add(at, "tool", content, name=called, tool_call_id=message.get("tool_call_id"))
        elif role == "assistant":
            thought, calls = message.get("thinking") or None, message.get("tool_calls") or None
            calls = [_call(call, f"{at}.tool_calls[{n}]") for n, call in enumerate(calls)] if calls else None
            talk.add(at, "assistant", content, reasoning=thought, tool_calls=calls)
        elif role in ("user", "system", "developer"):
            talk.add(at, role, content)
        else:
            raise _FieldError(f"{at}.role", f"{at}.role is {role!r:.80}", "give system, user, assistant or tool")
    return talk


def _call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise _FieldError(f"{at}.function", f"{at}.function is {function!r:.80}", "give a name and arguments")
    plain = {"name": function.get("name"), "arguments": function.get("arguments")}
    return {"type": "function", "function": plain, **({"id": call["id"]} if call.get("id") else {})}


def _shown(text: Any, images: Sequence[Any] | None, at: str) -> Any:
    """A content of a text and images, which come as base64."""
    if not images:
        return text
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise _FieldError(at, f"{at} is {images!r:.80}", "give a list of images as base64")
    shown = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
    return [*shown, *([{"type": "text", "text": text}] if text else [])]
