"""Messages to the text format that the model was trained on, by the Jinja template that its checkpoint ships.

Why: every checkpoint has its own markup for turns, tools and reasoning, and ships it as a template. A template is
untrusted code, so it runs in a sandbox.

Invariant: a template gets plain data and returns text or raises a TextError; it never reaches Python's objects, files
or the caller's messages. Bounded are the output (16 Mi characters), processor time (30 seconds) and memory: see
`sandbox.py`, which also makes the look-ahead of the published template linear.

Run: python -m pytest tests/chat/test_template.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any, final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser

from blockpress.chat.sandbox import MAX_OUTPUT, Sandbox, fresh_budget
from blockpress.errors import TextError
from blockpress.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate"]

_QUESTION = {"role": "user", "content": "?"}


@final
class ChatTemplate:
    """A compiled chat template, rendered as by `transformers`: same filters, functions, blocks and whitespace."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens`: available to the template by name, such as `bos_token`. `clock`: read by `strftime_now`.

        Raises TextError with line and message if the source is not valid Jinja.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._taken: dict[tuple[str, str], bool] = {}
        environment = _environment(clock)
        self._reserved = frozenset(environment.globals)
        try:
            with fresh_budget():
                self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TextError(
                f"the chat template is not valid Jinja, line {error.lineno}: {error.message}",
                hint="correct the template",
            ) from error
        # Jinja folds constants while compiling, which can raise anything.
        except Exception as error:
            raise _failure(error) from error

    @classmethod
    def own(cls, **names: Any) -> ChatTemplate:
        """The template of our own models, with Gemma's control tokens; `names` as for the constructor."""
        return cls((files(__package__) / "template.jinja").read_text(encoding="utf-8"), **names)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of the tokenizer's checkpoint with its special tokens, or None. Errors as the constructor."""
        if tokenizer.chat_template is None:
            return None
        return cls(tokenizer.chat_template, special_tokens=tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        bos_token: str | None = None,
        **extra: Any,
    ) -> str:
        """The prompt's text for these messages.

        `bos_token` replaces the tokenizer's own; it is "" if neither exists. `extra` are further variables for the
        template, such as `enable_thinking=True`. Values that are not JSON (images, arrays) are passed to the template
        as text like `<Image>`.

        Raises TextError with the template's own message if it refuses the messages, fails, writes too much or violates
        its sandbox.
        """
        reserved = sorted(self._reserved & extra.keys())
        if reserved:
            raise TextError(
                f"{reserved[0]!r} is a function of chat templates", hint="pass the value under another name"
            )
        names = {"documents": None, "bos_token": "", **self._special_tokens, **extra}
        names |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        if bos_token is not None:
            names["bos_token"] = bos_token
        try:
            return self._write({name: _plain(value) for name, value in names.items()})
        except TextError:
            raise
        # The template is a program: whatever it raises is reported as its failure.
        except Exception as error:
            raise _failure(error) from error

    def takes(self, role: str, content: list[dict[str, Any]] | None, shown: str) -> bool:
        """Whether a message of this role may have such content: it is written as `shown`, not as Python prints it."""
        asked = (role, shown)
        if asked not in self._taken:
            call = {"id": "x", "type": "function", "function": {"name": "x", "arguments": {}}}
            message = {"role": role, "content": content}
            talk: dict[str, list[dict[str, Any]]] = {
                "assistant": [_QUESTION, message, _QUESTION],
                "tool": [
                    _QUESTION,
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {**message, "tool_call_id": "x", "name": "x"},
                ],
                "user": [message],
            }
            try:
                text = self.render(talk.get(role, [message, _QUESTION]))
                self._taken[asked] = shown in text and "{'type'" not in text
            except TextError:
                self._taken[asked] = False
        return self._taken[asked]

    def generation_prompt(self, **extra: Any) -> str:
        """What it writes after a user's message for the model to continue; "" if that is nothing."""
        without = self.render([_QUESTION], add_generation_prompt=False, **extra)
        return self.render([_QUESTION], **extra).removeprefix(without)

    def _write(self, names: dict[str, Any]) -> str:
        size = 0
        parts: list[str] = []
        with fresh_budget():
            for part in self._template.generate(**names):
                size += len(part)
                if size > MAX_OUTPUT:
                    raise TextError(
                        f"the chat template wrote more than {MAX_OUTPUT} characters",
                        hint="shorten the messages or correct the template",
                    )
                parts.append(part)
        return "".join(parts)


class _Refusal(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _GenerationBlock(Extension):
    """`{% generation %}` to `{% endgeneration %}` marks the model's text for training; here it is passed through."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace` without underscore names, which would overwrite the object's own attributes."""

    def __init__(*args: Any, **names: Any) -> None:
        for name in dict(*args[1:], **names):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name that begins with an underscore, such as {name!r}")


def _environment(clock: Callable[[], datetime]) -> Sandbox:
    def raise_exception(message: object) -> None:
        raise _Refusal(str(message))

    def strftime_now(form: str) -> str:
        return clock().strftime(form)

    # Jinja's own filter escapes HTML, and prompts are not HTML.
    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(
        filters={"tojson": tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    # It generates random filler text of any length, which no prompt needs.
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": _Namespace}
    return environment


def _plain(value: Any) -> Any:
    """`value` rebuilt from plain JSON types: the sandbox does not know the methods of other objects."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            # A subclass may define its own __str__ or __int__, so the base type's is called.
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(entry) for entry in value]
    return f"<{type(value).__name__}>"


def _failure(error: Exception) -> TextError:
    if isinstance(error, _Refusal):
        return TextError(f"the chat template refuses these messages: {error}", hint="change the messages as it says")
    if isinstance(error, SecurityError):
        return TextError(f"the chat template does what its sandbox forbids: {error}", hint="use another template")
    name = type(error).__name__
    return TextError(
        f"the chat template failed with {name}: {error}",
        hint="check the messages' fields against the template, or correct it",
    )
