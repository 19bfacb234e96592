"""What the server says about itself: models, tokens, figures, decisions."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

import blockpress
from blockpress import sudoku
from tests.builders.server import Served


def test_the_model_is_listed_with_the_context_that_it_has(nano: Served) -> None:
    listed = httpx.get(f"{nano.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["sudoku-nano"]
    assert listed[0]["max_model_len"] == 256
    assert httpx.get(f"{nano.url}/v1/models/sudoku-nano").json() == listed[0]
    props = httpx.get(f"{nano.url}/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 256
    assert props["canvas_length"] == 90
    assert props["modes"] == ["diffusion", "verified", "autoregressive"]
    assert len(httpx.get(f"{nano.url}/slots").json()) == props["total_slots"]
    assert httpx.get(f"{nano.url}/version").json() == {"version": blockpress.__version__}


def test_tokens_are_those_of_the_tokenizer_and_come_back(chatty: Served, nano: Served) -> None:
    made = httpx.post(f"{nano.url}/tokenize", json={"prompt": "12\n3", "return_token_strs": True}).json()
    assert made["tokens"] == nano.service.lm.encode("12\n3")
    assert len(made["token_strs"]) == made["count"] == len(made["tokens"])
    assert httpx.post(f"{nano.url}/detokenize", json={"tokens": made["tokens"]}).json()["prompt"] == "12\n3"
    chat = [{"role": "user", "content": "Hi"}]
    told = httpx.post(f"{chatty.url}/tokenize", json={"messages": chat}).json()["tokens"]
    assert told == list(chatty.service.lm.build_chat_requests(chat)[0].row.prompt)


@pytest.mark.parametrize(("path", "body", "param"), [("tokenize", {}, "body"), ("tokenize", {"prompt": "1", "content": "1"}, "body"), ("detokenize", {"tokens": [99999]}, None), ("detokenize", {"tokens": ["1"]}, "tokens.0")])  # fmt: skip
def test_a_wrong_text_or_token_is_named(nano: Served, path: str, body: dict[str, Any], param: str | None) -> None:
    answer = httpx.post(f"{nano.url}/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_chat_is_tokenised_without_a_template_as_it_is_answered(nano: Served) -> None:
    made = httpx.post(f"{nano.url}/tokenize", json={"messages": [{"role": "user", "content": "12"}]}).json()
    assert made["tokens"] == nano.service.lm.encode("12")
    wrong = httpx.post(f"{nano.url}/tokenize", json={"messages": []})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages")


def test_the_document_declares_bodies_and_errors_as_they_are(nano: Served) -> None:
    document = httpx.get(f"{nano.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert ("requestBody" in operation) == (method == "post"), path
            assert "422" not in operation["responses"]
            if method == "post":
                answer = httpx.post(f"{nano.url}{path}", content="[")
                assert answer.status_code == 400
                schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
                jsonschema.validate(answer.json(), schema)


def test_figures_are_prometheus_and_count_what_was_answered(nano: Served) -> None:
    def figures() -> dict[str, float]:
        text = httpx.get(f"{nano.url}/metrics").text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels == {"model_name": "sudoku-nano"}
        }

    before = figures()
    puzzle = sudoku.layout(sudoku.generate_puzzle(seed=5, givens=45).puzzle)
    answer = httpx.post(f"{nano.url}/v1/completions", json={"prompt": puzzle, "max_tokens": 5}).json()
    after = figures()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("vllm:generation_tokens_total") == answer["usage"]["completion_tokens"]
    assert grown("vllm:prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    steps = answer["usage"]["diffusion"]["steps"]
    assert grown("vllm:diffusion_num_denoising_steps_total") == steps
    assert grown("vllm:diffusion_num_canvas_positions_total") == 90 * steps
    assert grown("vllm:e2e_request_latency_seconds_count") == grown("vllm:time_to_first_token_seconds_count") == 1
    assert after["vllm:num_requests_running"] == 0
    assert httpx.get(f"{nano.url}/load").json() == {"server_load": 0}


def test_decisions_are_told_apart_by_their_body(nano: Served) -> None:
    puzzle = sudoku.layout(sudoku.generate_puzzle(seed=5, givens=45).puzzle)
    answer = httpx.post(f"{nano.url}/v1/decisions", json={"model": "x", "input": puzzle, "questions": []})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    for path in ("decisions", "systemone"):
        wrong = httpx.post(f"{nano.url}/v1/{path}", content="[")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "body")


def test_decisions_in_both_shapes(seeing: Served) -> None:
    question = {"type": "predicate", "name": "q", "instructions": "Is it so?"}
    body = {"model": "seeing", "input": "Hi", "questions": [question]}
    answer = httpx.post(f"{seeing.url}/v1/decisions", json=body, timeout=30).json()
    assert 0 <= answer["answers"][0]["probability"] <= 1
    asked = {"q": {"type": "noul", "instructions": "Is it so?"}}
    for path in ("decisions", "systemone"):
        other = {"model": "seeing", "state": "Hi", "questions": asked}
        assert "q" in httpx.post(f"{seeing.url}/v1/{path}", json=other, timeout=30).json()["answers"]
    assert httpx.post(f"{seeing.url}/v1/decisions", json={**body, "model": "x"}).status_code == 404
