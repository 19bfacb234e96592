"""Chat completions and completions, by OpenAI's own Python client against real servers."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase
from pydantic import BaseModel

import blockpress
from blockpress import sudoku
from blockpress.lm import LM
from blockpress.serve.fields import REFUSED
from tests.builders.server import Served
from tests.serve.conftest import Serve

PUZZLE, SOLVED = (
    sudoku.layout(x)
    for x in (sudoku.generate_puzzle(seed=5, givens=45).puzzle, sudoku.generate_puzzle(seed=5, givens=45).solution)
)
BRIEF: dict[str, Any] = {"messages": [{"role": "user", "content": "1"}], "diffusion": {"steps": 1}}
LONG = {"steps": 1_000_000, "confidence": 0, "entropy_bound": 1e-9}
DOCS = Path(__file__).parents[2] / "docs"


def client(served: Served, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, **options)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def ask(served: Served, text: str, **options: Any) -> Any:
    return client(served).chat.completions.create(model="", messages=said(text), **options)


def test_the_shipped_model_solves_a_puzzle_among_words(nano: Served) -> None:
    answer = ask(nano, f"Please solve this:\n{PUZZLE}\n", seed=0)
    assert sudoku.is_solved((answer.choices[0].message.content or "").replace("\n", ""))
    assert (answer.model, answer.choices[0].finish_reason) == ("sudoku-nano", "stop")
    assert answer.usage.completion_tokens == 90
    assert answer.usage.diffusion["steps"] >= 1
    assert answer.usage.diffusion["tokens_per_forward"] > 1


def test_a_stream_joined_is_the_whole_answer(nano: Served) -> None:
    whole = ask(nano, PUZZLE, seed=3)
    stream = ask(nano, PUZZLE, seed=3, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper_of_the_client_reads_us(chatty: Served) -> None:
    with client(chatty).chat.completions.stream(model="chatty", messages=said("count 20")) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == " ".join(map(str, range(1, 21)))


def test_choices_have_seeds_that_follow_each_other(nano: Served) -> None:
    hot: Any = {"temperature": 2, "max_tokens": 8, "extra_body": {"mode": "autoregressive"}}
    several = ask(nano, "1", n=3, seed=7, **hot)
    alone = [ask(nano, "1", seed=seed, **hot).choices[0].message.content for seed in (7, 8, 9)]
    assert [choice.message.content for choice in several.choices] == alone
    assert len(set(alone)) > 1
    assert several.usage.prompt_tokens == ask(nano, "1", seed=7, **hot).usage.prompt_tokens


def test_the_same_seed_gives_the_same_answer_beside_others(nano: Served) -> None:
    texts: list[str] = [""] * 8

    def go(number: int) -> None:
        texts[number] = ask(nano, PUZZLE, seed=number % 2, logprobs=True).choices[0].model_dump_json()

    threads = [threading.Thread(target=go, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts[::2])) == len(set(texts[1::2])) == 1, "log-probabilities included"


@pytest.mark.parametrize("most", [1, 2, 29, 89])
def test_max_tokens_is_exact(nano: Served, most: int) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(nano, PUZZLE, **{name: most})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (most, "length")


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(chatty: Served) -> None:
    for stop in ("4", ["17", "4"]):
        answer = ask(chatty, "count 20", stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("1 2 3 ", "stop")


def test_log_probabilities_are_those_of_the_tokens(nano: Served) -> None:
    choice = ask(nano, PUZZLE, logprobs=True, top_logprobs=2, max_tokens=12).choices[0]
    content = choice.logprobs.content
    assert "".join(one.token for one in content) == choice.message.content
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in content)
    assert all(bytes(one.bytes).decode() == one.token for one in content)
    streamed = [c.choices[0].logprobs for c in ask(nano, PUZZLE, logprobs=True, max_tokens=12, stream=True, seed=0)]
    assert [one.token for part in streamed if part for one in part.content] == [one.token for one in content]


def test_a_schema_is_kept(nano: Served) -> None:
    schema = {"type": "integer", "minimum": 10, "maximum": 99}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    value = int(ask(nano, "1", response_format=form).choices[0].message.content)
    assert 10 <= value <= 99
    for outputs, wanted in (({"regex": "1{5}"}, "1" * 5), ({"choice": ["7", "77"]}, "7"), ({"json": schema}, "")):
        text = ask(nano, "1", extra_body={"structured_outputs": outputs}).choices[0].message.content
        assert text.startswith(wanted) and text.isdigit()


class Point(BaseModel):
    x: int


@pytest.mark.slow
def test_parsed_answers(random: Served) -> None:
    answer = client(random).chat.completions.parse(model="", messages=said("Where?"), response_format=Point)
    assert isinstance(answer.choices[0].message.parsed, Point)


TOOL: Any = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}


def test_tools_are_called_and_their_results_are_read(chatty: Served) -> None:
    first = ask(chatty, 'call ls {"path": "a"} & ls', tools=[TOOL]).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    calls = first.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"path": "a"}, {}]
    assert len({call.id for call in calls}) == 2
    history = [*said('call ls {"path": "a"} & ls'), first.message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": call.id, "content": "b.txt"} for call in calls]
    second = client(chatty).chat.completions.create(model="", messages=[*history, *said("say done")], tools=[TOOL])
    assert second.choices[0].message.content == "done"


def test_calls_are_streamed_in_the_client_s_form(chatty: Served) -> None:
    with client(chatty).chat.completions.stream(model="", messages=said('call ls {"p": 1}'), tools=[TOOL]) as stream:
        final = stream.until_done().get_final_completion()
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == {"p": 1}
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_call_can_be_required(seeing: Served) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]},
        },
    }
    choice = ask(seeing, "Hi", tools=[tool], tool_choice="required", parallel_tool_calls=False).choices[0]
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"a": 1}]


def test_a_thought_has_both_names(chatty: Served) -> None:
    message = ask(chatty, "say 4", reasoning_effort="low").choices[0].message
    assert message.reasoning == message.reasoning_content
    assert "I think." in message.reasoning
    assert message.content == "4"
    hidden = ask(
        chatty, "say 4", extra_body={"include_reasoning": False, "chat_template_kwargs": {"enable_thinking": True}}
    )
    assert not hasattr(hidden.choices[0].message, "reasoning")
    chunks = [c.choices[0].delta for c in ask(chatty, "say 4", reasoning_effort="high", stream=True) if c.choices]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in chunks) == message.reasoning


def test_frames_are_an_extra_that_joins_to_the_answer(nano: Served) -> None:
    stream = ask(nano, PUZZLE, seed=0, stream=True, extra_body={"diffusion": {"frames": True}})
    chunks = list(stream)
    frames = [chunk for chunk in chunks if getattr(chunk, "canvas", None)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(frames) > 1
    assert "".join(frames[-1].canvas["pieces"]).startswith(text)
    assert [frame.step for frame in frames] == list(range(1, len(frames) + 1))
    assert not any(getattr(chunk, "canvas", None) for chunk in ask(nano, PUZZLE, seed=0, stream=True))


def test_completions_take_text_ids_and_lists(nano: Served) -> None:
    create = client(nano).completions.create
    ids = httpx.post(f"{nano.url}/tokenize", json={"prompt": PUZZLE}).json()["tokens"]
    one = create(model="", prompt=PUZZLE, max_tokens=90, seed=0)
    assert create(model="", prompt=ids, max_tokens=90, seed=0).choices[0].text == one.choices[0].text
    both = create(model="", prompt=[PUZZLE, "12"], max_tokens=9, seed=0, n=2, echo=True)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text.startswith(PUZZLE + one.choices[0].text[:9])
    assert both.choices[3].text.startswith("12")
    streamed = create(model="", prompt=PUZZLE, max_tokens=90, seed=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_completions_report_log_probabilities(nano: Served) -> None:
    choice = client(nano).completions.create(model="", prompt=PUZZLE, max_tokens=5, logprobs=2).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)


def test_a_client_that_leaves_frees_the_engine(nano: Served) -> None:
    for stream in (True, False):

        def wait(stream: bool = stream) -> None:
            asked = client(nano, timeout=0.5).chat.completions
            list(asked.create(model="", messages=said("1"), stream=stream, extra_body={"diffusion": LONG}))

        with pytest.raises((httpx.ReadTimeout, openai.APITimeoutError)):
            wait()
        assert nano.idle()
        until = time.monotonic() + 5
        while nano.service.engine.core.busy and time.monotonic() < until:
            time.sleep(0.01)
        assert not nano.service.engine.core.busy


def test_an_error_in_mid_stream_is_an_event(chatty: Served) -> None:
    with pytest.raises(openai.APIError, match="the network failed"):
        list(ask(chatty, "fail now and for all", stream=True))


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({}, 400, "messages"),
        ({"messages": said("1"), "temperature": "1"}, 400, "temperature"),
        ({"messages": said("1"), "temperature": -1}, 400, "temperature"),
        ({"messages": said("1"), "n": 0}, 400, "n"),
        ({"messages": said("1"), "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": said("1"), "top_logprobs": 1}, 400, "top_logprobs"),
        ({"messages": said("1"), "mode": "fast"}, 400, "mode"),
        ({"messages": said("1"), "diffusion": {"step": 1}}, 400, "diffusion.step"),
        (
            {"messages": said("1"), "response_format": {"type": "json_schema"}},
            400,
            "response_format.json_schema.schema",
        ),
        ({"messages": said("hello")}, 400, "messages"),
        ({"messages": said("1"), "model": "gpt-4"}, 404, None),
        ({"messages": said("1"), "structured_outputs": {"regex": "("}}, 400, None),
        ({"messages": said("1"), "structured_outputs": {"grammar": "a"}}, 400, "structured_outputs.grammar"),
        (
            {"messages": said("1"), "structured_outputs": {"structural_tag": "a"}},
            400,
            "structured_outputs.structural_tag",
        ),
        ({"messages": said("1"), "structured_outputs": {"json": "{"}}, 400, "structured_outputs.json"),
        ({"messages": said("1"), "structured_outputs": {"json": "[" * 100_000}}, 400, "structured_outputs.json"),
        ({"messages": said("1"), "structured_outputs": {"regex": "1", "choice": ["1"]}}, 400, None),
        ({"messages": said("1"), "response_format": {"type": "grammar", "grammar": "a"}}, 400, "response_format.type"),
        ({"messages": said("1"), "response_format": {"type": "regex", "regex": 1}}, 400, None),
        ({"messages": said("1"), "response_format": {"type": "choice", "choice": 1}}, 400, None),
        ({"messages": said("1" * 300)}, 400, None),
    ],
)
def test_what_is_wrong_is_named(nano: Served, body: dict[str, Any], status: int, param: str | None) -> None:
    answer = httpx.post(f"{nano.url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert "hint:" in error["message"]


def test_a_body_that_is_not_json_is_named(nano: Served) -> None:
    answer = httpx.post(f"{nano.url}/v1/chat/completions", content="{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")


UNHONOURED = {name: why for name, (_, why) in REFUSED.items()} | {
    "guided_json": "removed from vLLM",
}
VALUES: dict[str, Any] = {"guided_json": {}}


@pytest.mark.parametrize("name", UNHONOURED)
def test_a_field_that_cannot_be_honoured_is_refused_or_listed(nano: Served, name: str) -> None:
    body = {**BRIEF, "presence_penalty": 0.5, name: VALUES.get(name, "x")}
    refused = httpx.post(f"{nano.url}/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    allowed = httpx.post(f"{nano.url}/v1/chat/completions", json={**body, "lenient": True})
    assert allowed.status_code == 200
    assert any(name in warning for warning in allowed.json()["warnings"])
    for neutral in (None, *REFUSED.get(name, ((), ""))[0]):
        plain = httpx.post(f"{nano.url}/v1/chat/completions", json={**body, name: neutral})
        assert plain.status_code == 200
        assert "warnings" not in plain.json()


def table() -> dict[str, str]:
    """What docs/server.md says of each field."""
    rows = re.findall(r"^\| (`[^|]*`[^|]*) \| (honoured|refused|no meaning) \|", (DOCS / "server.md").read_text(), re.M)
    return {name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}


def test_every_field_of_openai_is_in_the_table() -> None:
    for kind in (chat_params.CompletionCreateParamsBase, CompletionCreateParamsBase):
        assert set(get_type_hints(kind)) - {"prompt"} <= table().keys()
    assert {name for name, kind in table().items() if kind == "refused"} >= set(REFUSED)


@pytest.mark.parametrize("name", [name for name, kind in table().items() if kind == "no meaning"])
def test_a_field_without_meaning_is_accepted(nano: Served, name: str) -> None:
    value = {"metadata": {"a": "b"}, "store": True}.get(name, "x")
    answer = httpx.post(f"{nano.url}/v1/chat/completions", json={**BRIEF, name: value})
    assert answer.status_code == 200, answer.text


FIVE, SIX = 10, 11  # ids of sudoku-nano
EDITS: list[tuple[dict[str, Any], Any]] = [
    ({"logit_bias": {str(FIVE): 100}}, lambda text: set(text) == {"5"}),
    ({"logit_bias": {str(FIVE): -100, str(SIX): -100}}, lambda text: not {*text} & {"5", "6"}),
    ({"allowed_token_ids": [FIVE, SIX]}, lambda text: {*text} <= {"5", "6"}),
    ({"presence_penalty": 2, "frequency_penalty": 2.0, "repetition_penalty": 1.5}, None),
    ({"repeat_penalty": 1.5, "repeat_last_n": -1}, None),
    ({"repeat_penalty": 1.5, "frequency_penalty": 1, "repeat_last_n": 3}, None),
    ({"presence_penalty": 2, "repeat_last_n": 0}, None),
    ({"top_p": 0.9, "top_k": 3, "min_p": 0.05}, None),
    ({"top_p": 5e-324, "min_p": 5e-324}, None),
    ({"bad_words": ["5", "6", "no word of this vocabulary"]}, lambda text: not {*text} & {"5", "6"}),
]


@pytest.fixture(scope="module")
def library() -> LM:
    return blockpress.load("sudoku-nano")


@pytest.mark.parametrize(("edits", "holds"), EDITS, ids=[" ".join(edits) for edits, _ in EDITS])
@pytest.mark.parametrize(("path", "mode"), [("v1/chat/completions", "diffusion"), ("v1/completions", "autoregressive")])
def test_edits_of_the_logits_are_honoured(
    nano: Served, library: LM, path: str, mode: str, edits: dict[str, Any], holds: Any
) -> None:
    """What is sent is what the sampling says, in every mode: the text is that of `LM.generate`."""
    lm = library
    asked = {"prompt": PUZZLE} if path == "v1/completions" else {"messages": said(PUZZLE)}
    heat = {"temperature": 1.5} if mode == "autoregressive" else {"diffusion": {"steps": 3, "release": 0}}
    body = {**asked, "max_tokens": 9, "seed": 4, "mode": mode, **heat, **edits}
    answer = httpx.post(f"{nano.url}/{path}", json=body)
    assert answer.status_code == 200 and "warnings" not in answer.json(), answer.text
    [choice] = answer.json()["choices"]
    fields = {name: value for name, value in edits.items() if name != "repeat_penalty"}
    if fields.get("repeat_last_n") == -1:
        del fields["repeat_last_n"]
    if "repeat_penalty" in edits:
        fields["repetition_penalty"] = edits["repeat_penalty"]
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(key): value for key, value in fields["logit_bias"].items()}
    if "bad_words" in fields:
        fields["suppress_tokens"] = [FIVE, SIX] if fields.pop("bad_words") else []
    own = {"steps": 3} if mode == "diffusion" else {"temperature": 1.5}
    defaults: Any = lm.generation.sampling if mode == "diffusion" else lm.generation.autoregressive
    prompt = lm.encode(PUZZLE)
    wanted = lm.generate(prompt, 9, 4, defaults.with_(**own, **fields), mode=mode)  # type: ignore[call-overload]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert text == wanted.text
    assert holds is None or holds(text.replace("\n", "0"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_words": ["56"]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": "5"}, "bad_words"),
    ],
    ids=str,
)
def test_an_edit_out_of_range_is_named(nano: Served, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{nano.url}/v1/chat/completions", json={**BRIEF, **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param), answer.text


def test_a_server_can_be_lenient(serve: Serve) -> None:
    from blockpress.serve import ServeOptions

    served = serve(blockpress.load("sudoku-nano"), "sudoku-nano", ServeOptions(lenient=True))
    body: dict[str, Any] = {**BRIEF, "min_tokens": 5}
    assert "min_tokens" in httpx.post(f"{served.url}/v1/chat/completions", json=body).json()["warnings"][0]
    body["lenient"] = False
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 400


def test_text_is_sent_before_its_canvas_ends_unless_it_is_switched_off(nano: Served) -> None:
    hard = sudoku.layout(sudoku.generate_puzzle(seed=1, givens=32).puzzle)  # ten steps

    def pieces(**diffusion: int) -> list[str]:
        stream = ask(nano, hard, seed=0, stream=True, extra_body={"diffusion": diffusion})
        return [chunk.choices[0].delta.content for chunk in stream if chunk.choices[0].delta.content]

    assert len(pieces(release=1)) > 1
    assert len(pieces(release=0)) == 1
    whole = ask(nano, hard, seed=0, extra_body={"diffusion": {"release": 1}})
    assert "".join(pieces(release=1)) == whole.choices[0].message.content


def test_a_prediction_is_what_the_answer_starts_from(chatty: Served, nano: Served) -> None:
    answer = ask(nano, PUZZLE, seed=0, prediction={"type": "content", "content": SOLVED})
    details = answer.usage.completion_tokens_details
    assert answer.choices[0].message.content == SOLVED
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (len(SOLVED), 0)
    assert answer.usage.diffusion["steps"] <= ask(nano, PUZZLE, seed=0).usage.diffusion["steps"]
    told = ask(chatty, "say 12345", prediction={"type": "content", "content": [{"type": "text", "text": "12x45"}]})
    assert told.choices[0].message.content == "12345"
    assert told.usage.completion_tokens_details.accepted_prediction_tokens == 4
    thinking = {"messages": said("say 4"), "prediction": {"content": "4"}, "reasoning_effort": "low"}
    assert httpx.post(f"{chatty.url}/v1/chat/completions", json=thinking).status_code == 400


def test_a_prompt_that_was_read_before_is_counted_as_cached(nano: Served) -> None:
    asked = {"prompt": PUZZLE, "max_tokens": 1, "diffusion": {"steps": 1}}
    counts = [httpx.post(f"{nano.url}/v1/completions", json=asked).json()["usage"] for _ in range(2)]
    assert counts[1]["prompt_tokens_details"]["cached_tokens"] > 0


def test_token_ids_are_returned_where_they_are_asked_for(nano: Served) -> None:
    body = {**BRIEF, "return_token_ids": True}
    choice = httpx.post(f"{nano.url}/v1/chat/completions", json=body).json()["choices"][0]
    assert nano.service.lm.decode(choice["token_ids"]) == choice["message"]["content"]
