"""What a decision's body is about: texts, JSON, and the items of a conversation, as messages for a chat template.

    input_text, output_text, refusal, input_json     text (JSON as its text)
    input_image                                      an image
    function_call, custom_tool_call                  a call in an assistant's message; a custom one's input is `input`
    ..._output                                       a message of role tool

Invariant: no content is lost, and what cannot be shown is refused by its path.
Run it:  python -m pytest tests/decide/test_wire.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from blockpress.config.checks import value_text
from blockpress.errors import RequestError

_ROLES = ("user", "developer", "system", "assistant")
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_IDENTITY = {"type", "id", "namespace", "status"}


def need(ok: bool, path: str, value: object, what: str) -> None:
    """Raises RequestError unless `ok`: `path` must be `what`."""
    if not ok:
        raise RequestError(f"{path} is {value_text(value)}", hint=f"{path} must be {what}")


def no_other_fields(value: Mapping[str, Any], path: str, known: Set[str]) -> None:
    """Raises RequestError: a field that is not `known`."""
    for name in value:
        if name not in known:
            where = f"{path}.{name}" if path else str(name)
            raise RequestError(
                f"{where:.120} is not known here", hint=f"leave it out; the fields are {', '.join(sorted(known))}"
            )


def text_or_json(value: Any, path: str, *, parts: bool = False) -> str:
    """A text as it is, JSON as its text; with `parts`, a list is of OpenAI's parts, which are joined."""
    if parts and isinstance(value, list):
        need(bool(value), path, value, "text, or a list of parts")
        shown = [_part(part, f"{path}[{number}]", {"input_text", "input_json"}) for number, part in enumerate(value)]
        return "\n".join(part["text"] for part in shown)
    if isinstance(value, str):
        need(bool(value.strip()), path, value, "a text of at least one character")
        return value
    need(isinstance(value, Mapping) or (isinstance(value, list) and not parts), path, value, "a text, or JSON")
    need(bool(value), path, value, "a text, or JSON that holds something")
    return _json_text(value, path)


def as_messages(items: Any, path: str) -> list[dict[str, Any]]:
    """OpenAI's input items as messages (`chat.messages.check_messages`); adjacent calls share one message."""
    need(isinstance(items, list) and bool(items), path, items, "a text, or a list of messages")
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        at = f"{path}[{number}]"
        need(isinstance(item, Mapping), at, item, "an object")
        kind = str(item.get("type", "message"))
        if kind == "message":
            messages.append(_message(item, at))
        elif kind in _CALLS:
            call = _call(item, at, _CALLS[kind])
            if messages and messages[-1].get("tool_calls") and "content" not in messages[-1]:
                messages[-1]["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "tool_calls": [call]})
        else:
            need(
                kind in [f"{call}_output" for call in _CALLS],
                f"{at}.type",
                item.get("type"),
                "message, a call or its output",
            )
            no_other_fields(item, at, {*_IDENTITY, "call_id", "output"})
            content = _content(item.get("output"), f"{at}.output", {"input_text", "input_image"})
            messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", at), "content": content})
    return messages


def _message(item: Mapping[str, Any], at: str) -> dict[str, Any]:
    role = str(item.get("role"))
    need(role in _ROLES, f"{at}.role", item.get("role"), f"one of {', '.join(_ROLES)}")
    no_other_fields(item, at, {"type", "role", "content", *({"phase"} if role == "assistant" else ())})
    kinds = {"user": {"input_text", "input_image", "input_json"}, "assistant": {"output_text", "refusal"}}
    return {"role": role, "content": _content(item.get("content"), f"{at}.content", kinds.get(role, {"input_text"}))}


def _call(item: Mapping[str, Any], at: str, field: str) -> dict[str, Any]:
    no_other_fields(item, at, {*_IDENTITY, "call_id", "name", field})
    given, name = item.get(field), _text(item, "name", at)
    need(isinstance(given, str), f"{at}.{field}", given, "text")
    arguments = given if field == "arguments" else json.dumps({"input": given}, ensure_ascii=False)
    return {"id": _text(item, "call_id", at), "type": "function", "function": {"name": name, "arguments": arguments}}


def _content(content: Any, at: str, kinds: Set[str]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    need(isinstance(content, list) and bool(content), at, content, "text, or a list of parts")
    return [_part(part, f"{at}[{number}]", kinds) for number, part in enumerate(content)]


def _part(part: Any, at: str, kinds: Set[str]) -> dict[str, Any]:
    need(isinstance(part, Mapping), at, part, "an object")
    kind = str(part.get("type"))
    need(kind in kinds, f"{at}.type", part.get("type"), f"one of {', '.join(sorted(kinds))}")
    if kind == "input_image":
        no_other_fields(part, at, {"type", "image_url", "detail", "prompt_cache_breakpoint"})
        need(part.get("detail") in (None, "auto"), f"{at}.detail", part.get("detail"), "'auto'")
        return {"type": "image_url", "image_url": {"url": _text(part, "image_url", at)}}
    field = {"input_json": "data", "refusal": "refusal"}.get(kind, "text")
    no_other_fields(part, at, {"type", field, *({"prompt_cache_breakpoint"} if kind == "input_text" else ())})
    if kind == "input_json":
        need(isinstance(part.get("data"), Mapping | list), f"{at}.data", part.get("data"), "an object, or a list")
        return {"type": "text", "text": _json_text(part["data"], f"{at}.data")}
    need(isinstance(part.get(field), str), f"{at}.{field}", part.get(field), "text")
    return {"type": "text", "text": str(part[field])}


def _text(value: Mapping[str, Any], field: str, at: str) -> str:
    given = value.get(field)
    need(isinstance(given, str) and bool(given), f"{at}.{field}", given, "text")
    return str(given)


def _json_text(value: Any, at: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{at} is {value_text(value)}: {error}", hint="give what JSON can represent") from None
