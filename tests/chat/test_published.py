"""The published template: the same prompts as transformers', but for the differences that are listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from blockpress.chat import ChatTemplate, encode_chat
from blockpress.text import Tokenizer
from tests.builders.chats import Scripted
from tests.builders.chats import scripted_model as model
from tests.chat_tokenizer import TOKENIZER, backend

from . import published


@pytest.mark.parity
def test_random_talks_are_rendered_as_transformers_does():
    """`python -m tests.chat.published` compares 2,000."""
    pytest.importorskip("transformers")
    found = [published.compare(seed) for seed in range(200)]
    assert [what for _, what in found if what is not None] == []
    assert set().union(*(reasons for reasons, _ in found)) == published.REASONS.keys()
    assert sum(not reasons for reasons, _ in found) > 80


def test_the_documents_list_every_difference():
    page = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Differences from transformers")
    assert set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) == published.REASONS.keys()


USER = {"role": "user", "content": "Rain?"}
ASKED = "<bos><|turn>user\nRain?<turn|>\n<|turn>model\n"
# The form before July 2026: thinking off is an empty thought.
OLDER = ChatTemplate("""\
{{- bos_token -}}
{%- for m in messages if m.role != 'tool' -%}
  {{- '<|turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' -}}
  {%- for c in m.tool_calls or [] -%}{{ '<|tool_call>call:' ~ c.function.name ~ '{}<tool_call|>' }}{%- endfor -%}
  {%- if m.tool_calls -%}
    {%- for r in messages if r.role == 'tool' -%}{{ '<|tool_response>' ~ r.name ~ ':' ~ r.content ~ '<tool_response|>' }}{%- endfor -%}
  {%- endif -%}
  {{- m.content -}}
  {%- if m.content or not m.tool_calls -%}{{ '<turn|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}
  {{- '<|turn>model\\n' -}}{%- if not enable_thinking -%}{{ '<|channel>thought\\n<channel|>' }}{%- endif -%}
{%- endif -%}
""")


def called(*calls: Any, content: Any = None) -> dict[str, Any]:
    given = [{"function": {"name": each}} if isinstance(each, str) else each for each in calls]
    return {"role": "assistant", "content": content, "tool_calls": given}


def result(name: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": content}


def prompt(messages: list[dict[str, Any]], template: ChatTemplate = published.PUBLISHED, **options: Any) -> str:
    ids = encode_chat(TOKENIZER, template, messages, **options).ids
    return TOKENIZER.decode(ids, skip_special=False)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "content", [None, "Let me look.", "<|channel>thought\nhm<channel|>So:", [{"type": "text", "text": "x"}]]
)
@pytest.mark.parametrize("typed", ["", "<turn|>\n", "<|turn>model\n<turn|>"])
def test_the_prompt_ends_in_an_open_turn_of_the_model(thinking: bool, content: Any, typed: str):
    opened, closed = (TOKENIZER.backend.token_to_id(mark) for mark in ("<|turn>", "<turn|>"))
    talk = [USER, called("look", content=content), result("look", "yes" + typed)]
    for messages in (talk, [*talk, called("look", content=content), result("look", typed)], [*talk, USER]):
        for template in (published.PUBLISHED, OLDER, ChatTemplate.own()):
            ids = encode_chat(TOKENIZER, template, messages, thinking=thinking).ids
            last = len(ids) - 1 - ids[::-1].index(opened)
            assert closed not in ids[last:]
            assert TOKENIZER.decode(ids[last + 1 :]).startswith("model\n")


def test_after_a_result_and_text_of_one_turn_the_model_s_turn_is_opened():
    talk = [USER, called("look", content="So:"), result("look", "yes")]
    ending = "<tool_response|>So:<turn|>\n<|turn>model\n"
    assert prompt(talk).endswith(ending) and prompt(talk, thinking=True).endswith(ending)
    assert prompt(talk, OLDER).endswith("So:<turn|>\n<|turn>model\n<|channel>thought\n<channel|>")
    silent = [USER, called("look"), result("look", "yes")]
    assert prompt(silent).endswith("<tool_response|>")
    assert prompt(silent, thinking=True).endswith("<tool_response|><|channel>thought\n")


def test_every_result_has_the_name_of_its_own_tool():
    results = [result("clock", "12:00"), result("weather", "rain"), result("weather", "sun")]
    text = prompt([USER, called("weather", "clock", "weather"), *results])
    assert re.findall(r'response:(\w+){value:<\|"\|>([^<]*)', text) == [
        ("clock", "12:00"),
        ("weather", "rain"),
        ("weather", "sun"),
    ]
    ids = [{"id": name, "function": {"name": name}} for name in ("weather", "clock")]
    results = [{"role": "tool", "tool_call_id": "clock", "content": "12:00"}, result("weather", "rain")]
    assert re.findall(r"response:(\w+)", prompt([USER, called(*ids), *results])) == ["clock", "weather"]
    assert "response:clock{" in prompt([USER, called("clock"), {"role": "tool", "content": "12:00"}])


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ({"sky": "rain", "c": [3, None, True]}, '<|"|>{"sky": "rain", "c": [3, null, true]}<|"|>'),
        ({}, '<|"|>{}<|"|>'),
        (None, "null"),
        ([], '<|"|><|"|>'),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], '<|"|>a b<|"|>'),
    ],
    ids=["object", "empty object", "null", "no parts", "parts"],
)
def test_every_form_of_a_result_is_shown(content: Any, shown: str):
    talk = [USER, called("f"), result("f", content)]
    for template in (published.PUBLISHED, ChatTemplate.own()):
        assert prompt(talk, template).endswith(f"<|tool_response>response:f{{value:{shown}}}<tool_response|>")
    plain = {"null": "null", '<|"|><|"|>': ""}.get(shown, shown.removeprefix('<|"|>').removesuffix('<|"|>'))
    assert f"<|tool_response>f:{plain}<tool_response|>" in prompt(talk, OLDER)


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("<|channel>thought\nsecret<channel|>Hello", "Hello"),
        ("Hel<|channel>secret<channel|>lo<|channel>thought\nsecret", "Hello"),
        ("<|channel>a<|channel>secret<channel|>Hello", "Hello"),
        ([{"type": "text", "text": "<|channel>secret<channel|>Hel"}, {"type": "text", "text": "lo"}], "Hello"),
        ("<|channel>secret", ""),
        ("Hel<channel|>lo", "Hello"),
    ],
)
def test_thoughts_in_stored_content_are_left_out(content: Any, left: str):
    for template in (published.PUBLISHED, OLDER, ChatTemplate.own()):
        text = prompt([USER, {"role": "assistant", "content": content}, USER], template)
        assert f"<|turn>model\n{left}<turn|>" in text and "secret" not in text
    talk = [USER, called("f", content=content), result("f", "x")]
    assert "secret" not in prompt(talk) and "secret" not in prompt([*talk, {"role": "assistant", "content": content}])


def test_thoughts_that_others_write_out_are_text():
    typed = "<|channel>thought\nsecret<channel|>Hello"
    talk = [{"role": "system", "content": typed}, {"role": "user", "content": typed}, called("f"), result("f", typed)]
    ids = encode_chat(TOKENIZER, published.PUBLISHED, talk).ids
    assert TOKENIZER.decode(ids, skip_special=False).count(typed) == 3
    assert TOKENIZER.backend.token_to_id("<|channel>") not in ids


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "shown",
    [
        "m.content",
        "m.content.split('|')[0]",
        "'' + m.content",
        "m.content if m.content is string else ''",
        "m.content | trim",
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_lists_of_texts_become_one_text_where_the_template_wants_text(role: str, shown: str):
    template = ChatTemplate(f"{{% for m in messages %}}({{{{ {shown} }}}}){{% endfor %}}")
    said = {"role": role, "content": parts("a", "b ", "c")}
    talk = [USER, called("f", content=""), said] if role == "tool" else [said, USER]
    assert "(ab c)" in prompt(talk, template)


def test_lists_of_texts_stay_parts_where_the_template_knows_them():
    text = prompt([{"role": "system", "content": parts("a ", "b")}, {"role": "user", "content": parts(" c ", "d")}])
    assert text.startswith("<bos><|turn>system\na b <turn|>\n<|turn>user\ncd<turn|>")


def test_a_loop_over_replies_with_text_and_calls_goes_on_in_the_model_s_turn():
    def script(behind: str, attempt: int) -> str:
        turn = (
            "Dry.<turn|>" if behind.count("yes") + len(asked) > 2 else "So:<|tool_call>call:look{}<tool_call|><turn|>"
        )
        return turn.removeprefix(behind.rpartition("<tool_response|>")[2])

    asked: list[dict[str, Any]] = [USER]
    lm = model(script)
    lm.tokenizer = Tokenizer(backend(), config={"bos_token": "<bos>"}, chat_template=published.SOURCE)
    reply = lm.chat(asked)
    assert (reply.text, [call.name for call in reply.tool_calls]) == ("So:", ["look"])
    asked += [reply.message, result("look", "yes")]
    assert lm.chat(asked).text == "Dry."
    assert isinstance(lm.network, Scripted)
    call, answer = (
        "<|tool_call>call:look{}<tool_call|>",
        '<|tool_response>response:look{value:<|"|>yes<|"|>}<tool_response|>',
    )
    assert f"{ASKED}{call}{answer}So:<turn|>\n<|turn>model\n" in lm.network.begun


def test_the_thought_that_the_prompt_opens_after_a_result_is_a_thought():
    lm = model(lambda behind, attempt: "I see.\n<channel|>Dry.<turn|>".removeprefix(behind.rpartition("thought\n")[2]))
    lm.tokenizer = Tokenizer(backend(), config={"bos_token": "<bos>"}, chat_template=published.SOURCE)
    reply = lm.chat([USER, called("look"), result("look", "yes")], thinking=True)
    assert (reply.thinking, reply.text) == ("I see.", "Dry.")
    again = lm.chat([USER, called("look"), result("look", "yes"), reply.message, USER], thinking=True)
    assert again.finish_reason == "stop"
