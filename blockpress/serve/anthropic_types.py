"""From the body of Anthropic's messages to a chat: content blocks, tools, thinking and structured output.

Source: https://platform.claude.com/docs/en/api/messages (the types of anthropic 2.14).
Every field: docs/apis.md.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Literal

from blockpress.serve.dialects import DialectBody, Talk, as_json, dialect_job, joined_content
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import Fields, Positive, Refusals
from blockpress.serve.openai import Job
from blockpress.serve.service import Service

NAMES = {
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "stop": "stop_sequences",
    "schema": "output_config.format.schema",
    "thinking_token_budget": "thinking.budget_tokens",
}
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "compaction": ((), "a conversation is read whole"),
    "container": ((), "no code runs here"),
    "mcp_servers": (([],), "no other server is asked"),
    "thread": ((), "nothing is stored"),
}
"""Fields that are not honoured: the values (beside null) that ask for nothing, and why not."""


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Positive | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountBody(DialectBody):
    """The body of /v1/messages/count_tokens."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None


class MessagesBody(CountBody):
    """The body of /v1/messages."""

    max_tokens: Positive
    stop_sequences: list[str] | None = None


def messages_job(service: Service, body: CountBody) -> Job:
    """Check a body, and make its requests. Raises BlockpressError: whatever is wrong with it, in its own words."""
    refusals = Refusals.of(service, body.lenient)
    for name, (neutral, why) in REFUSED.items():
        value = (body.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            refusals.refuse(name, value, why)
    for edit in (body.context_management or {}).get("edits") or ():
        kind = str(edit.get("type") if isinstance(edit, dict) else edit)
        if not kind.startswith("clear_thinking"):
            refusals.refuse("context_management.edits", kind, "a conversation is read whole, but for stored thoughts")
    asked: dict[str, Any] = {
        "tools": _tools(body.tools, refusals),
        **_choice(body.tool_choice),
        **_thought(body, refusals),
    }
    if isinstance(body, MessagesBody):
        asked |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences}
    form = (body.output_config.format if body.output_config else None) or body.output_format
    if form is not None:
        if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            at = "output_config.format"
            raise _FieldError(at, f"{at} is {form!r:.80}", 'give {"type": "json_schema", "schema": {...}}')
        asked["response_format"] = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    job = dialect_job(service, body, _talk(body, refusals), refusals, **asked)
    job.id = f"msg_{uuid.uuid4().hex}"
    job.reasoning = not (body.thinking is not None and body.thinking.display == "omitted")
    return job


def _thought(body: CountBody, refusals: Refusals) -> dict[str, Any]:
    asked, effort = body.thinking, body.output_config.effort if body.output_config else None
    if asked is None or asked.type == "disabled":
        return {}
    if asked.type == "between_tools":
        refusals.refuse("thinking.type", asked.type, "a thought comes before an answer")
        return {}
    if asked.type == "enabled" and asked.budget_tokens is None:
        raise _FieldError("thinking.budget_tokens", "thinking.budget_tokens is missing", "give a number of tokens")
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": asked.budget_tokens}
    return thinking if asked.budget_tokens else {**thinking, "reasoning_effort": effort}


def _choice(choice: dict[str, Any] | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type")
    if kind == "tool":
        named: Any = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in ("auto", "any", "none"):
        named = "required" if kind == "any" else kind
    else:
        raise _FieldError("tool_choice.type", f"tool_choice.type is {kind!r:.80}", "give auto, any, tool or none")
    serial = choice.get("disable_parallel_tool_use")
    return {"tool_choice": named, "parallel_tool_calls": not serial if isinstance(serial, bool) else None}


def _tools(tools: list[dict[str, Any]] | None, refusals: Refusals) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's shape; those that Anthropic runs, or whose schema only its models know, are refused."""
    made = []
    for number, tool in enumerate(tools or ()):
        if tool.get("type") not in (None, "custom"):
            refusals.refuse(
                f"tools[{number}].type", tool["type"], "this model knows the tools that have an input_schema"
            )
            continue
        about = tool.get("description") or ""
        if tool.get("input_examples"):
            about += "\nExamples: " + as_json(tool["input_examples"])
        function = {"name": tool.get("name"), "description": about, "parameters": tool.get("input_schema")}
        if tool.get("strict") is not None:
            function["strict"] = tool["strict"]
        made.append({"type": "function", "function": function})
    return made or None


def _talk(body: CountBody, refusals: Refusals) -> Talk:
    """The conversation; neighbouring messages of one role are one turn, as Anthropic reads them."""
    talk = Talk(NAMES)
    if body.system:
        talk.add("system", "system", joined_content(_blocks(body.system, "system", {"text"})))
    for number, message in enumerate(body.messages):
        place, role = f"messages[{number}]", message.get("role")
        if role not in ("user", "assistant", "system"):
            raise _FieldError(f"{place}.role", f"{place}.role is {role!r:.80}", "give user, assistant or system")
        if role == "assistant":
            _assistant(talk, place, message.get("content"))
            continue
        blocks = _blocks(message.get("content"), f"{place}.content", USER if role == "user" else {"text"})
        for block in blocks:
            if block["type"] == "tool":
                talk.add(block["place"], "tool", block["content"], tool_call_id=block["id"])
        shown = [block for block in blocks if block["type"] != "tool"]
        if shown and talk.messages and talk.messages[-1]["role"] == role == "user":
            before = talk.messages[-1]["content"]
            shown = [*([{"type": "text", "text": before}] if isinstance(before, str) else before), *shown]
            talk.messages[-1]["content"] = joined_content(shown)
        elif shown:
            talk.add(place, role, joined_content(shown))
    if not body.messages or body.messages[-1].get("role") == "assistant":
        raise _FieldError("messages", "messages do not end with a user's", "end with a user's: an answer begins a turn")
    return talk


USER = {"text", "image", "document", "search_result", "tool_result"}
SHOWN = USER - {"tool_result"} | {"tool_reference"}


def _blocks(content: Any, at: str, kinds: set[str]) -> list[dict[str, Any]]:
    """Content blocks as parts of OpenAI's; results of tools as {"type": "tool", ...}."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise _FieldError(at, f"{at} is {content!r:.80}", "give a text or a list of content blocks")
    return [part for n, block in enumerate(content) for part in _block(block, f"{at}[{n}]", kinds)]


def _block(block: Any, at: str, kinds: set[str]) -> list[dict[str, Any]]:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise _FieldError(f"{at}.type", f"{at}.type is {kind!r:.80}", f"it may be {', '.join(sorted(kinds))}")
    if kind == "text":
        return [{"type": "text", "text": _text(block, "text", at)}]
    if kind == "tool_reference":
        return [{"type": "text", "text": _text(block, "tool_name", at)}]
    if kind == "tool_result":
        inner = _blocks(block.get("content") or "", f"{at}.content", SHOWN)
        if block.get("is_error"):
            inner = [{"type": "text", "text": "Error:"}, *inner]
        return [{"type": "tool", "place": at, "id": _text(block, "tool_use_id", at), "content": joined_content(inner)}]
    if kind == "search_result":
        about = [{"type": "text", "text": f"{_text(block, 'title', at)} ({_text(block, 'source', at)})"}]
        return [*about, *_blocks(block.get("content"), f"{at}.content", {"text"})]
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _address(source, f"{at}.source")}}]
    return _document(block, source, at)


def _document(block: dict[str, Any], source: dict[str, Any], at: str) -> list[dict[str, Any]]:
    about = " ".join(str(block[name]) for name in ("title", "context") if block.get(name))
    head = [{"type": "text", "text": about}] if about else []
    if source.get("type") == "text":
        return [*head, {"type": "text", "text": _text(source, "data", f"{at}.source")}]
    if source.get("type") == "content":
        return [*head, *_blocks(source.get("content"), f"{at}.source.content", {"text", "image"})]
    kind = source.get("type")
    raise _FieldError(f"{at}.source.type", f"{at}.source.type is {kind!r:.80}", "send the document as text or content")


def _address(source: dict[str, Any], at: str) -> str:
    if source.get("type") == "base64":
        return f"data:{_text(source, 'media_type', at)};base64,{_text(source, 'data', at)}"
    if source.get("type") == "url":
        return _text(source, "url", at)
    raise _FieldError(f"{at}.type", f"{at}.type is {source.get('type')!r:.80}", "send the image as base64")


def _text(block: Mapping[str, Any], name: str, at: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _FieldError(f"{at}.{name}", f"{at}.{name} is {value!r:.80}", "give a text")
    return value


def _assistant(talk: Talk, place: str, content: Any) -> None:
    """A turn of the model: its thoughts, its text, its calls."""
    said, thoughts, calls = "", "", []
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for number, block in enumerate(given if isinstance(given, list) else [given]):
        at = f"{place}.content[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            said += _text(block, "text", at)
        elif kind == "thinking":
            thoughts += _text(block, "thinking", at)
        elif kind == "tool_use":
            call = {"name": _text(block, "name", at), "arguments": block.get("input")}
            calls.append({"id": _text(block, "id", at), "type": "function", "function": call})
        elif kind != "redacted_thinking":
            known = "text, thinking, redacted_thinking or tool_use"
            raise _FieldError(f"{at}.type", f"{at}.type is {kind!r:.80}", f"it may be {known}")
    last = talk.messages[-1] if talk.messages else {}
    if last.get("role") == "assistant":
        last["content"] += said
        last["reasoning"] = (last.get("reasoning") or "") + thoughts or None
        last["tool_calls"] = [*(last.get("tool_calls") or []), *calls] or None
    else:
        talk.add(place, "assistant", said, reasoning=thoughts or None, tool_calls=calls or None)
