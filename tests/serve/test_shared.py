"""What all tests here stand on: the servers answer, and the obedient model does what it is told."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

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
