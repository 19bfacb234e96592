"""Chat templates: the same text as transformers gives, and no way out of the sandbox."""

from __future__ import annotations

import time
import tracemalloc
from datetime import datetime
from typing import Any

import jinja2
import pytest

from blockpress.chat import ChatTemplate, sandbox
from blockpress.chat.sandbox import MAX_OUTPUT
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


ENDLESS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over messages": "{% macro f(n) %}{% for m in messages %}{{ f(n + 1) if n < 40 }}{% endfor %}{% endmacro %}{{ f(0) }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a block that calls itself": "{% block a %}{% for i in range(99999) %}{{ self.a() }}{% endfor %}{% endblock %}",
    "a recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 40 }}{% endfor %}",
    "filters": "{% for i in range(99999) %}{% set x = range(99999) | sort | list | last %}{% endfor %}",
    "methods": "{% for i in range(99999) %}{% set x = ('ab' * 99999).upper().lower() %}{% endfor %}",
    "blocks of callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 12
    + "{% for i in range(99999) %}{% endfor %}"
    + "{% endcall %}" * 12,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_work_without_end_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    template, start = ChatTemplate(ENDLESS[name]), time.thread_time()
    with pytest.raises(TextError, match=r"sandbox forbids: more than 0.1 seconds|RecursionError"):
        template.render([{"role": "user"}] * 9)
    assert time.thread_time() - start < 5


NESTED = "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
GREEDY = {
    "~": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "~ of many": "{% set b = 'a' * 9999999 %}{{ b ~ b ~ b }}",
    "join": "{{ (['a' * 9999] * 9999) | join('b') }}",
    "join with a long text": "{{ (['a'] * 99999) | join('b' * 99999) }}",
    "the method join": "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "the method join of a text": "{{ ('b' * 99999).join('a' * 99999) }}",
    "the method join of an iterator": "{{ ('b' * 9999999).join(range(9) | map('string')) }}",
    "the method join of safe text": "{{ (('b' * 99999) | escape).join('a' * 99999) }}",
    "the method join of bytes": "{{ ('b' * 99999).encode().join([('b' * 9999).encode()] * 99999) }}",
    "bytes of a number": "{{ (1).to_bytes(999999999, 'big') }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "the method replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "center": "{{ 'a' | center(999999999) }}",
    "expandtabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "indent": "{{ ('\\n' * 99999) | indent(99999) }}",
    "tojson": "{{ [[[]]] | tojson(indent=99999999) }}",
    "%": "{{ '%999999999d' % 1 }}",
    "% of several": "{{ ('%99999d' * 999) % ((1,) * 999) }}",
    "% with a width": "{{ '%*d' % (999999999, 1) }}",
    "the filter format": "{{ '%999999999d' | format(1) }}",
    "the method format": "{{ '{:999999999}'.format(1) }}",
    "format of a long one": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "format with a width": "{{ '{:{}}'.format(1, 999999999) }}",
    "powers": "{% set n = namespace(x=2 ** 9999) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "lists of lists": NESTED + "{{ n.x }}",
    "lists of lists as JSON": NESTED + "{{ n.x | tojson }}",
    "lists of lists as text": NESTED + "{{ n.x | upper }}",
    "a list that grows": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + [i ~ 'a' * 99999] %}{% endfor %}",
    "a capture": "{% set x %}{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
    "a macro": "{% macro f() %}{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endmacro %}{{ f() | length }}",
    "many large ones": "{% for i in range(9999) %}{% set x = 'a' * 9999999 %}{% endfor %}",
    "batches": "{{ [1] | batch(999999999, 'a') | list }}",
    "slices": "{{ [1] | slice(999999999) | list }}",
}


@pytest.mark.parametrize("name", GREEDY)
def test_memory_without_end_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MOST_NUMBER", 2**17)  # of entries: all are counted
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(TextError, match="sandbox forbids"):
            ChatTemplate(GREEDY[name]).render(CHAT)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
    assert time.thread_time() - start < 10


SET = "{% set n.found = true %}"
LOOK_AHEAD = {
    "until it is found": "{% if not n.found %}{% if role(j) != 'a' %}" + SET + "{{ j }}{% endif %}{% endif %}",
    "until it is stopped": "{% if n.found %}{% elif role(j) == 'b' %}" + SET + "{{ j }}{% else %}.{% endif %}",
    "with a second condition": "{% if n.last is none and role(j) != 'a' %}{% set n.last = j %}{{ n.last }}{% endif %}",
    "with two conditions that hold": "{% if not n.found and n.last is none %}{{ j }}{% set n.last = j %}{% endif %}",
    "of the loop's own variable": "{% if not (n.found and j < 2) %}{{ j }}" + SET + "{% endif %}",
    "of the loop": "{% if not n.found or loop.last %}{{ j }}" + SET + "{% endif %}",
    "with something for every turn": "{% if not n.found %}{% set n.found = j == 1 %}{% endif %}{{ j }}",
    "with an else": "{% if not n.found %}{% set n.found = j == 1 %}{{ j }}{% else %}!{% endif %}",
    "with text where it is stopped": "{% if n.found %}!{% else %}{% set n.found = j == 1 %}{{ j }}{% endif %}",
    "that begins again": "{% if not n.found %}{% set n.found = j > 0 %}{% elif j == 3 %}{% set n.found = false %}{{ j }}{% endif %}",
}


@pytest.mark.parametrize("name", LOOK_AHEAD)
@pytest.mark.parametrize("over", ["range(loop.index0, messages | length)", "numbers[loop.index0:]", "numbers"])
def test_a_look_ahead_that_ends_early_writes_the_same(name: str, over: str) -> None:
    source = (
        "{% macro role(j) %}{{ messages[j].role }}{% endmacro %}{% set numbers = range(messages | length) | list %}"
        "{% for m in messages %}{% set n = namespace(found=false, last=none) %}{% for j in OVER %}BODY{% else %}none{% endfor %}"
        "/{{ n.found }}{{ n.last }} {% endfor %}"
    ).replace("OVER", over)
    source = source.replace("BODY", LOOK_AHEAD[name])
    talk = [{"role": role} for role in "aabacba"]
    written = render(source, messages=talk)
    assert written == jinja2.Environment().from_string(source).render(messages=talk)
    assert written.count("/") == 7


@pytest.mark.parametrize("count", [1_500, 5_000])
def test_a_long_talk_renders_in_seconds(count: int) -> None:
    """Each message looks through all that follow: 12.5 million turns of 5,000 messages, of which few do anything."""
    source = (
        "{% for m in messages %}{{ '<|turn>' ~ m.role ~ '\\n' ~ m.content }}"
        "{% set next = namespace(role=none) %}"
        "{% for j in range(loop.index0 + 1, messages | length) %}"
        "{% if next.role is none and messages[j].role != 'tool' %}{% set next.role = messages[j].role %}{% endif %}"
        "{% endfor %}{{ '' if next.role == m.role else '<turn|>\\n' }}{% endfor %}"
    )
    talk = [{"role": ("user", "assistant")[number % 2], "content": "x"} for number in range(count)]
    start = time.thread_time()
    turns = "".join(f"<|turn>{message['role']}\nx<turn|>\n" for message in talk)
    assert render(source, messages=talk) == turns
    assert time.thread_time() - start < 10


def test_limits_are_of_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    template = ChatTemplate("{% for i in range(9) %}{% for j in range(999) %}{% endfor %}{% endfor %}ok")
    start = time.thread_time()
    while time.thread_time() - start < 0.3:
        assert template.render([]) == "ok"
