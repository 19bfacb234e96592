"""OpenAI's library for Python."""

import json

import openai
from report import AB, CHATTY, NANO, PATH, PUZZLE, RANDOM, equal, feature, solved

client = openai.OpenAI(base_url=f"{CHATTY}/v1", api_key="none", max_retries=0)
drawn = openai.OpenAI(base_url=f"{RANDOM}/v1", api_key="none", max_retries=0)
TOOL = {"type": "function", "function": {"name": "ls", "parameters": PATH}}


def chat(text, **more):
    return client.chat.completions.create(model="chatty", messages=[{"role": "user", "content": text}], **more)


@feature("chat")
def _():
    equal(chat("say 4").choices[0].message.content, "4")


@feature("turns")
def _():
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "a"}]
    turns += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "recall"}]
    answer = client.chat.completions.create(model="chatty", messages=turns)
    equal(answer.choices[0].message.content, "[system] Be. [user] a [model] b [user] recall")


@feature("stream")
def _():
    with client.chat.completions.stream(model="chatty", messages=[{"role": "user", "content": "count 20"}]) as stream:
        equal(stream.get_final_completion().choices[0].message.content, " ".join(map(str, range(1, 21))))


@feature("tools")
def _():
    first = chat('call ls {"path": "a"}', tools=[TOOL]).choices[0].message
    equal(json.loads(first.tool_calls[0].function.arguments), {"path": "a"})
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "none"}
    turns = [{"role": "user", "content": 'call ls {"path": "a"}'}, first, result]
    answer = client.chat.completions.create(model="chatty", messages=turns, tools=[TOOL])
    equal(answer.choices[0].message.content, "ls said none")


@feature("thinking")
def _():
    equal(chat("say 4", reasoning_effort="low").choices[0].message.reasoning_content.strip(), "I think.")


@feature("schema")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "ab", "schema": AB, "strict": True}}
    equal(json.loads(chat('say {"a": 7}', response_format=form).choices[0].message.content), {"a": 7})


@feature("stop")
def _():
    equal(chat("say one two", stop=["two"]).choices[0].message.content, "one ")


@feature("usage")
def _():
    equal(chat("say 4").usage.completion_tokens, 2)


@feature("responses")
def _():
    with client.responses.stream(model="chatty", input="say 4", reasoning={"effort": "low"}) as stream:
        equal(stream.get_final_response().output_text, "4")


@feature("suffix")
def _():
    answer = drawn.completions.create(model="random", prompt="The sky is ", suffix=" today.", max_tokens=4, seed=1)
    equal(answer.choices[0].finish_reason in ("stop", "length"), True)
    equal(bool(answer.choices[0].text), True)


@feature("decisions")
def _():
    questions = [
        {"type": "predicate", "name": "content", "instructions": "Is the customer content?"},
        {"type": "choice", "instructions": "Which team?", "choices": [{"value": "delivery"}, {"value": "billing"}]},
        {"type": "score", "instructions": "How upset?", "levels": [{"label": "calm"}, {"label": "angry"}]},
    ]
    answer = drawn.decisions.create(model="random", input="The parcel was late.", questions=questions)
    equal([each.type for each in answer.answers], ["predicate", "choice", "score"])
    equal(0 <= answer.answers[0].probability <= 1, True)
    equal(round(sum(each.probability for each in answer.answers[1].probabilities), 6), 1.0)
    equal(answer.answers[1].choice in ("delivery", "billing"), True)
    equal(answer.usage.total_tokens > 0, True)


@feature("error")
def _():
    try:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])
    except openai.NotFoundError:
        return
    raise AssertionError("no error")


@feature("cancel")
def _():
    with chat("count 900", stream=True) as stream:
        next(iter(stream))


@feature("sudoku-nano")
def _():
    nano = openai.OpenAI(base_url=f"{NANO}/v1", api_key="none")
    answer = nano.chat.completions.create(model="sudoku-nano", messages=[{"role": "user", "content": PUZZLE}], seed=1)
    solved(answer.choices[0].message.content)
