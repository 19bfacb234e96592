"""Anthropic's messages, asked by Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from blockpress.serve import ServeOptions
from tests.builders.chats import obedient_model
from tests.builders.server import Served
from tests.serve.conftest import PICTURE, Serve

if TYPE_CHECKING:
    import anthropic

LS = {
    "name": "ls",
    "description": "Lists.",
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}},
}
SUM = {"name": "sum", "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
AB = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    """Not at the top: it takes more than a second, and every process of pytest collects all files."""
    global anthropic
    import anthropic


@pytest.fixture
def client(chatty: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=chatty.url, api_key="any", max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, text: Any, **more: Any) -> anthropic.types.Message:
    asked: dict[str, Any] = {
        "model": "chatty",
        "max_tokens": 400,
        "messages": [{"role": "user", "content": text}],
        **more,
    }
    message: anthropic.types.Message = client.messages.create(**asked)
    return message


def post(served: Served, **body: Any) -> httpx.Response:
    asked = {"model": "chatty", "max_tokens": 400, "messages": [{"role": "user", "content": "say 4"}], **body}
    return httpx.post(f"{served.url}/v1/messages", json=asked, timeout=30)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_is_answered(client: anthropic.Anthropic):
    message = ask(client, "say 4")
    assert (message.type, message.role, message.model, message.stop_reason) == (
        "message",
        "assistant",
        "chatty",
        "end_turn",
    )
    assert [block.model_dump(exclude_none=True) for block in message.content] == [{"type": "text", "text": "4"}]
    assert message.usage.output_tokens == len("4") + 1
    assert message.usage.input_tokens > len("say 4")
    assert message.id.startswith("msg_")


def test_all_turns_and_the_system_prompt_are_shown(client: anthropic.Anthropic):
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "recall"}]},
    ]
    for system in ("Be.", [{"type": "text", "text": "Be.", "cache_control": {"type": "ephemeral"}}]):
        said = text_of(ask(client, "", messages=talk, system=system))
        assert said == "[system] Be. [user] a [model] b [user] recall"


def test_neighbouring_messages_of_a_role_are_one_turn(client: anthropic.Anthropic):
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "recall"))
    ]
    assert text_of(ask(client, "", messages=talk)) == "[user] a\nb [model] cd [user] recall"


@pytest.mark.parametrize("text", ["say Hello there.", 'call ls {"path": "a"} & sum {"n": 2}', "count 30"])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_stream_joined_is_the_whole(client: anthropic.Anthropic, text: str, thinking: bool):
    more: dict[str, Any] = {"tools": [LS, SUM], "max_tokens": 2000, "seed": 1}
    extra = {"extra_body": {"seed": more.pop("seed")}}
    if thinking:
        more["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    whole = ask(client, text, **more, **extra)
    with client.messages.stream(
        model="chatty", messages=[{"role": "user", "content": text}], **more, **extra
    ) as stream:
        joined = stream.get_final_message()

    def plain(message: anthropic.types.Message) -> Any:
        blocks = message.model_dump(exclude_none=True)["content"]
        for block in blocks:
            block.pop("id", None)
        return blocks, message.stop_reason, message.usage.output_tokens

    assert plain(whole) == plain(joined)
    assert [block.type for block in whole.content][:1] == (["thinking"] if thinking else [whole.content[0].type])


def test_the_events_of_a_stream_are_in_order(client: anthropic.Anthropic):
    asked = {"tools": [LS], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    with client.messages.create(
        model="chatty",
        max_tokens=2000,
        messages=[{"role": "user", "content": 'call ls {"path": "a"}'}],
        stream=True,
        **asked,
    ) as stream:
        events = [event for event in stream if event.type != "ping"]
    assert events[0].message.type == "message" and events[0].message.usage.input_tokens > 0
    kinds = [event.type for event in events]
    assert [kind for kind, after in pairwise([*kinds, ""]) if kind != after] == [
        "message_start",
        *["content_block_start", "content_block_delta", "content_block_stop"] * 2,
        "message_delta",
        "message_stop",
    ]
    starts = [event for event in events if event.type == "content_block_start"]
    assert [(event.index, event.content_block.type) for event in starts] == [(0, "thinking"), (1, "tool_use")]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert {delta.type for delta in deltas} == {"thinking_delta", "signature_delta", "input_json_delta"}
    assert json.loads(deltas[-1].partial_json) == {"path": "a"}
    assert events[-2].delta.stop_reason == "tool_use"


def test_a_call_and_its_result_make_a_round(client: anthropic.Anthropic):
    asked = 'call ls {"path": "a"} & sum {"n": 2}'
    first = ask(client, asked, tools=[LS, SUM], thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    calls = [block for block in first.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("ls", {"path": "a"}), ("sum", {"n": 2})]
    assert first.stop_reason == "tool_use" and len({call.id for call in calls}) == 2
    results = [
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "3"}]},
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "none", "is_error": True},
    ]
    talk = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    assert text_of(ask(client, "", messages=talk, tools=[LS, SUM])) == "sum said 3; ls said Error:\nnone"


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ({"type": "auto"}, ["ls", "sum"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, ["ls"]),
        ({"type": "any"}, ["ls", "sum"]),
        ({"type": "tool", "name": "sum"}, ["sum"]),
        ({"type": "none"}, []),
    ],
)
def test_the_choice_of_tools_is_kept(client: anthropic.Anthropic, choice: Any, calls: list[str]):
    """The model writes a call of each; what is not allowed it cannot write."""
    asked = 'call sum {"n": 2}' if calls == ["sum"] else 'call ls {"path": "a"} & sum {"n": 2}'
    message = ask(client, asked, tools=[LS, SUM], tool_choice=choice, max_tokens=200)
    assert [block.name for block in message.content if block.type == "tool_use"] == calls


def test_a_thought_is_a_block_before_the_text(client: anthropic.Anthropic):
    message = ask(client, "say 4", thinking={"type": "adaptive"}, output_config={"effort": "low"})
    thought, text = message.content
    assert (thought.type, thought.thinking.strip(), text.text) == ("thinking", "I think.", "4")
    assert thought.signature
    assert message.usage.output_tokens_details.thinking_tokens > 0
    hidden = ask(
        client, "say 4", thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"}, max_tokens=2000
    )
    assert (hidden.content[0].thinking, hidden.content[1].text) == ("", "4") and hidden.content[0].signature
    assert [block.type for block in ask(client, "say 4", thinking={"type": "disabled"}).content] == ["text"]


def test_a_thought_ends_with_its_budget(chatty: Served):
    body = post(chatty, thinking={"type": "enabled", "budget_tokens": 10}).json()
    assert body["content"][0]["thinking"] == "I think."[: 10 - len("thought\n")].strip()
    assert body["usage"]["output_tokens_details"]["thinking_tokens"] == 10


def test_an_answer_follows_its_schema(client: anthropic.Anthropic):
    message = ask(client, 'say {"a": 7}', output_config={"format": {"type": "json_schema", "schema": AB}})
    assert json.loads(text_of(message)) == {"a": 7}
    forced = ask(client, "say no", output_config={"format": {"type": "json_schema", "schema": AB}})
    assert isinstance(json.loads(text_of(forced))["a"], int)


def test_a_stop_sequence_ends_the_answer_and_is_named(client: anthropic.Anthropic):
    message = ask(client, "say one two three", stop_sequences=["thr", "xyz"])
    assert (text_of(message), message.stop_reason, message.stop_sequence) == ("one two ", "stop_sequence", "thr")


def test_an_answer_is_cut_at_max_tokens(client: anthropic.Anthropic):
    message = ask(client, "count 30", max_tokens=7)
    assert (text_of(message), message.stop_reason, message.usage.output_tokens) == ("1 2 3 4", "max_tokens", 7)


def test_tokens_are_counted_as_they_are_read(client: anthropic.Anthropic):
    asked: dict[str, Any] = {
        "model": "chatty",
        "messages": [{"role": "user", "content": "say 4"}],
        "system": "Be.",
        "tools": [LS],
    }
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == client.messages.create(max_tokens=5, **asked).usage.input_tokens


def test_cached_tokens_are_counted_apart(random: Served):
    body = {"model": "random", "max_tokens": 1, "messages": [{"role": "user", "content": "word " * 300}]}
    first, again = (httpx.post(f"{random.url}/v1/messages", json=body, timeout=30).json()["usage"] for _ in range(2))
    assert first["cache_read_input_tokens"] == 0 < again["cache_read_input_tokens"]
    assert first["input_tokens"] == again["input_tokens"] + again["cache_read_input_tokens"]


def test_images_are_seen_in_messages_and_results(seeing: Served):
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}
    said = [{"role": "user", "content": [image, {"type": "text", "text": "See?"}]}]
    result = {"type": "tool_result", "tool_use_id": "x", "content": [image]}
    call = {"type": "tool_use", "id": "x", "name": "look", "input": {}}
    shown = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    for messages in (said, shown):
        with anthropic.Anthropic(base_url=seeing.url, api_key="any", max_retries=0) as client:
            with_image = client.messages.count_tokens(model="seeing", messages=messages).input_tokens
            message = client.messages.create(model="seeing", max_tokens=4, messages=messages)
        assert message.usage.input_tokens == with_image > 40


def test_documents_and_search_results_are_text(client: anthropic.Anthropic):
    blocks = [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "D"}, "title": "T"},
        {"type": "search_result", "title": "S", "source": "u", "content": [{"type": "text", "text": "R"}]},
    ]
    talk = [
        {"role": "user", "content": blocks},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "recall"},
    ]
    assert text_of(ask(client, "", messages=talk)) == "[user] T\nD\nS (u)\nR [model] b [user] recall"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages[0].content[0].source.type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}],
                    }
                ]
            },
            "messages[0].content[0].image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "no", "content": "a"}]}]},
            "messages[0].content[0].role",
        ),
        ({"tools": [{"name": "f", "input_schema": 3}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [LS], "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice"),
        ({"tool_choice": {"type": "every"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json"}}}, "output_config.format"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"temperature": "1"}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": 3}}}},
            "#/type is 3",
        ),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "prompt is too long"),
        ({"mcp_servers": [{"type": "url", "name": "a", "url": "b"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits"),
    ],
)
def test_what_is_wrong_is_named_in_anthropics_form(chatty: Served, body: dict[str, Any], named: str):
    answer = post(chatty, **body)
    assert answer.status_code == 400, answer.text
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert named in told["error"]["message"].partition(" (hint")[0]


def test_a_lenient_client_is_warned_in_place_of_refused(chatty: Served):
    body = post(chatty, lenient=True, thread={"type": "continue"}, mcp_servers=[{"name": "a"}]).json()
    assert {warning.partition(" ")[0] for warning in body["warnings"]} == {"mcp_servers", "thread"}
    assert body["content"][0]["text"] == "4"


def test_errors_have_anthropics_classes(chatty: Served, serve: Serve):
    with anthropic.Anthropic(base_url=chatty.url, api_key="any", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            ask(client, "a", model="claude")
        assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.InternalServerError) as broken:
            ask(client, "fail now and for all")
        assert broken.value.body["error"]["type"] == "api_error"  # type: ignore[index]
    guarded = serve(
        obedient_model(), "chatty", ServeOptions(api_keys=("right",), max_body=2000, max_streams=1), reference=True
    )
    with anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as wrong:
            ask(client, "a")
        assert wrong.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    with anthropic.Anthropic(base_url=guarded.url, api_key="right", max_retries=0) as client:
        assert text_of(ask(client, "say 4")) == "4"
        with pytest.raises(anthropic.RequestTooLargeError) as large:
            ask(client, "a" * 3000)
        assert large.value.body["error"]["type"] == "request_too_large"  # type: ignore[index]
        with pytest.raises(anthropic.PermissionDeniedError):
            ask(client, "a", extra_headers={"Host": "evil.example"})
        with client.messages.create(
            model="chatty", max_tokens=3000, messages=[{"role": "user", "content": "count 900"}], stream=True
        ) as held:
            next(iter(held))
            next(iter(held))
            with pytest.raises(anthropic.RateLimitError) as full:
                ask(client, "say 4")
        assert full.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
        assert full.value.response.headers["retry-after"]


def test_an_error_in_mid_stream_is_an_event(client: anthropic.Anthropic):
    asked: dict[str, Any] = {
        "model": "chatty",
        "max_tokens": 99,
        "messages": [{"role": "user", "content": "fail now and for all"}],
    }
    seen: list[str] = []
    with client.messages.create(**asked, stream=True) as stream, pytest.raises(anthropic.APIStatusError) as failed:
        seen.extend(event.type for event in stream)
    assert seen[0] == "message_start" and "content_block_delta" in seen and "message_stop" not in seen
    assert failed.value.body["error"]["type"] == "api_error"  # type: ignore[index]


def test_a_client_that_leaves_ends_its_answer(chatty: Served, client: anthropic.Anthropic):
    before = len(chatty.engine.cancelled)
    asked: dict[str, Any] = {
        "model": "chatty",
        "max_tokens": 3000,
        "messages": [{"role": "user", "content": "count 900"}],
    }
    with client.messages.create(**asked, stream=True) as stream:
        for event in stream:
            if event.type == "content_block_delta":
                break
    assert chatty.idle() and len(chatty.engine.cancelled) == before + 1


def test_a_silent_stream_is_kept_alive_by_pings(serve: Serve):
    served = serve(obedient_model(), "chatty", ServeOptions(keep_alive=0.05), reference=True)
    body = {"model": "chatty", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "wait 4"}]}
    with httpx.stream("POST", f"{served.url}/v1/messages", json=body, timeout=30) as answer:
        text = answer.read().decode()
    assert 'event: ping\ndata: {"type": "ping"}' in text
    assert text.rstrip().endswith('data: {"type": "message_stop"}')


def test_the_seed_decides_the_answer_and_a_puzzle_is_read_without_a_template(nano: Served):
    puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    with anthropic.Anthropic(base_url=nano.url, api_key="any", max_retries=0) as client:
        said = [ask(client, f"Solve {puzzle}", model="sudoku-nano", extra_body={"seed": 3}) for _ in range(2)]
    assert text_of(said[0]) == text_of(said[1])
    assert len("".join(text_of(said[0]).split())) == 81


def test_the_model_is_listed_as_anthropic_lists_one(client: anthropic.Anthropic):
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name, model.max_input_tokens) == ("chatty", "model", "chatty", 4096)
    assert client.models.retrieve("chatty").created_at == model.created_at
