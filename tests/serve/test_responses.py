"""OpenAI's responses, asked by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.builders.server import Served
from tests.serve.conftest import PICTURE

LS = {"type": "function", "name": "ls", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}
SUM = {
    "type": "function",
    "name": "sum",
    "strict": False,
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
}
PATCH = {"type": "custom", "name": "patch", "description": "Patches."}
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


class AB(pydantic.BaseModel):
    a: int


@pytest.fixture
def client(chatty: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chatty.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, given: Any, **more: Any) -> Response:
    response: Response = client.responses.create(model="chatty", input=given, **more)
    return response


def post(served: Served, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/responses", json={"model": "chatty", "input": "say 4", **body}, timeout=30)


def events_of(client: openai.OpenAI, given: Any, **more: Any) -> list[Any]:
    with client.responses.create(model="chatty", input=given, stream=True, **more) as stream:
        return list(stream)


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def test_an_input_is_answered(client: openai.OpenAI):
    response = ask(client, "say 4")
    assert (response.object, response.status, response.model, response.output_text) == (
        "response",
        "completed",
        "chatty",
        "4",
    )
    assert response.usage is not None and response.usage.total_tokens == response.usage.input_tokens + 2
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")
    assert (response.error, response.incomplete_details, response.store) == (None, None, False)  # type: ignore[attr-defined]


def test_instructions_and_all_items_are_shown(client: openai.OpenAI):
    talk = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Now."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "b", "annotations": []}],
        },
        {"role": "user", "content": "recall"},
    ]
    assert ask(client, talk, instructions="Be.").output_text == "[system] Be.\nNow. [user] a [model] b [user] recall"
    assert ask(client, talk).output_text == "[system] Now. [user] a [model] b [user] recall"


def test_what_was_answered_can_be_sent_back(client: openai.OpenAI):
    first = ask(client, "say 4", reasoning={"effort": "low"})
    talk = [*said(("user", "say 4")), *first.output, *said(("user", "recall"))]
    assert ask(client, talk).output_text == "[user] say 4 [model] 4 [user] recall"


@pytest.mark.parametrize(
    "given", ["say Hello there.", 'call ls {"path": "a"} & sum {"n": 2}', 'call patch {"input": "+a"}', "count 30"]
)
@pytest.mark.parametrize("effort", ["none", "medium"])
def test_a_stream_joined_is_the_whole(client: openai.OpenAI, given: str, effort: str):
    more: dict[str, Any] = {"tools": [LS, SUM, PATCH], "reasoning": {"effort": effort}, "extra_body": {"seed": 1}}
    whole = ask(client, given, **more)
    with client.responses.stream(model="chatty", input=given, **more) as stream:
        deltas = "".join(
            event.delta
            for event in stream
            if event.type.endswith((".output_text.delta", "arguments.delta", "input.delta"))
        )
        joined = stream.get_final_response()

    def plain(response: Response) -> Any:
        items = [item.model_dump(exclude_none=True, exclude={"id", "call_id"}) for item in response.output]
        for item in items:
            item.pop("parsed_arguments", None)
            for part in item.get("content", ()):
                part.pop("parsed", None)
        return items, response.status, response.usage

    assert plain(whole) == plain(joined)
    calls = [
        item.input if item.type == "custom_tool_call" else item.arguments
        for item in whole.output
        if item.type.endswith("call")
    ]
    assert deltas == whole.output_text + "".join(calls)
    assert (whole.output[0].type == "reasoning") == (effort == "medium")


def test_the_events_of_a_stream_are_in_the_documented_order(client: openai.OpenAI, chatty: Served):
    events = events_of(client, 'call ls {"path": "a"}', tools=[LS], reasoning={"effort": "low"})
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    reasoning = [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert once == ["created", "in_progress", *reasoning, *call, "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    message = [event.type.removeprefix("response.") for event in events_of(client, "say 4")]
    text = [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert message == ["created", "in_progress", *text, "completed"]
    raw = httpx.post(f"{chatty.url}/v1/responses", json={"input": "say 4", "stream": True}, timeout=30).text
    assert "[DONE]" not in raw
    for line in raw.splitlines():
        if line.startswith("data: "):
            EVENT.validate_json(line.removeprefix("data: "))


def test_an_answer_validates_as_the_library_s_type(chatty: Served):
    body = post(
        chatty, reasoning={"effort": "low"}, tools=[LS, PATCH], metadata={"a": "b"}, prompt_cache_key="k"
    ).json()
    response = Response.model_validate(body, strict=False)
    assert response.metadata == {"a": "b"} and response.prompt_cache_key == "k"
    assert [item.type for item in response.output] == ["reasoning", "message"]


def test_a_call_and_its_result_make_a_round(client: openai.OpenAI):
    given = 'call ls {"path": "a"} & patch {"input": "+a"}'
    more: dict[str, Any] = {
        "tools": [LS, PATCH],
        "reasoning": {"effort": "low"},
        "include": ["reasoning.encrypted_content"],
    }
    first = ask(client, given, **more)
    thought, call, custom = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "ls", {"path": "a"})
    assert (custom.type, custom.name, custom.input) == ("custom_tool_call", "patch", "+a")
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "none"}]},
        {"type": "custom_tool_call_output", "call_id": custom.call_id, "output": "done"},
    ]
    items = [item.to_dict() for item in first.output]
    assert (
        ask(client, [*said(("user", given)), *items, *results], **more).output_text == "ls said none; patch said done"
    )
    assert thought.encrypted_content
    items[0].pop("content")  # as clients do that keep what is sealed alone
    assert (
        ask(client, [*said(("user", given)), *items, *results], **more).output_text == "ls said none; patch said done"
    )


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ("auto", ["ls", "sum"]),
        ("required", ["ls", "sum"]),
        ("none", []),
        ({"type": "function", "name": "sum"}, ["sum"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "sum"}]}, ["sum"]),
    ],
)
def test_the_choice_of_tools_is_kept(client: openai.OpenAI, choice: Any, calls: list[str]):
    given = 'call sum {"n": 2}' if calls == ["sum"] else 'call ls {"path": "a"} & sum {"n": 2}'
    response = ask(client, given, tools=[LS, SUM], tool_choice=choice, max_output_tokens=200)
    assert [item.name for item in response.output if item.type == "function_call"] == calls


def test_only_one_call_is_made_where_calls_are_not_parallel(client: openai.OpenAI):
    response = ask(
        client,
        'call ls {"path": "a"} & sum {"n": 2}',
        tools=[LS, SUM],
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    assert [item.name for item in response.output if item.type == "function_call"] == ["ls"]


def test_a_thought_is_an_item_before_the_message(client: openai.OpenAI):
    response = ask(client, "say 4", reasoning={"effort": "high", "summary": "auto"})
    thought, message = response.output
    assert (thought.type, thought.content[0].text.strip(), message.content[0].text) == ("reasoning", "I think.", "4")
    assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens > 0
    assert response.reasoning is not None and response.reasoning.effort == "high"


def test_an_answer_follows_its_schema(client: openai.OpenAI):
    parsed = client.responses.parse(model="chatty", input='say {"a": 7}', text_format=AB).output_parsed
    assert parsed == AB(a=7)
    free = ask(
        client, 'say {"b": 1}', text={"format": {"type": "json_object"}, "verbosity": "low"}, max_output_tokens=40
    )
    assert isinstance(json.loads(free.output_text), dict)


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI):
    response = ask(client, "count 30", max_output_tokens=7)
    assert (response.status, response.output_text, response.output[0].status) == ("incomplete", "1 2 3 4", "incomplete")  # type: ignore[union-attr]
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
    last = events_of(client, "count 30", max_output_tokens=7)[-2:]
    assert [event.type for event in last] == ["response.output_item.done", "response.incomplete"]
    assert last[0].item.status == "incomplete"


def test_log_probabilities_come_with_the_text(random: Served):
    body = {"input": "word", "max_output_tokens": 3, "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    answer = httpx.post(f"{random.url}/v1/responses", json=body, timeout=30).json()
    (message,) = (item for item in answer["output"] if item["type"] == "message")
    logprobs = message["content"][0]["logprobs"]
    assert len(logprobs) == answer["usage"]["output_tokens"] and all(len(one["top_logprobs"]) == 2 for one in logprobs)


def test_cached_tokens_are_counted(random: Served):
    body = {"input": "again " * 300, "max_output_tokens": 1}
    first, again = (httpx.post(f"{random.url}/v1/responses", json=body, timeout=30).json()["usage"] for _ in range(2))
    assert first["input_tokens_details"]["cached_tokens"] == 0 < again["input_tokens_details"]["cached_tokens"]
    assert first["input_tokens"] == again["input_tokens"] > again["input_tokens_details"]["cached_tokens"]


def test_images_are_seen_in_messages_and_results(seeing: Served):
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}", "detail": "auto"}
    call = {"type": "function_call", "call_id": "x", "name": "look", "arguments": "{}"}
    given = [
        [{"role": "user", "content": [image, {"type": "input_text", "text": "See?"}]}],
        [*said(("user", "Look")), call, {"type": "function_call_output", "call_id": "x", "output": [image]}],
    ]
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="any", max_retries=0) as client:
        for items in given:
            counted = client.responses.input_tokens.count(model="seeing", input=items).input_tokens  # type: ignore[arg-type]
            response = client.responses.create(model="seeing", input=items, max_output_tokens=4)  # type: ignore[arg-type]
            assert response.usage is not None and response.usage.input_tokens == counted > 40


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": None}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "a"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://169.254.169.254/"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "no", "output": "a"}]}, "input[0].role"),
        ({"input": said(("user", "a"), ("assistant", "b"))}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "a"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "a", "format": {"type": "grammar"}}]}, "tools[0].format"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, "#/type is 3"),
        ({"top_p": 1.5}, "top_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
    ],
)
def test_what_is_wrong_is_named(chatty: Served, body: dict[str, Any], named: str):
    answer = post(chatty, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert named in answer.json()["error"]["message"].partition(" (hint")[0]


def test_what_clients_always_send_is_accepted(chatty: Served):
    """Codex, with the tools that a model may leave alone."""
    body = post(
        chatty,
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="key",
        client_metadata={"x": "y"},
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low"},
        tools=[LS, {"type": "web_search", "external_web_access": False}],
        tool_choice="auto",
        parallel_tool_calls=False,
        service_tier="auto",
        metadata=None,
        max_tool_calls=3,
        stream_options={"include_obfuscation": False},
    ).json()
    assert body["output"][-1]["content"][0]["text"] == "4"
    assert body["warnings"] == ["tools[1] is not offered to the model: nothing is searched"]


def test_errors_have_the_library_s_classes(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt", input="a")
    with pytest.raises(openai.NotFoundError, match="none is stored"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.InternalServerError):
        ask(client, "fail now and for all")


def test_an_error_in_mid_stream_is_the_last_event(client: openai.OpenAI):
    events = events_of(client, "fail now and for all")
    assert events[0].type == "response.created" and "response.output_text.delta" in [event.type for event in events]
    assert events[-1].type == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.code) == ("failed", "server_error")


def test_a_client_that_leaves_ends_its_answer(chatty: Served, client: openai.OpenAI):
    before = len(chatty.engine.cancelled)
    with client.responses.create(model="chatty", input="count 900", stream=True) as stream:
        next(event for event in stream if event.type == "response.output_text.delta")
    assert chatty.idle() and len(chatty.engine.cancelled) == before + 1


def test_a_tool_and_a_format_are_repeated_with_all_of_their_keys(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "ab", "schema": {"type": "object"}}
    repeated = ask(client, "say {}", tools=[LS, PATCH], text={"format": form}).to_dict()
    assert repeated["tools"] == [{**LS, "description": None, "strict": None}, PATCH]
    assert repeated["text"]["format"] == {**form, "description": None, "strict": False}
