"""Messages and tools as clients send them, checked and normalised to the form that chat templates read.

    given     {"role": "model", "content": [{"type": "text", "text": "4"}], "tool_calls": [{... "arguments": "{}"}]}
    checked   {"role": "assistant", "content": [...], "tool_calls": [{... "arguments": {}}]}

Why: a template is a program that fails with its own message, or silently renders something else, when a field is not
what it expects. So every field is checked here first, and an error names it.

Invariant: the result is plain JSON in OpenAI's chat shape. Every given field is in it, was refused, or has no meaning
here (docs/messages.md lists them all). Every call has an id that no other call of its message has, and one result,
which has that id and the tool's name. Sources of images and videos are taken out, in order, and replaced by parts
without a source.

Run: python -m pytest tests/chat/test_messages.py
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from blockpress.chat.tool_calls import MAX_DEPTH
from blockpress.errors import RequestError

__all__ = ["Media", "check_messages", "check_tools"]

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
_THOUGHTS = ("thinking", "reasoning", "reasoning_content")
_FIELDS = {
    "assistant": {"role", "content", "tool_calls", *_THOUGHTS, "annotations", "parsed"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
_UNREAD: dict[str, tuple[Callable[[Any], bool], str]] = {
    "annotations": (lambda value: isinstance(value, list | tuple), "a list"),
    "detail": (lambda value: value == "auto", "'auto': `soft_tokens` sets the detail of all images"),
    "prompt_cache_breakpoint": (lambda value: isinstance(value, Mapping), "an object"),
    "strict": (lambda value: isinstance(value, bool), "True or False"),
}
"""Fields that clients send and that have no meaning here: which values they may have, and that in words."""

_TOOL_NAME = re.compile(r"[\w.:-]{1,128}")
_CALLED_NAME = re.compile(r"(?!\s)[^{]+(?<!\s)")
_MEDIA = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@final
@dataclass(frozen=True)
class Media:
    """An image or a video of a message: its source as given, and the name of its field."""

    kind: Literal["image", "video"]
    source: Any
    field: str


def check_messages(messages: Any) -> tuple[list[dict[str, Any]], list[Media]]:
    """The messages as templates read them, and their images and videos, in the order of the text.

    Roles: system, developer, user, assistant (or model), tool. Content: text, or a list of parts: {"type": "text",
    "text": ...}, {"type": "image", "image": ...}, {"type": "image_url", "image_url": {"url": ...}}, {"type": "video",
    "video": ...}; images and videos in a user's message and in a tool's. An assistant's `tool_calls` have OpenAI's
    shape, their arguments an object or its JSON text; its reasoning is `thinking`, `reasoning` or `reasoning_content`.
    After it come the results of its calls, one of each, in messages of role tool: each has the call's id as
    `tool_call_id`, or the tool's `name`, and then answers the first call of that tool that has no result yet. A result
    may also be an object, which becomes its JSON text, or null. The last message's calls may wait for their results.

    Raises RequestError, which names the first field that is wrong, as in messages[2].content[0].type.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise _wrong("messages", messages, 'a list of messages such as {"role": "user", "content": "Hello"}')
    checked: list[dict[str, Any]] = []
    media: list[Media] = []
    open_calls: dict[str, dict[str, Any]] = {}
    for number, message in enumerate(messages):
        checked.append(_message(message, f"messages[{number}]", open_calls, media))
    if checked[-1]["role"] == "tool":
        _all_answered(open_calls)
    return checked, media


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's shape, each {"type": "function", "function": {"name", "description", "parameters"}}.

    None or an empty list gives None. Raises RequestError, which names the first field that is wrong.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise _wrong("tools", tools, "a list of tools")
    checked = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise _wrong(f"tools[{number}].function.name", name, "a name that no other tool has")
    return checked or None


def _message(message: Any, at: str, open_calls: dict[str, dict[str, Any]], media: list[Media]) -> dict[str, Any]:
    """`open_calls`: the calls that have no result yet, by their fields; the message may add to them or answer one."""
    _object(message, at)
    role = message.get("role")
    if role not in ROLES:
        raise _wrong(f"{at}.role", role, f"one of {', '.join(ROLES)}")
    role = "assistant" if role == "model" else role
    _only(message, at, _FIELDS.get(role, {"role", "content"}))
    if role == "tool":
        return _response(message, at, open_calls, media)
    _all_answered(open_calls)
    if role == "assistant":
        checked = _assistant(message, at)
        open_calls |= {f"{at}.tool_calls[{n}]": call for n, call in enumerate(checked.get("tool_calls", ()))}
        return checked
    return {
        "role": role,
        "content": _content(message.get("content"), f"{at}.content", media if role == "user" else None),
    }


def _assistant(message: Mapping[str, Any], at: str) -> dict[str, Any]:
    checked: dict[str, Any] = {"role": "assistant"}
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None and (isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Sequence)):
        raise _wrong(f"{at}.tool_calls", calls, "a list of calls")
    thoughts = [(name, message[name]) for name in _THOUGHTS if message.get(name) is not None]
    for name, thought in thoughts:
        if not isinstance(thought, str) or thought != thoughts[0][1]:
            raise _wrong(f"{at}.{name}", thought, "the thought's text, the same under every name that it is given")
    if content is None and not calls and not thoughts:
        raise _wrong(f"{at}.content", content, "text, since the message has no tool_calls")
    checked["content"] = "" if content is None or content == [] else _content(content, f"{at}.content", None)
    if thoughts:
        # Templates differ in the name that they read.
        checked |= dict.fromkeys(("reasoning", "reasoning_content"), thoughts[0][1])
    if calls:
        checked["tool_calls"] = [_call(call, f"{at}.tool_calls[{number}]") for number, call in enumerate(calls)]
        _identify(checked["tool_calls"], f"{at}.tool_calls")
    return checked


def _identify(calls: list[dict[str, Any]], at: str) -> None:
    """Give an id to every call that has none: templates look up a result's tool by it."""
    given = [call["id"] for call in calls if "id" in call]
    for number, call in enumerate(calls):
        if given.count(call.get("id")) > 1:
            raise _wrong(f"{at}[{number}].id", call["id"], "an id that no other call of the message has")
    fresh = (name for name in map("call_{}".format, itertools.count()) if name not in given)
    for call in calls:
        if "id" not in call:
            call["id"] = next(fresh)


def _call(call: Any, at: str) -> dict[str, Any]:
    _object(call, at)
    _only(call, at, {"id", "type", "function", "index"})
    if (call.get("type") or "function") != "function":
        raise _wrong(f"{at}.type", call["type"], "'function'")
    _object(call.get("function"), f"{at}.function")
    _only(call["function"], f"{at}.function", {"name", "arguments", "parsed_arguments"})
    name, arguments = call["function"].get("name"), call["function"].get("arguments")
    # Whatever the model called is taken back, also where no tool is named so.
    if not isinstance(name, str) or not _CALLED_NAME.fullmatch(name):
        raise _wrong(f"{at}.function.name", name, "the tool's name, without '{' and without blanks around it")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise _wrong(f"{at}.function.arguments", arguments, "a JSON object, or its text") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise _wrong(f"{at}.function.arguments", arguments, "a JSON object, or its text")
    checked: dict[str, Any] = {"type": "function"}
    if call.get("id") not in (None, ""):
        if not isinstance(call["id"], str):
            raise _wrong(f"{at}.id", call["id"], "text")
        checked["id"] = call["id"]
    checked["function"] = {"name": name, "arguments": _json(arguments, f"{at}.function.arguments")}
    return checked


def _response(
    message: Mapping[str, Any], at: str, open_calls: dict[str, dict[str, Any]], media: list[Media]
) -> dict[str, Any]:
    call = open_calls.pop(_answered(message, at, open_calls))
    content = message.get("content")
    if isinstance(content, bool | int | float) or "content" not in message:
        what = "the tool's result: text, a list of parts, an object, or null; send any other JSON as its text"
        raise _wrong(f"{at}.content", content, what)
    if isinstance(content, Mapping):
        # To a template an object is a sequence of its keys.
        content = json.dumps(_json(content, f"{at}.content"), ensure_ascii=False)
    elif content is not None:
        content = _content(content, f"{at}.content", media) if content != [] else ""
    return {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": content}


def _answered(message: Mapping[str, Any], at: str, open_calls: dict[str, dict[str, Any]]) -> str:
    """Where the call is that this result answers."""
    if not open_calls:
        raise _wrong(f"{at}.role", "tool", "in a message after an assistant's with tool_calls, one for each call")
    names = {where: call["function"]["name"] for where, call in open_calls.items()}
    call_id, name = (message.get(field) or None for field in ("tool_call_id", "name"))
    if call_id is not None:
        found = next((where for where, call in open_calls.items() if call["id"] == call_id), None)
        if found is None:
            waiting = [call["id"] for call in open_calls.values()]
            raise _wrong(f"{at}.tool_call_id", call_id, f"the id of a call that has no result yet: {waiting}")
        if name is not None and name != names[found]:
            raise _wrong(f"{at}.name", name, f"{names[found]!r}, the tool of call {call_id!r}, or left out")
        return found
    named = [where for where in names if names[where] == name] if name is not None or len(names) > 1 else list(names)
    if not named:
        raise _wrong(f"{at}.name", name, f"a tool whose call has no result yet: {list(names.values())}")
    return named[0]


def _all_answered(open_calls: dict[str, dict[str, Any]]) -> None:
    for where, call in open_calls.items():
        raise RequestError(
            f"{where} calls {call['function']['name']!r:.60}, and no result of it comes next",
            hint="after a message with tool_calls comes a message of role tool for each of them",
        )


def _content(content: Any, at: str, media: list[Media] | None) -> str | list[dict[str, Any]]:
    """Text, or parts; images and videos are appended to `media`, None where none are allowed."""
    if isinstance(content, str):
        return str(content)
    if isinstance(content, bytes | Mapping) or not isinstance(content, Sequence) or not content:
        raise _wrong(at, content, "text, or a list of parts")
    return [_part(part, f"{at}[{number}]", media) for number, part in enumerate(content)]


def _part(part: Any, at: str, media: list[Media] | None) -> dict[str, Any]:
    _object(part, at)
    kind = part.get("type")
    if kind == "text":
        _only(part, at, {"type", "text", "prompt_cache_breakpoint"})
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{at}.text", part.get("text"), "text")
        return {"type": "text", "text": str(part["text"])}
    if not isinstance(kind, str) or kind not in _MEDIA:
        raise _wrong(f"{at}.type", kind, f"one of text, {', '.join(_MEDIA)}")
    if media is None:
        raise _wrong(f"{at}.type", kind, "'text': only a user or a tool shows something")
    _only(part, at, {"type", kind, "prompt_cache_breakpoint"})
    source = part.get(kind)
    if kind.endswith("_url"):
        if isinstance(source, Mapping):
            _only(source, f"{at}.{kind}", {"url", "detail"})
            source = source.get("url")
        if not isinstance(source, str) or not source:
            raise _wrong(f"{at}.{kind}", part.get(kind), 'an address, as {"url": "..."}')
    if source is None:
        raise _wrong(f"{at}.{kind}", source, f"the {_MEDIA[kind]}")
    media.append(Media(_MEDIA[kind], source, at))  # type: ignore[arg-type]
    return {"type": _MEDIA[kind]}


def _tool(tool: Any, at: str) -> dict[str, Any]:
    _object(tool, at)
    _only(tool, at, {"type", "function"})
    if tool.get("type") != "function":
        raise _wrong(f"{at}.type", tool.get("type"), "'function'")
    function, at = tool.get("function"), f"{at}.function"
    _object(function, at)
    _only(function, at, {"name", "description", "parameters", "strict"})
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise _wrong(f"{at}.name", name, "1 to 128 letters, digits, or any of _ . : -")
    description, parameters = function.get("description"), function.get("parameters")
    if description is not None and not isinstance(description, str):
        raise _wrong(f"{at}.description", description, "text")
    checked: dict[str, Any] = {"name": function["name"], "description": description or ""}
    if parameters is not None:
        _object(parameters, f"{at}.parameters")
        kind = parameters.get("type") or "object"
        if kind != "object" and not (isinstance(kind, list | tuple) and "object" in kind):
            raise _wrong(f"{at}.parameters.type", kind, "'object'")
        if parameters:
            checked["parameters"] = {**_json(parameters, f"{at}.parameters"), "type": "object"}
    return {"type": "function", "function": checked}


def _json(value: Any, at: str, depth: int = 1) -> Any:
    """`value` rebuilt from plain JSON types."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping | list | tuple) and depth > MAX_DEPTH:
        raise RequestError(f"{at:.60} is nested deeper than {MAX_DEPTH}", hint="use fewer objects inside each other")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _wrong(f"{at} key", key, "text")
        return {str(key): _json(entry, f"{at}.{key}", depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry, f"{at}[{number}]", depth + 1) for number, entry in enumerate(value)]
    raise _wrong(at, value, "a JSON value")


def _object(value: Any, at: str) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(at, value, "an object")


def _only(value: Mapping[str, Any], at: str, known: set[str]) -> None:
    for name in value:
        fits, what = _UNREAD.get(name, (None, ""))
        if name in known and fits is not None and value[name] is not None and not fits(value[name]):
            raise _wrong(f"{at}.{name}", value[name], what)
        if name not in known and value[name] is not None:
            raise RequestError(
                f"{at}.{name} is {value[name]!r:.60}, and nothing reads it here",
                hint=f"leave it out; the fields are {', '.join(sorted(known))}",
            )


def _wrong(field: str, value: Any, what: str) -> RequestError:
    return RequestError(f"{field} is {value!r:.60}", hint=f"it must be {what}")
