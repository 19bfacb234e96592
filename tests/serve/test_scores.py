"""Log-probabilities of prompts (`echo` with `logprobs`), as evaluation harnesses ask for them."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from blockpress import sudoku
from tests.builders.server import Served

PUZZLE = sudoku.layout(sudoku.generate_puzzle(seed=5, givens=45).puzzle)
TEXT = "Ünter 日本 the 🙂 bridge.\n\n"
SCORE: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 0}


def create(served: Served, **body: Any) -> Any:
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def truth(served: Served, ids: list[int]) -> list[float]:
    logits = served.service.lm.next_token_logits(ids).log_softmax(-1)
    return [logits[place, token].item() for place, token in enumerate(ids[1:])]


@pytest.mark.parametrize("name", ["nano", pytest.param("random", marks=pytest.mark.slow)])
def test_an_echo_has_the_log_probabilities_of_all_logits(name: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(name)
    lm, text = served.service.lm, PUZZLE if name == "nano" else TEXT
    ids = lm.encode(text)
    [choice] = create(served, prompt=text, **SCORE)["choices"]
    logprobs = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(truth(served, ids), abs=2e-5)
    best = lm.next_token_logits(ids).log_softmax(-1).max(-1).values[:-1].tolist()
    assert [max(top.values()) for top in logprobs["top_logprobs"][1:]] == pytest.approx(best, abs=2e-5)


@pytest.mark.slow
def test_offsets_are_the_characters_in_which_tokens_begin(random: Served) -> None:
    logprobs = create(random, prompt=TEXT, **SCORE)["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\ufffd" in token or token == "<bos>" or TEXT[offset:].startswith(token)


@pytest.mark.parametrize("kind", ["text", "ids", "texts", "many ids"])
def test_every_kind_of_prompt_is_scored_and_answered_after_it(nano: Served, kind: str) -> None:
    ids = nano.service.lm.encode("12")
    prompt = {"text": "12", "ids": ids, "texts": ["12", "3"], "many ids": [ids, ids[:1]]}[kind]
    body = create(nano, prompt=prompt, echo=True, logprobs=1, max_tokens=1, n=2, seed=0, diffusion={"steps": 1})
    assert len(body["choices"]) == (4 if "s" in kind and kind != "ids" else 2)
    for choice in body["choices"][:2]:
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(truth(nano, ids), abs=2e-5)
        assert {len(part) for part in logprobs.values()} == {len(ids) + 1}
        assert choice["text"].startswith("12")


def test_nothing_is_computed_for_an_echo_alone_but_its_scores(nano: Served) -> None:
    body = create(nano, prompt=["12", "345"], **SCORE)
    assert [choice["text"] for choice in body["choices"]] == ["12", "345"]
    assert (body["usage"]["completion_tokens"], body["usage"]["diffusion"]["steps"]) == (0, 0)
    plain = create(nano, prompt="12", echo=True, max_tokens=0)
    assert plain["choices"][0]["logprobs"] is None


def test_a_stream_joined_is_the_scored_echo_and_its_answer(nano: Served) -> None:
    create_ = openai.OpenAI(base_url=f"{nano.url}/v1", api_key="none").completions.create
    for most in (0, 3):
        asked: Any = {"model": "", "prompt": "12", "echo": True, "logprobs": 2, "max_tokens": most, "seed": 1}
        asked["extra_body"] = {"diffusion": {"steps": 2}}
        whole = create_(**asked).choices[0]
        parts = [chunk.choices[0] for chunk in create_(**asked, stream=True)]
        assert "".join(part.text for part in parts) == whole.text
        assert parts[-1].finish_reason == whole.finish_reason
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [one for part in parts if part.logprobs for one in getattr(part.logprobs, name)]
            assert joined == getattr(whole.logprobs, name)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "1", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "1", "max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt": [99999], **SCORE}, None),
        ({"prompt": [], **SCORE}, "prompt"),
        ({"prompt": "1" * 5000, **SCORE}, None),
        ({"prompt": "1", **SCORE, "logprobs": 129}, "logprobs"),
    ],
)
def test_what_cannot_be_scored_is_refused(nano: Served, body: dict[str, Any], field: str | None) -> None:
    answer = httpx.post(f"{nano.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


def test_what_a_client_needs_of_the_tokenizer_is_told(seeing: Served, nano: Served) -> None:
    info = httpx.get(f"{seeing.url}/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
    assert "turn" in info["chat_template"]
    assert httpx.get(f"{nano.url}/tokenizer_info").json()["eos_token"]
