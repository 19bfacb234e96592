"""Ollama's API, asked by Ollama's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from blockpress.serve import ServeOptions
from tests.builders.chats import obedient_model, save_seeing
from tests.builders.hub_server import Hub, Repository, in_its_place
from tests.builders.server import Served
from tests.serve.conftest import PICTURE, Serve
from tests.serve.test_infill import AFTER, BEFORE

LS = {
    "type": "function",
    "function": {
        "name": "ls",
        "description": "Lists.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
SUM = {
    "type": "function",
    "function": {"name": "sum", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}
AB = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
def client(chatty: Served) -> Iterator[ollama.Client]:
    with ollama.Client(chatty.url) as client:
        yield client


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def post(served: Served, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/api/{path}", json={"model": "chatty", "stream": False, **body}, timeout=30)


def test_a_chat_is_answered(client: ollama.Client):
    answer = client.chat("chatty", said("say 4"))
    assert (answer.message.role, answer.message.content, answer.done, answer.done_reason) == (
        "assistant",
        "4",
        True,
        "stop",
    )
    assert answer.model == "chatty" and answer.created_at is not None and answer.created_at.endswith("Z")
    assert (answer.eval_count, answer.load_duration) == (2, 0)
    assert answer.prompt_eval_count is not None and answer.prompt_eval_count > 5
    durations = answer.prompt_eval_duration, answer.eval_duration
    assert None not in durations and sum(durations) == answer.total_duration > 10_000  # type: ignore[arg-type]


def test_all_turns_are_shown(client: ollama.Client):
    talk = [
        {"role": "system", "content": "Be."},
        *said("a"),
        {"role": "assistant", "content": "b", "thinking": "t"},
        *said("recall"),
    ]
    assert client.chat("chatty:latest", talk).message.content == "[system] Be. [user] a [model] b [user] recall"


@pytest.mark.parametrize("text", ["say Hello there.", 'call ls {"path": "a"} & sum {"n": 2}', "count 30"])
@pytest.mark.parametrize("think", [False, True])
def test_a_stream_joined_is_the_whole(client: ollama.Client, text: str, think: bool):
    whole = client.chat("chatty", said(text), tools=[LS, SUM], think=think, options={"seed": 1})
    chunks = list(client.chat("chatty", said(text), tools=[LS, SUM], think=think, options={"seed": 1}, stream=True))
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == (whole.message.thinking or "")
    assert [call for chunk in chunks for call in chunk.message.tool_calls or ()] == list(whole.message.tool_calls or ())
    assert chunks[-1].eval_count == whole.eval_count and chunks[-1].done_reason == whole.done_reason
    assert (whole.message.thinking is not None) == think


def test_a_stream_is_lines_of_json_and_the_default(chatty: Served):
    """`curl -d` says that it sends a form."""
    body = json.dumps({"model": "chatty", "messages": said("say 4")})
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = httpx.post(f"{chatty.url}/api/chat", content=body, headers=headers, timeout=30)
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["done"] for line in lines] == [False, True] and lines[0]["message"]["content"] == "4"


def test_a_call_and_its_result_make_a_round(client: ollama.Client):
    asked = 'call ls {"path": "a"} & sum {"n": 2}'
    first = client.chat("chatty", said(asked), tools=[LS, SUM]).message
    assert first.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in first.tool_calls] == [
        ("ls", {"path": "a"}),
        ("sum", {"n": 2}),
    ]
    results = [
        {"role": "tool", "tool_name": "sum", "content": "3"},
        {"role": "tool", "tool_name": "ls", "content": "none"},
    ]
    answer = client.chat("chatty", [*said(asked), first, *results], tools=[LS, SUM])
    assert answer.message.content == "sum said 3; ls said none"


def test_a_function_can_be_given_as_a_tool(client: ollama.Client):
    def ls(path: str) -> str:
        """List.

        Args:
            path: where.
        """
        return path

    (call,) = client.chat("chatty", said('call ls {"path": "a"}'), tools=[ls]).message.tool_calls or ()
    assert call.function.arguments == {"path": "a"}


@pytest.mark.parametrize("think", [True, "low", "high"])
def test_a_thought_is_apart_from_the_text(client: ollama.Client, think: Any):
    message = client.chat("chatty", said("say 4"), think=think).message
    assert (message.thinking or "").strip() == "I think." and message.content == "4"
    written = client.generate("chatty", "say 4", think=think)
    assert (written.thinking or "").strip() == "I think." and written.response == "4"


def test_an_answer_follows_its_schema(client: ollama.Client):
    assert json.loads(client.chat("chatty", said('say {"a": 7}'), format=AB).message.content or "") == {"a": 7}
    assert json.loads(client.generate("chatty", 'say {"a": 7}', format=AB).response or "") == {"a": 7}
    free = client.chat("chatty", said('say {"b": 1}'), format="json", options={"num_predict": 30}).message.content
    assert isinstance(json.loads(free or ""), dict)


def test_options_are_honoured(client: ollama.Client):
    cut = client.chat("chatty", said("count 30"), options={"num_predict": 7, "num_ctx": 4096, "temperature": 0.5})
    assert (cut.message.content, cut.done_reason, cut.eval_count) == ("1 2 3 4", "length", 7)
    stopped = client.chat(
        "chatty", said("say one two"), options={"stop": ["tw"], "num_predict": -1, "repeat_penalty": 1.0}
    )
    assert (stopped.message.content, stopped.done_reason) == ("one ", "stop")


def test_a_prompt_is_generated_from(client: ollama.Client):
    answer = client.generate("chatty", "recall", system="Be.")
    assert (answer.response, answer.done) == ("[system] Be. [user] recall", True)
    joined = "".join(chunk.response for chunk in client.generate("chatty", "say 4", stream=True))
    assert joined == "4"


def test_raw_is_the_prompt_as_it_stands(client: ollama.Client):
    asked = "<bos><|turn>user\nsay 4<turn|>\n<|turn>model\n"
    assert client.generate("chatty", asked, raw=True, options={"num_predict": 1}).response == "4"


def test_without_a_prompt_the_model_is_loaded(client: ollama.Client):
    assert client.generate("chatty", "").done_reason == "load"
    assert client.chat("chatty", []).done_reason == "load"
    assert client.generate("chatty", "", keep_alive=0).done_reason == "unload"


def test_the_model_is_listed_and_described(client: ollama.Client, nano: Served, seeing: Served):
    (listed,) = client.list().models
    assert listed.model == "chatty:latest" and listed.details is not None and listed.details.parameter_size is not None
    (loaded,) = client.ps().models
    assert (loaded.model, loaded.context_length, loaded.size_vram) == ("chatty:latest", 4096, 0)
    shown = client.show("chatty")
    assert shown.capabilities == ["completion", "insert", "tools", "thinking"]
    assert shown.modelinfo is not None and shown.modelinfo["general.architecture"] == "diffusion_gemma"
    assert shown.modelinfo["diffusion_gemma.context_length"] == 4096
    with ollama.Client(seeing.url) as other:
        assert other.show("seeing").capabilities == ["completion", "insert", "tools", "thinking", "vision"]
    with ollama.Client(nano.url) as other:
        (small,) = other.list().models
        assert small.size is not None and small.size > 100_000 and len(small.digest or "") == 64
        assert other.show("sudoku-nano:latest").capabilities == ["completion", "insert"]


def test_the_probes_of_clients_are_answered(chatty: Served):
    assert httpx.get(chatty.url, timeout=5).text == "Ollama is running"
    assert httpx.head(chatty.url, timeout=5).status_code == 200
    assert httpx.get(f"{chatty.url}/api/version", timeout=5).json()["version"].count(".") == 2


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with in_its_place(monkeypatch, tmp_path) as hub:
        yield hub


def test_a_model_is_fetched_from_the_hub_where_the_server_allows_it(serve: Serve, hub: Hub, tmp_path: Path) -> None:
    from blockpress.checkpoints.hub.cache import HubName, locate

    made = tmp_path / "made"
    save_seeing(made)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    hub.repositories["me/some-model"] = Repository(files)
    served = serve(obedient_model(), "chatty", ServeOptions(allow_pull=True), reference=True)
    client = ollama.Client(served.url)
    states = list(client.pull("me/some-model", stream=True))
    assert states[0].status == "pulling manifest"
    assert [state.status for state in states[-3:]] == ["verifying sha256 digest", "writing manifest", "success"]
    whole = [state for state in states if state.digest and state.completed == state.total]
    assert {len(files["model.safetensors"])} <= {state.total for state in whole}
    assert all(state.status == f"pulling {state.digest.partition(':')[2][:12]}" for state in whole)
    name = HubName.parse("me/some-model")
    assert name is not None
    found = locate(name)
    assert found is not None
    assert (found.path / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert client.pull("me/some-model").status == "success"  # nothing is left to fetch
    assert len(hub.of("model.safetensors")) == 1
    for wrong, status in (("me/none", 502), ("llama3", 400), ("../etc/passwd", 400)):
        with pytest.raises(ollama.ResponseError) as refused:
            client.pull(wrong)
        assert refused.value.status_code == status
    with pytest.raises(ollama.ResponseError, match="me/none"):
        list(client.pull("me/none", stream=True))


def test_a_model_that_is_here_is_pulled_and_others_are_refused(client: ollama.Client):
    assert client.pull("chatty").status == "success"
    assert [state.status for state in client.pull("chatty:latest", stream=True)][-1] == "success"
    with pytest.raises(ollama.ResponseError, match="fetches none") as refused:
        client.pull("me/some-model")
    assert refused.value.status_code == 403


def test_images_are_seen(seeing: Served):
    options = {"num_predict": 2}
    with ollama.Client(seeing.url) as client:
        talked = client.chat("seeing", [{"role": "user", "content": "See?", "images": [PICTURE]}], options=options)
        written = client.generate("seeing", "See?", images=[PICTURE], options=options)
    assert talked.prompt_eval_count == written.prompt_eval_count > 40  # type: ignore[operator]


def test_log_probabilities_come_with_the_text(random: Served):
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "options": {"num_predict": 3, "seed": 1}}
    with ollama.Client(random.url) as client:
        whole = client.chat("random", said("word"), **asked)
        chunks = list(client.chat("random", said("word"), stream=True, **asked))
    assert whole.logprobs is not None and len(whole.logprobs) == whole.eval_count
    assert all(len(one.top_logprobs or ()) == 2 for one in whole.logprobs)
    streamed = [one for chunk in chunks for one in chunk.logprobs or ()]
    assert streamed == list(whole.logprobs)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("chat", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ("chat", {"messages": 3}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": [3]}]}, "messages[0].images"),
        ("chat", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        (
            "chat",
            {"messages": [*said("a"), {"role": "assistant", "tool_calls": [3]}]},
            "messages[1].tool_calls[0].function",
        ),
        ("chat", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ("chat", {"format": "xml"}, "format"),
        ("chat", {"format": {"type": 3}}, "#/type is 3"),
        ("chat", {"think": "never"}, "think"),
        ("chat", {"options": {"temperature": -1}}, "options.temperature"),
        ("chat", {"options": {"top_k": -2}}, "options.top_k"),
        ("chat", {"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
        ("chat", {"options": {"min_p": 1.5}}, "options.min_p"),
        ("generate", {"options": {"presence_penalty": 3}}, "options.presence_penalty"),
        ("generate", {"options": {"repeat_penalty": 1.1, "repeat_last_n": -2}}, "options.repeat_last_n"),
        ("chat", {"options": {"mirostat": 2}}, "options.mirostat"),
        ("chat", {"top_logprobs": 300}, "top_logprobs"),
        ("generate", {"suffix": "b", "system": "c"}, "system"),
        ("generate", {"template": "b"}, "template"),
        ("generate", {"context": [1, 2]}, "context"),
        ("generate", {"raw": True, "system": "b"}, "system"),
        ("generate", {"images": [3]}, "images"),
        ("generate", {"images": ["bm8="]}, "images"),
    ],
)
def test_what_is_wrong_is_named_in_ollamas_form(
    chatty: Served, seeing: Served, path: str, body: dict[str, Any], named: str
):
    asked = {"messages": said("say 4")} if path == "chat" else {"prompt": "say 4"}
    bad_image = body.get("images") == ["bm8="]
    answer = post(
        seeing if bad_image else chatty, path, **{"model": "seeing" if bad_image else "chatty", **asked, **body}
    )
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    assert named in answer.json()["error"].partition(" (hint")[0]


def test_a_lenient_client_is_warned_in_place_of_refused(chatty: Served):
    body = post(
        chatty,
        "chat",
        messages=said("say 4"),
        lenient=True,
        options={"mirostat": 2, "repeat_penalty": 1.1, "repeat_last_n": 9, "typical_p": 0.5},
    ).json()
    assert [warning.partition(" ")[0] for warning in body["warnings"]] == ["options.mirostat", "options.typical_p"]
    assert body["message"]["content"] == "4"


def test_errors_are_one_text(chatty: Served, client: ollama.Client, serve: Serve):
    with pytest.raises(ollama.ResponseError) as unknown:
        client.chat("llama3", said("a"))
    assert unknown.value.status_code == 404 and "llama3" in unknown.value.error
    assert (
        httpx.post(f"{chatty.url}/api/embed", json={"model": "chatty"}, timeout=5)
        .json()["error"]
        .startswith("POST /api/embed")
    )
    guarded = serve(obedient_model(), "chatty", ServeOptions(api_keys=("right",), max_body=1000), reference=True)
    with ollama.Client(guarded.url) as strange, pytest.raises(ollama.ResponseError) as wrong:
        strange.list()
    assert wrong.value.status_code == 401
    key = {"Authorization": "Bearer right"}
    with ollama.Client(guarded.url, headers=key) as allowed, pytest.raises(ollama.ResponseError) as large:
        allowed.chat("chatty", said("a" * 2000))
    assert large.value.status_code == 413


def test_an_error_in_mid_stream_is_a_line(client: ollama.Client):
    seen = []
    stream = client.chat("chatty", said("fail now and for all"), stream=True)
    with pytest.raises(ollama.ResponseError, match="the network failed"):
        seen.extend(chunk.message.content for chunk in stream)
    assert "".join(filter(None, seen)).startswith("now and")


def test_a_client_that_leaves_ends_its_answer(chatty: Served):
    before = len(chatty.engine.cancelled)
    body = {"model": "chatty", "messages": said("count 900")}
    with httpx.stream("POST", f"{chatty.url}/api/chat", json=body, timeout=30) as answer:
        next(answer.iter_lines())
    assert chatty.idle() and len(chatty.engine.cancelled) == before + 1


def test_a_suffix_makes_a_prompt_a_hole(nano: Served):
    """The same text as OpenAI's completions with a suffix fill in."""
    before, after = BEFORE, AFTER
    with ollama.Client(nano.url) as client:
        whole = client.generate("sudoku-nano", before, suffix=after, options={"seed": 0})
        chunks = list(client.generate("sudoku-nano", before, suffix=after, options={"seed": 0}, stream=True))
    body = {"prompt": before, "suffix": after, "seed": 0}
    wanted = httpx.post(f"{nano.url}/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]
    assert whole.response == wanted == "".join(chunk.response for chunk in chunks)
