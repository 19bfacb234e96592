"""The Open Responses specification, as the models of `openresponses-types`: every answer and every event must be one.

Of a thought's text it calls the events `response.reasoning.delta` and `.done`; OpenAI's clients know them, and we write
them, as `response.reasoning_text.*`.
"""

import json

import httpx
import openresponses_types as types
from report import AB, CHATTY, PATH, equal, feature

EVENTS = {
    next(iter(model.model_fields["type"].annotation)).value: model
    for name, model in vars(types).items()
    if name.endswith("StreamingEvent")
}
TOOL = {"type": "function", "name": "ls", "parameters": PATH}


def asked(given, **more):
    answer = httpx.post(f"{CHATTY}/v1/responses", json={"model": "chatty", "input": given, **more}, timeout=60)
    body = answer.raise_for_status().json()
    if "schema" in body["text"]["format"]:
        body["text"]["format"]["schema"] = None  # these models allow nothing else; OpenAI's repeat the schema
    return types.ResponseResource.model_validate(body)


def streamed(given, **more):
    body = {"model": "chatty", "input": given, "stream": True, **more}
    lines = httpx.post(f"{CHATTY}/v1/responses", json=body, timeout=60).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    for number, event in enumerate(events):
        equal(event["sequence_number"], number)
        event["type"] = event["type"].replace("reasoning_text", "reasoning")
        EVENTS[event["type"]].model_validate(event)
    return [event["type"] for event in events]


@feature("chat")
def _():
    equal(asked("say 4").status, "completed")


@feature("turns")
def _():
    call = {"type": "function_call", "call_id": "a", "name": "ls", "arguments": "{}"}
    turns = [{"role": "user", "content": "ls"}, call, {"type": "function_call_output", "call_id": "a", "output": "b"}]
    equal(asked(turns, tools=[TOOL]).status, "completed")


@feature("stream")
def _():
    kinds = streamed("count 20")
    equal(kinds[0], "response.created")
    equal(kinds[-1], "response.completed")
    equal("response.output_text.delta" in kinds, True)


@feature("tools")
def _():
    equal([item.type for item in asked('call ls {"path": "a"}', tools=[TOOL]).output], ["function_call"])
    equal("response.function_call_arguments.done" in streamed('call ls {"path": "a"}', tools=[TOOL]), True)


@feature("thinking")
def _():
    equal([item.type for item in asked("say 4", reasoning={"effort": "low"}).output], ["reasoning", "message"])
    streamed("say 4", reasoning={"effort": "low"})


@feature("schema")
def _():
    form = {"type": "json_schema", "name": "ab", "schema": AB, "strict": True}
    equal(asked('say {"a": 7}', text={"format": form}).status, "completed")


@feature("usage")
def _():
    equal(asked("say 4").usage.output_tokens, 2)


@feature("error")
def _():
    answer = httpx.post(f"{CHATTY}/v1/responses", json={"model": "none", "input": "a"})
    equal(answer.status_code, 404)
    equal(set(answer.json()["error"]) >= {"message", "type", "param", "code"}, True)
