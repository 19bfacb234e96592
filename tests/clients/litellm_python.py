"""LiteLLM, by each of its providers that reach this server: openai, anthropic and ollama_chat."""

import json

import litellm
from report import AB, CHATTY, NANO, PATH, PUZZLE, equal, feature, solved

TOOL = {"type": "function", "function": {"name": "ls", "description": "Lists.", "parameters": PATH}}
ROUTES = {"openai/chatty": f"{CHATTY}/v1", "anthropic/chatty": CHATTY, "ollama_chat/chatty": CHATTY}


def ask(model, text, **more):
    turns = text if isinstance(text, list) else [{"role": "user", "content": text}]
    asked = {"max_tokens": 2000, "api_base": ROUTES[model], "api_key": "none", **more}
    return litellm.completion(model=model, messages=turns, **asked)


@feature("chat")
def _():
    for model in ROUTES:
        equal(ask(model, "say 4").choices[0].message.content, "4")


@feature("turns")
def _():
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "a"}]
    turns += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "recall"}]
    for model in ROUTES:
        equal(ask(model, turns).choices[0].message.content, "[system] Be. [user] a [model] b [user] recall")


@feature("stream")
def _():
    for model in ROUTES:
        said = "".join(chunk.choices[0].delta.content or "" for chunk in ask(model, "count 20", stream=True))
        equal(said, " ".join(map(str, range(1, 21))))


@feature("tools")
def _():
    for model in ROUTES:
        first = ask(model, 'call ls {"path": "a"}', tools=[TOOL]).choices[0].message
        equal(json.loads(first.tool_calls[0].function.arguments), {"path": "a"})
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "name": "ls", "content": "none"}
        turns = [{"role": "user", "content": 'call ls {"path": "a"}'}, first.model_dump(exclude_none=True), result]
        equal(ask(model, turns, tools=[TOOL]).choices[0].message.content, "ls said none")


@feature("thinking")
def _():
    for model in ROUTES:
        more = {"think": True}
        if model.startswith("openai"):
            more = {"extra_body": {"reasoning_effort": "low"}}
        elif model.startswith("anthropic"):
            more = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "allowed_openai_params": ["thinking"]}
        equal(ask(model, "say 4", **more).choices[0].message.reasoning_content.strip(), "I think.")


@feature("schema")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "ab", "schema": AB, "strict": True}}
    for model in ("openai/chatty", "ollama_chat/chatty"):
        equal(json.loads(ask(model, 'say {"a": 7}', response_format=form).choices[0].message.content), {"a": 7})


@feature("stop")
def _():
    for model in ROUTES:
        equal(ask(model, "say one two", stop=["two"]).choices[0].message.content, "one ")


@feature("usage")
def _():
    for model in ROUTES:
        equal(ask(model, "say 4").usage.completion_tokens, 2)


@feature("responses")
def _():
    answer = litellm.responses(model="openai/chatty", input="say 4", api_base=f"{CHATTY}/v1", api_key="none")
    equal(answer.output[-1].content[0].text, "4")


@feature("sudoku-nano")
def _():
    turns = [{"role": "user", "content": PUZZLE}]
    answer = litellm.completion(model="openai/sudoku-nano", messages=turns, api_base=f"{NANO}/v1", api_key="none")
    solved(answer.choices[0].message.content)
