"""What all tests here stand on: the servers answer, and the obedient model does what it is told."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from blockpress import sudoku
from tests.builders.server import Served


def ask(served: Served, text: str, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], **more}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


@pytest.mark.parametrize("name", ["nano", "chatty", "seeing", "random"])
def test_every_server_answers(name: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(name)
    text = "." * 80 + "1" if name == "nano" else "Hi"
    choice = ask(served, text, max_tokens=8, seed=1)
    assert choice["finish_reason"] in ("length", "stop")
    assert served.idle()


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ("say 4", "4"),
        ("count 12", "1 2 3 4 5 6 7 8 9 10 11 12"),
        ("wait now", "now"),
        ("Hi", "You said: Hi"),
        ("recall", "[user] recall"),
    ],
)
def test_the_obedient_model_does_what_it_is_told(chatty: Served, told: str, text: str) -> None:
    assert ask(chatty, told)["message"]["content"] == text
    thought = ask(chatty, told, reasoning_effort="low")["message"]
    assert thought["reasoning"].strip() == "I think."
    assert thought["content"].endswith(text)


def test_the_obedient_model_calls_what_it_is_told(chatty: Served) -> None:
    tool = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}
    choice = ask(chatty, 'call ls {"path": "a"} & ls', tools=[tool])
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"path": "a"}', "{}"]


def test_the_obedient_model_fails_when_told(chatty: Served) -> None:
    body = {"messages": [{"role": "user", "content": "fail now and for all"}]}
    answer = httpx.post(f"{chatty.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"


@pytest.mark.parametrize(
    ("edits", "options"),
    [
        ({"top_p": 0.7, "top_k": 3}, {"top_p": 0.7, "top_k": 3}),
        ({"presence_penalty": 1.5, "frequency_penalty": 1.0}, {"presence_penalty": 1.5, "frequency_penalty": 1.0}),
        ({"repetition_penalty": 1.6, "min_p": 0.2}, {"repeat_penalty": 1.6, "min_p": 0.2, "repeat_last_n": -1}),
        ({"repetition_penalty": 1.6, "repeat_last_n": 64}, {"repeat_penalty": 1.6}),  # Ollama's default
        ({"repetition_penalty": 1.6, "repeat_last_n": 3}, {"repeat_penalty": 1.6, "repeat_last_n": 3}),
        ({}, {"repeat_penalty": 1.6, "repeat_last_n": 0}),
    ],
    ids=str,
)
def test_edits_of_the_logits_mean_the_same_by_every_api(
    nano: Served, edits: dict[str, Any], options: dict[str, Any]
) -> None:
    """Each under its own names; the answers are those of chat completions with the same seed."""
    diffusion = {"steps": 3, "t_max": 3.0}
    puzzle = sudoku.layout(sudoku.generate_puzzle(seed=5, givens=45).puzzle)
    said, shared = [{"role": "user", "content": puzzle}], {"seed": 5, "diffusion": diffusion}

    def post(path: str, **body: Any) -> Any:
        answer = httpx.post(f"{nano.url}/{path}", json={"model": "sudoku-nano", **shared, **body}, timeout=60)
        assert answer.status_code == 200 and "warnings" not in answer.json(), answer.text
        return answer.json()

    text = post("v1/chat/completions", messages=said, max_tokens=12, **edits)["choices"][0]["message"]["content"]
    assert text
    ollama = {"messages": said, "stream": False, "diffusion": diffusion}
    answer = post("api/chat", **ollama, options={"num_predict": 12, "seed": 5, **options})
    assert answer["message"]["content"] == text
    if edits.keys() <= {"top_p", "top_k"}:
        assert post("v1/messages", messages=said, max_tokens=12, **edits)["content"][0]["text"] == text
    if edits.keys() <= {"top_p", "presence_penalty", "frequency_penalty"}:
        answer = post("v1/responses", input=said, max_output_tokens=12, **edits)
        assert answer["output"][0]["content"][0]["text"] == text
        assert {name: answer[name] for name in edits} == edits
