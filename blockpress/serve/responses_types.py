"""From the body of OpenAI's responses to a chat: items, tools, reasoning and the form of the text.

Source: https://platform.openai.com/docs/api-reference/responses (the types of openai 3.57).
Every field: docs/apis.md.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from blockpress.serve.dialects import DialectBody, Talk, dialect_job, joined_content
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import Fields, Penalty, Positive, Refusals
from blockpress.serve.openai import Job
from blockpress.serve.service import Service

NAMES = {
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "schema": "text.format.schema",
    "reasoning_effort": "reasoning.effort",
}
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "an answer is given in the call that asks for it"),
    "context_management": (([],), "a conversation is read whole"),
    "conversation": ((), "nothing is stored: send the whole input"),
    "moderation": ((), "nothing is moderated"),
    "previous_response_id": ((), "nothing is stored: send the whole input"),
    "prompt": ((), "nothing is stored: send instructions and input"),
    "truncation": (("disabled",), "an input is read whole"),
}
"""Fields that are not honoured: the values (beside null) that ask for nothing, and why not."""
UNOFFERED = ("web_search", "web_search_preview", "web_search_2025_08_26")
"""Tools that clients always send, and that a model may leave alone: it is not offered them, and a warning says so."""


class Reasoning(Fields):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextForm(Fields):
    format: dict[str, Any] | None = None


class ResponsesBody(DialectBody):
    """The body of /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextForm | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=128)] | None = None
    metadata: dict[str, Any] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


def responses_job(service: Service, body: ResponsesBody) -> Job:
    """Check a body, and make its requests. Raises BlockpressError: whatever is wrong with it, in its own words."""
    refusals = Refusals.of(service, body.lenient)
    for name, (neutral, why) in REFUSED.items():
        value = (body.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            refusals.refuse(name, value, why)
    mode = (body.reasoning.model_extra or {}).get("mode") if body.reasoning else None
    if mode not in (None, "standard"):
        refusals.refuse("reasoning.mode", mode, "there is one way to think")
    asked: dict[str, Any] = {
        "tools": _tools(body.tools, refusals),
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_tokens": body.max_output_tokens,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "response_format": _form(body.text.format if body.text else None),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
    }
    if body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ()):
        asked |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    job = dialect_job(service, body, _talk(body), refusals, **asked)
    job.id = f"resp_{uuid.uuid4().hex}"
    return job


def custom_tools(body: ResponsesBody) -> set[str]:
    """The names of the tools that take a text in place of arguments."""
    return {str(tool.get("name")) for tool in body.tools or () if tool.get("type") == "custom"}


def _form(form: dict[str, Any] | None) -> dict[str, Any] | None:
    kind = form.get("type") if form else "text"
    if kind == "json_schema":
        assert form is not None
        if not isinstance(form.get("schema"), dict):
            raise _FieldError("text.format.schema", "text.format.schema is missing", "add text.format.schema")
        return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    if kind not in ("text", "json_object"):
        known = "give text, json_object or json_schema"
        raise _FieldError("text.format.type", f"text.format.type is {kind!r:.80}", known)
    return {"type": kind}


def _choice(choice: str | dict[str, Any] | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") in ("function", "custom"):
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [{**tool, "type": "function"} if isinstance(tool, dict) else tool for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def _tools(tools: list[dict[str, Any]] | None, refusals: Refusals) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's older shape; a custom tool becomes a function of one text."""
    made = []
    for number, tool in enumerate(tools or ()):
        kind = tool.get("type")
        function = {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
        if kind == "custom":
            form = tool.get("format") or {}
            if form.get("type", "text") != "text":
                refusals.refuse(f"tools[{number}].format", form, "the input of a custom tool is a text")
            schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
            function |= {"parameters": schema, "strict": True}
        elif kind in UNOFFERED:
            refusals.warnings.append(f"tools[{number}] is not offered to the model: nothing is searched")
            continue
        elif kind != "function":
            refusals.refuse(f"tools[{number}].type", kind, "a tool is a function or custom: nothing else runs here")
            continue
        made.append({"type": "function", "function": function})
    return made or None


def _talk(body: ResponsesBody) -> Talk:
    talk = Talk(NAMES)
    if body.instructions:
        talk.add("instructions", "system", body.instructions)
    if isinstance(body.input, str):
        talk.add("input", "user", body.input)
        return talk
    for number, item in enumerate(body.input):
        _item(talk, item, f"input[{number}]")
    if talk.messages and talk.messages[-1]["role"] == "assistant" and not talk.messages[-1].get("tool_calls"):
        raise _FieldError("input", "input ends with the model's", "end with a user's message: an answer begins a turn")
    return talk


def _item(talk: Talk, item: dict[str, Any], at: str) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        _message(talk, item, at)
    elif kind == "reasoning":
        _own(talk, at, reasoning=_thought(item))
    elif kind in ("function_call", "custom_tool_call"):
        given = item.get("arguments") if kind == "function_call" else {"input": item.get("input")}
        call = {"name": item.get("name"), "arguments": given}
        _own(talk, at, tool_calls=[{"id": item.get("call_id"), "type": "function", "function": call}])
    elif kind in ("function_call_output", "custom_tool_call_output"):
        output = item.get("output")
        content = output if isinstance(output, str) else joined_content(_content(output, f"{at}.output"))
        talk.add(at, "tool", content, tool_call_id=item.get("call_id"))
    else:
        known = "message, reasoning, function_call, function_call_output, custom_tool_call, custom_tool_call_output"
        raise _FieldError(f"{at}.type", f"{at}.type is {kind!r:.80}", f"it may be {known}")


def _message(talk: Talk, item: dict[str, Any], at: str) -> None:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise _FieldError(f"{at}.role", f"{at}.role is {role!r:.80}", "give user, assistant, system or developer")
    shown = content if isinstance(content, str) else joined_content(_content(content, f"{at}.content"))
    if role == "assistant":
        _own(talk, at, content=shown if isinstance(shown, str) else "".join(part.get("text", "") for part in shown))
    elif role in ("system", "developer") and [each["role"] for each in talk.messages] == ["system"]:
        # Templates know one opening: instructions and what developers add to them.
        before = talk.messages[0]["content"]
        talk.messages[0]["content"] = joined_content([{"type": "text", "text": text} for text in (before, shown)])
    else:
        talk.add(at, "system" if role == "developer" and not talk.messages else role, shown)


def _own(talk: Talk, at: str, content: str = "", reasoning: str = "", tool_calls: Any = ()) -> None:
    """What the model said: neighbouring items are one turn of it."""
    if not talk.messages or talk.messages[-1]["role"] != "assistant":
        talk.add(at, "assistant", "", reasoning=None, tool_calls=None)
    turn = talk.messages[-1]
    turn["content"] += content
    turn["reasoning"] = (turn["reasoning"] or "") + reasoning or None
    turn["tool_calls"] = [*(turn["tool_calls"] or ()), *tool_calls] or None


def _thought(item: dict[str, Any]) -> str:
    """The text of a reasoning item, as it stands or as `sealed` has written it."""
    for name in ("content", "summary"):
        found = [str(part.get("text") or "") for part in item.get(name) or () if isinstance(part, dict)]
        if any(found):
            return "".join(found)
    try:
        return base64.b64decode(str(item.get("encrypted_content") or ""), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):  # of another server
        return ""


def sealed(thought: str) -> str:
    """A thought as clients keep it that send back `encrypted_content` alone. It is no secret."""
    return base64.b64encode(thought.encode()).decode()


def _content(content: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        raise _FieldError(at, f"{at} is {content!r:.80}", "give a text or a list of parts")
    return [_part(part, f"{at}[{number}]") for number, part in enumerate(content)]


def _part(part: Any, at: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if kind else None
    if kind in ("input_text", "output_text", "text", "refusal") and isinstance(text, str):
        return {"type": "text", "text": text}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    known = "input_text, output_text, refusal with a text, or input_image with an image_url"
    raise _FieldError(at, f"{at} is {part!r:.80}", f"it may be {known}")
