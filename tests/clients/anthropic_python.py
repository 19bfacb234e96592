"""Anthropic's library for Python."""

import json

import anthropic
from report import AB, CHATTY, NANO, PATH, PUZZLE, equal, feature, solved

client = anthropic.Anthropic(base_url=CHATTY, api_key="none", max_retries=0)
TOOL = {"name": "ls", "input_schema": PATH}


def ask(text, **more):
    turns = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return client.messages.create(**{"model": "chatty", "max_tokens": 2000, "messages": turns, **more})


@feature("chat")
def _():
    equal(ask("say 4").content[0].text, "4")


@feature("turns")
def _():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answer = ask([*turns, {"role": "user", "content": "recall"}], system="Be.")
    equal(answer.content[0].text, "[system] Be. [user] a [model] b [user] recall")


@feature("stream")
def _():
    turns = [{"role": "user", "content": "count 20"}]
    with client.messages.stream(model="chatty", max_tokens=999, messages=turns) as stream:
        equal("".join(stream.text_stream), " ".join(map(str, range(1, 21))))


@feature("tools")
def _():
    first = ask('call ls {"path": "a"}', tools=[TOOL])
    equal(first.content[0].input, {"path": "a"})
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "none"}
    turns = [{"role": "user", "content": 'call ls {"path": "a"}'}, {"role": "assistant", "content": first.content}]
    equal(ask([*turns, {"role": "user", "content": [result]}], tools=[TOOL]).content[0].text, "ls said none")


@feature("thinking")
def _():
    thought = ask("say 4", thinking={"type": "enabled", "budget_tokens": 1024}).content[0]
    equal(thought.thinking.strip(), "I think.")


@feature("schema")
def _():
    form = {"format": {"type": "json_schema", "schema": AB}}
    equal(json.loads(ask('say {"a": 7}', output_config=form).content[0].text), {"a": 7})


@feature("stop")
def _():
    equal(ask("say one two", stop_sequences=["two"]).stop_sequence, "two")


@feature("usage")
def _():
    counted = client.messages.count_tokens(model="chatty", messages=[{"role": "user", "content": "say 4"}])
    equal(ask("say 4").usage.input_tokens, counted.input_tokens)


@feature("error")
def _():
    try:
        ask("a", model="claude")
    except anthropic.NotFoundError:
        return
    raise AssertionError("no error")


@feature("cancel")
def _():
    with ask("count 900", stream=True) as stream:
        next(iter(stream))


@feature("sudoku-nano")
def _():
    nano = anthropic.Anthropic(base_url=NANO, api_key="none")
    answer = nano.messages.create(model="sudoku-nano", max_tokens=100, messages=[{"role": "user", "content": PUZZLE}])
    solved(answer.content[0].text)
