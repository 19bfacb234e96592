"""Which tools an answer may call, and whether its calls are held to the tools' schemas.

    "auto"        calls or none, as the model likes; those of strict tools follow their schema
    "required"    one call or more, of any tool; also {"type": "function", "function": {"name": ...}}: of this one
    "none"        no call; the tools stay in the prompt

Invariant: where calls are needed, restricted or strict, the answer holds no others, nor arguments of another schema.
Source: OpenAI's chat completions, `tool_choice` and `parallel_tool_calls`.
Run it:  python -m pytest tests/lm/test_turns.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from blockpress.chat.messages import check_tools
from blockpress.config.checks import value_text
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.constrain.turns import Calls, Function

_FORMS = """'auto', 'none', 'required' or {"type": "function", "function": {"name": ...}}"""


@final
@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """may_call: whether a call may begin at all. calls: those that the answer may hold; None: whatever the model likes,
    or no call. all_calls: every call that is allowed, for answers that are held to a constraint otherwise."""

    may_call: bool
    calls: Calls | None
    all_calls: Calls | None


def check_tool_choice(
    tool_choice: Any, parallel_tool_calls: Any, tools: Sequence[Mapping[str, Any]] | None
) -> ToolChoice:
    """What an answer may call.

    Args:
        tool_choice: one of the forms above, or OpenAI's `allowed_tools`; None: "auto".
        parallel_tool_calls: whether there may be several calls; None: yes.
        tools: as given.

    Raises:
        RequestError: a malformed value; a tool that is not offered; a call is needed and there are no tools.
    """
    from blockpress.constrain.turns import Calls

    if not (parallel_tool_calls is None or isinstance(parallel_tool_calls, bool)):
        raise RequestError(
            f"parallel_tool_calls is {value_text(parallel_tool_calls)}",
            hint="parallel_tool_calls must be True, False or None",
        )
    functions, several = _functions(tools), parallel_tool_calls is not False
    mode, names = _mode(tool_choice)
    for name in names or ():
        if name not in [each.name for each in functions]:
            offered = ", ".join(repr(each.name) for each in functions) or "none"
            raise RequestError(f"tool_choice names {name!r}, which is no tool of this call", hint=f"tools: {offered}")
    if mode == "required" and not functions:
        raise RequestError(f"tool_choice is {tool_choice!r:.80} and there are no tools", hint="give tools")
    if mode == "none" or not functions:
        return ToolChoice(may_call=mode != "none", calls=None, all_calls=None)
    chosen = tuple(each for each in functions if names is None or each.name in names)
    calls = Calls(functions=chosen, needed=mode == "required", several=several)
    is_free = mode == "auto" and names is None and several and not any(each.strict for each in chosen)
    return ToolChoice(may_call=True, calls=None if is_free else calls, all_calls=calls)


def _mode(choice: Any) -> tuple[str, tuple[str, ...] | None]:
    """ "auto", "none" or "required", and the only tools that may be called; None: all of them."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return choice, None
    wrong = RequestError(f"tool_choice is {choice!r:.80}", hint=f"it must be {_FORMS}")
    if not isinstance(choice, Mapping):
        raise wrong
    if choice.get("type") == "function":
        return "required", (_name(choice, "tool_choice"),)
    allowed = choice.get("allowed_tools")
    if choice.get("type") != "allowed_tools" or not isinstance(allowed, Mapping):
        raise wrong
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required") or not isinstance(tools, list | tuple) or not tools:
        raise RequestError(
            f"tool_choice.allowed_tools is {allowed!r:.80}",
            hint="it must have a mode, 'auto' or 'required', and the tools that may be called",
        )
    return str(mode), tuple(_name(tool, f"tool_choice.allowed_tools.tools[{i}]") for i, tool in enumerate(tools))


def _name(choice: Any, at: str) -> str:
    """The name of a function, also in the flat form of OpenAI's responses. Raises RequestError."""
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or choice.get("type") != "function":
        raise RequestError(f"{at} is {choice!r:.80}", hint='it must be {"type": "function", "function": {"name": ...}}')
    return name


def _functions(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Function, ...]:
    from blockpress.constrain.turns import Function

    checked = check_tools(tools) or []
    return tuple(
        Function(
            name=tool["function"]["name"],
            parameters=json.dumps(tool["function"]["parameters"]) if "parameters" in tool["function"] else None,
            at=f"tools[{number}].function",
            strict=given["function"].get("strict") is True,
        )
        for number, (tool, given) in enumerate(zip(checked, tools or (), strict=True))
    )
