"""Ollama's library for Python."""

import json

import ollama
from report import AB, CHATTY, NANO, PATH, PUZZLE, equal, feature, solved

client = ollama.Client(CHATTY)
TOOL = {"type": "function", "function": {"name": "ls", "parameters": PATH}}


def ask(text, **more):
    turns = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return client.chat("chatty", turns, **more)


@feature("chat")
def _():
    equal(ask("say 4").message.content, "4")
    equal(client.generate("chatty", "say 4").response, "4")


@feature("turns")
def _():
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "a"}]
    turns += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "recall"}]
    equal(ask(turns).message.content, "[system] Be. [user] a [model] b [user] recall")


@feature("stream")
def _():
    chunks = ask("count 20", stream=True)
    equal("".join(chunk.message.content for chunk in chunks), " ".join(map(str, range(1, 21))))


@feature("tools")
def _():
    first = ask('call ls {"path": "a"}', tools=[TOOL]).message
    equal(first.tool_calls[0].function.arguments, {"path": "a"})
    result = {"role": "tool", "tool_name": "ls", "content": "none"}
    answer = ask([{"role": "user", "content": 'call ls {"path": "a"}'}, first, result], tools=[TOOL])
    equal(answer.message.content, "ls said none")


@feature("thinking")
def _():
    equal(ask("say 4", think=True).message.thinking.strip(), "I think.")


@feature("schema")
def _():
    equal(json.loads(ask('say {"a": 7}', format=AB).message.content), {"a": 7})


@feature("stop")
def _():
    equal(ask("say one two", options={"stop": ["two"]}).message.content, "one ")


@feature("usage")
def _():
    equal(ask("say 4").eval_count, 2)


@feature("error")
def _():
    try:
        client.chat("llama3", [{"role": "user", "content": "a"}])
    except ollama.ResponseError as error:
        equal(error.status_code, 404)
        return
    raise AssertionError("no error")


@feature("cancel")
def _():
    ask("count 900", stream=True).__next__()


@feature("sudoku-nano")
def _():
    solved(ollama.Client(NANO).chat("sudoku-nano", [{"role": "user", "content": PUZZLE}]).message.content)
