"""The clients of the two shapes against a local door: jevbench, openai and typesafe-sdk, where they are installed.

The door is a few lines of `http.server` over a random network with the published vocabulary: what counts is the contract.
Run it:  pip install jevbench "openai>=3.26" typesafe-sdk && python -m pytest tests/decide/test_clients.py
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from blockpress.chat import ChatTemplate
from blockpress.config import PRESETS, GenerationConfig
from blockpress.decide import Decision
from blockpress.decide.wire import format_decisions, format_systemone, parse_decisions, parse_systemone
from blockpress.errors import BlockpressError
from blockpress.lm import LM
from blockpress.text import Tokenizer

from ..conftest import make_random_network

DOORS: dict[str, Any] = {
    "/v1/systemone": (parse_systemone, format_systemone),
    "/v1/decisions": (parse_decisions, format_decisions),
}


def make_model(tokenizer: Tokenizer) -> LM:
    config = replace(PRESETS["tiny"](), vocab_size=tokenizer.vocab_size, canvas_length=64, context_length=16384)
    generation = GenerationConfig(stop_ids=(1,))
    return LM(path=Path(), network=make_random_network(config), generation=generation, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def address(gemma: Tokenizer) -> Iterator[str]:
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    lm = make_model(Tokenizer(gemma.backend, config=names, chat_template=ChatTemplate.own().source))

    class Door(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            parse, written = DOORS[self.path]
            try:
                asked = parse(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                decision = lm.decide(asked.context, asked.questions, **asked.options)
                assert isinstance(decision, Decision)
                status, body = 200, written(decision, asked.model)
            except BlockpressError as error:
                status, body = 400, {"error": {"message": str(error), "type": "invalid_request_error"}}
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_jevbench_runs_its_example_suite(address: str) -> None:
    jevbench = pytest.importorskip("jevbench")
    door = jevbench.systemone(f"{address}/v1/systemone", model="random")
    assert jevbench.check(door)["questions"] == {"noul": 4, "choice": 2, "score": 1}
    report = jevbench.evaluate(door, suite="examples", cache=None, bootstrap=10)
    assert report.result["errors"] == [] and len(report.result["planned_tests"]) == 50
    assert len({outcome["trial_id"] for outcome in report.result["outcomes"]}) == 50
    door.client.close()


def test_the_openai_client_reads_decisions(address: str) -> None:
    openai = pytest.importorskip("openai", minversion="3.26")
    questions = [
        {"type": "predicate", "name": "damaged", "instructions": "Is it damaged?"},
        {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": True}]},
        {"type": "score", "instructions": "How bad?", "levels": [{"label": "low"}, {"label": "high"}]},
    ]
    said = [{"role": "user", "content": [{"type": "input_text", "text": "A broken screen."}]}]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        for given in ("A broken screen.", said):
            decision = client.decisions.create(model="random", input=given, questions=questions)
            assert type(decision).model_validate(decision.model_dump(), strict=True) == decision
            assert [answer.type for answer in decision.answers] == ["predicate", "choice", "score"]
            assert [answer.name for answer in decision.answers] == ["damaged", None, None]
            assert [each.value for each in decision.answers[1].probabilities] == ["a", True]
            assert sum(each.probability for each in decision.answers[2].probabilities) == pytest.approx(1)
        with pytest.raises(openai.BadRequestError, match=r"questions\[0\].type is 'box'"):
            client.decisions.create(model="random", input="x", questions=[{"type": "box"}])


def test_the_typesafe_client_reads_systemone(address: str) -> None:
    sdk = pytest.importorskip("typesafe_sdk")
    questions = {
        "damaged": sdk.Noul(instructions="Is it damaged?"),
        "team": sdk.Choice(instructions="Which?", criteria={"a": "first", "b": None}),
        "level": sdk.Score(criteria=["low", "high"]),
    }
    with sdk.TypeSafeClient(api_key="none", base_url=address) as client:
        answered = client.system_one(state={"text": "A broken screen."}, questions=questions, model="random")
    assert 0 <= answered.nouls["damaged"].noul <= 1 and answered.model == "random"
    assert sum(answered.choices["team"].probabilities.values()) == pytest.approx(1)
    assert set(answered.scores["level"].probabilities) == {0, 1} == set(answered.scores["level"].legend)
    assert answered.usage.output_tokens == 3
