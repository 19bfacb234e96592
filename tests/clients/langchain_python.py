"""LangChain's chat model of OpenAI's API, by chat completions and by responses."""

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from report import AB, CHATTY, NANO, PATH, PUZZLE, equal, feature, solved

TOOL = {"type": "function", "function": {"name": "ls", "description": "Lists.", "parameters": PATH}}


def model(**more):
    asked = {"model": "chatty", "base_url": f"{CHATTY}/v1", "api_key": "none", "max_retries": 0, **more}
    return ChatOpenAI(**asked)


@feature("chat")
def _():
    equal(model().invoke("say 4").content, "4")


@feature("turns")
def _():
    first = model().invoke("say b")
    answer = model().invoke([SystemMessage("Be."), HumanMessage("say b"), first, HumanMessage("recall")])
    equal(answer.content, "[system] Be. [user] say b [model] b [user] recall")


@feature("stream")
def _():
    equal("".join(chunk.content for chunk in model().stream("count 20")), " ".join(map(str, range(1, 21))))


@feature("tools")
def _():
    bound, asked = model().bind_tools([TOOL]), HumanMessage('call ls {"path": "a"}')
    first = bound.invoke([asked])
    equal(first.tool_calls[0]["args"], {"path": "a"})
    answer = bound.invoke([asked, first, ToolMessage("none", tool_call_id=first.tool_calls[0]["id"])])
    equal(answer.content, "ls said none")


@feature("thinking")
def _():
    answer = model(reasoning_effort="low").invoke("say 4")
    equal((answer.content, answer.usage_metadata["output_token_details"]["reasoning"] > 0), ("4", True))


@feature("schema")
def _():
    schema = {"title": "ab", "description": "A number.", **AB}
    equal(model().with_structured_output(schema, method="json_schema").invoke('say {"a": 7}'), {"a": 7})


@feature("stop")
def _():
    equal(model(stop_sequences=["two"]).invoke("say one two").content, "one ")


@feature("usage")
def _():
    equal(model().invoke("say 4").usage_metadata["output_tokens"], 2)


@feature("responses")
def _():
    asked = model(use_responses_api=True, reasoning={"effort": "low"})
    equal(asked.invoke("say 4").text, "4")
    equal("".join(chunk.text for chunk in asked.stream("say 4")), "4")


@feature("sudoku-nano")
def _():
    solved(model(model="sudoku-nano", base_url=f"{NANO}/v1").invoke(PUZZLE).content)
