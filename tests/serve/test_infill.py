"""Holes by OpenAI's, llama.cpp's and Mistral's routes, and edits: only what stands in the hole comes back."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from blockpress import sudoku
from tests.builders.server import Served

PUZZLE = sudoku.generate_puzzle(seed=5, givens=45)
GRID = sudoku.layout(PUZZLE.solution)
BEFORE, HOLE, AFTER = sudoku.layout(PUZZLE.puzzle) + GRID[:42], GRID[42:45], GRID[45:]


def post(served: Served, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{served.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(served: Served, path: str, **body: Any) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{served.url}{path}", json={**body, "stream": True}, timeout=60) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_a_suffix_makes_a_completion_a_hole(nano: Served) -> None:
    create = openai.OpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0).completions.create
    whole = create(model="", prompt=BEFORE, suffix=AFTER, seed=0)
    assert whole.choices[0].text == HOLE
    chunks = create(model="", prompt=BEFORE, suffix=AFTER, seed=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == HOLE
    echoed = create(model="", prompt=BEFORE, suffix=AFTER, seed=0, n=2, echo=True)
    assert [choice.text for choice in echoed.choices] == [BEFORE + HOLE] * 2


def test_the_library_fills_the_same(nano: Served) -> None:
    reply = nano.service.lm.infill(BEFORE, AFTER, seed=0)
    assert reply.whole == BEFORE + HOLE + AFTER
    assert post(nano, "/v1/fim/completions", prompt=BEFORE, suffix=AFTER, seed=0)["choices"][0]["message"]["content"] == reply.text  # fmt: skip


def test_mistral_s_route(nano: Served) -> None:
    body = {"model": "sudoku-nano", "prompt": BEFORE, "suffix": AFTER, "random_seed": 0}
    whole = post(nano, "/v1/fim/completions", **body)
    assert (whole["choices"][0]["message"]["content"], whole["object"]) == (HOLE, "chat.completion")
    assert whole["usage"]["completion_tokens"] > 0
    streamed = events(nano, "/v1/fim/completions", **body)
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in streamed) == HOLE
    assert streamed[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_llama_cpp_s_route(nano: Served) -> None:
    body = {"input_prefix": BEFORE[:-1], "prompt": BEFORE[-1], "input_suffix": AFTER, "n_predict": 40, "seed": 0}
    whole = post(nano, "/infill", **body)
    assert (whole["content"], whole["stop"]) == (HOLE, True)
    assert whole["timings"]["predicted_n"] == whole["tokens_predicted"] == len(whole["tokens"])
    streamed = events(nano, "/infill", **body)
    assert "".join(each["content"] for each in streamed) == HOLE
    assert [each["stop"] for each in streamed] == [False] * (len(streamed) - 1) + [True]


def test_an_edit_writes_a_span_anew(nano: Served) -> None:
    span = [len(BEFORE), len(BEFORE + HOLE)]
    body = {"input": BEFORE + "111" + AFTER, "span": span, "noise": 1.0, "seed": 0}
    choice = post(nano, "/v1/edits", **body)["choices"][0]
    assert (choice["text"], choice["whole"]) == (HOLE, BEFORE + HOLE + AFTER)
    streamed = events(nano, "/v1/edits", **body)
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in streamed) == HOLE


def test_a_shape_holds_in_a_hole(nano: Served) -> None:
    body = {"prompt": "12", "suffix": "3", "max_tokens": 4, "structured_outputs": {"regex": "7{3}"}}
    assert post(nano, "/v1/fim/completions", **body)["choices"][0]["message"]["content"] == "777"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/completions", {"prompt": ["1", "2"], "suffix": "3"}, "prompt is not one text"),
        ("/v1/completions", {"prompt": "1", "suffix": "3", "logprobs": 1}, "logprobs are given with a suffix"),
        ("/v1/completions", {"prompt": "a", "suffix": "3"}, "no token for 'a'"),
        ("/v1/fim/completions", {"prompt": "1", "suffix": "3", "mode": "autoregressive"}, "mode is"),
        ("/v1/fim/completions", {"prompt": "1" * 300, "suffix": "3"}, "context"),
        ("/v1/fim/completions", {"prompt": "1", "stop": "2"}, "stop is"),
        ("/infill", {"input_prefix": "1", "input_extra": [{"filename": "a"}]}, "input_extra.0.text"),
        ("/v1/edits", {"input": "123", "span": [2, 1]}, "span"),
        ("/v1/edits", {"input": "123", "span": [0, 9]}, "span"),
        ("/v1/edits", {"input": "123", "noise": 2}, "noise"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_has_a_status_before_a_stream_begins(
    nano: Served, path: str, body: dict[str, Any], words: str, stream: bool
) -> None:
    answer = httpx.post(f"{nano.url}{path}", json={**body, "stream": stream}, timeout=30)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_client_that_leaves_ends_the_hole(nano: Served) -> None:
    slow = {"diffusion": {"steps": 1_000_000, "confidence": 0, "entropy_bound": 1e-9}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{nano.url}/v1/fim/completions", json={"prompt": "1", "suffix": "2", **slow}, timeout=1)
    assert nano.idle()
