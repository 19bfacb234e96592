"""Chat templates: the same text as transformers gives, and no way out of the sandbox."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from blockpress.chat import ChatTemplate
from blockpress.chat.template import MAX_OUTPUT
from blockpress.errors import TextError
from blockpress.text import Tokenizer
from blockpress.text.builder import digits_tokenizer

TURNS = """{{ bos_token }}
{%- for message in messages -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<|turn>' + role + '\n' + message.content | trim + '<turn|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\n' -}}
    {%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""
CHAT = [{"role": "user", "content": " Hallo <b> & 'Grüße' "}, {"role": "assistant", "content": "ja"}]


def render(source: str, **names: Any) -> str:
    return ChatTemplate(source).render(names.pop("messages", CHAT), **names)


def test_templates_render_turns():
    expected = "<bos><|turn>user\nHallo <b> & 'Grüße'<turn|>\n<|turn>model\nja<turn|>\n"
    template = ChatTemplate(TURNS)
    assert template.render(CHAT, bos_token="<bos>", add_generation_prompt=False) == expected
    assert template.render(CHAT, bos_token="<bos>") == expected + "<|turn>model\n<|channel>thought\n<channel|>"
    assert template.render(CHAT, bos_token="<bos>", enable_thinking=True) == expected + "<|turn>model\n"


def test_the_tokenizer_gives_the_template_its_special_tokens():
    backend = digits_tokenizer()
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    template = ChatTemplate.of(Tokenizer(backend, config=config, chat_template="{{ bos_token }}{{ eos_token }}"))
    assert template is not None
    assert (template.render([]), template.render([], bos_token="!")) == ("<bos><eos>", "!<eos>")
    assert ChatTemplate.of(Tokenizer(digits_tokenizer())) is None


ORACLE = {
    "turns": TURNS,
    "tools": "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{{ t | tojson(indent=2) }}{% endfor %}{% endif %}",
    "documents": "{{ documents }}{{ documents is none }}",
    "generation": "{% for m in messages %}{% set x = 1 %}{% generation %}{% set x = 2 %}{{ m.content }}{{ x }}\n"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% break %}{% endfor %}",
    "blanks": "  {% if true %}\n  a\n  {% endif %}\n\n   {# note #}\n b\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "undefined": "[{{ nothing }}][{{ messages[0].nothing }}][{{ messages[9] }}]{% if nothing is defined %}x{% endif %}",
    "macro": "{% macro f(a, b=2) %}{{ a * b }}{% endmacro %}{{ f(3) }}{{ f('ab') }}{{ f([1]) }}",
    "methods": "{{ messages[0].content.strip().split(' ')[0].upper() }}{{ messages[0].items() | list }}{{ dict(a=1) }}",
    "escapes": "{{ '<&>\"' | tojson }}{{ messages | tojson(ensure_ascii=true, sort_keys=true, separators=('', ':')) }}",
    "sums": "{{ 2 ** 10 }} {{ 'a' * 3 + 'b' }} {{ [1] + [2] }} {{ 7 // 2 }} {{ '%03d' % 7 }} {{ 1 ~ range(3) | list }}",
}


@pytest.mark.parity
@pytest.mark.parametrize("name", ORACLE)
def test_transformers_renders_the_same(name: str):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [
        {
            "type": "function",
            "function": {"name": "wetter", "description": "größer <b>", "parameters": {"n": [1, None, True]}},
        }
    ]
    for prompt in (True, False):
        names: dict[str, Any] = {"bos_token": "<bos>", "tools": tools, "add_generation_prompt": prompt}
        expected = theirs.render_jinja_template([CHAT], chat_template=ORACLE[name], **names)[0][0]
        assert render(ORACLE[name], **names) == expected
        assert expected


def test_strftime_now_reads_the_clock():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", clock=lambda: datetime(2026, 11, 21))
    assert template.render([]) == "21 Nov 2026"


def test_a_syntax_error_names_its_line():
    with pytest.raises(TextError, match=r"line 2: .*endfor"):
        ChatTemplate("{% for a in messages %}\n{% endfo %}")


def test_raise_exception_reports_the_template_s_message():
    source = (
        "{% set r = messages[0].role %}{% if r != 'user' %}{{ raise_exception('want user, not ' + r) }}{% endif %}ok"
    )
    template = ChatTemplate(source)
    assert template.render(CHAT) == "ok"
    with pytest.raises(TextError, match="refuses these messages: want user, not model"):
        template.render([{"role": "model"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].clear() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [0] * 99999999999 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ (2 ** 60000) ** 60000 }}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s | length }}",
        "{% for i in range(1000) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source: str):
    messages = [{"role": "user"}]
    start = time.monotonic()
    with pytest.raises(TextError, match="sandbox forbids"):
        ChatTemplate(source).render(messages)
    assert messages == [{"role": "user"}]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "100000"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ messages[0].nothing() }}", "nothing"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ lipsum(99999) }}", "undefined"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", str(MAX_OUTPUT)),
    ],
)
def test_every_template_failure_is_a_text_error(source: str, words: str):
    with pytest.raises(TextError, match=words):
        render(source)


def test_objects_reach_the_template_as_placeholders():
    class Image:
        def save(self) -> str:
            raise AssertionError("a template must not call this")

    class Loud(str):
        def __str__(self) -> str:
            raise AssertionError("a template must not call this")

    messages = [{"role": Loud("user"), "content": ({"type": "image", "image": Image()}, 1.5, True, None)}]
    source = "{{ messages[0].role }} {{ messages[0].content[0].image }} {{ messages[0].content[1:] }}"
    assert render(source, messages=messages) == "user <Image> (1.5, True, None)"
    with pytest.raises(TextError, match="save"):
        render("{{ messages[0].content[0].image.save() }}", messages=messages)


def test_a_name_that_belongs_to_the_template_language_is_refused():
    with pytest.raises(TextError, match="'range'"):
        render("x", range=3)


def test_the_range_limit_is_per_rendering():
    template = ChatTemplate("{% for i in range(9) %}{% for j in range(99999) %}{% endfor %}{% endfor %}ok")
    assert [template.render([]), template.render([])] == ["ok", "ok"]
