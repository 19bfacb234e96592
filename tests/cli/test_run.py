"""`blockpress run`: text on stdout and nothing else, in every form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import blockpress
from blockpress import sudoku
from blockpress.cli.doctor import PUZZLE
from blockpress.cli.serialize import event_to_dict
from blockpress.decoding import Done

from .conftest import Call, Screen

PROMPT = sudoku.layout(PUZZLE)


def test_text_goes_to_stdout_and_its_cost_to_stderr(call: Call) -> None:
    expected = blockpress.load("sudoku-nano").generate(PROMPT)
    done = call("run", "sudoku-nano", PROMPT)
    assert done.code == 0 and done.out == f"{expected.text}\n"
    assert "tokens per forward" in done.err and len(done.err.splitlines()) == 1
    for arguments in (["run"], ["run", "sudoku-nano"], ["run", "sudoku-nano", "-"]):
        assert call(*arguments, stdin=PROMPT + "\n").out == done.out


def test_json_is_the_reply(call: Call, untrained: Path) -> None:
    reply = blockpress.load(untrained).generate(PROMPT, max_tokens=30, seed=4)
    done = call("run", untrained, PROMPT, "--json", "--max-tokens", 30, "--seed", 4)
    said = json.loads(done.out)
    assert not done.err and said["text"] == reply.text and said["tokens"] == reply.tokens
    assert said["finish_reason"] == reply.finish_reason and said["usage"] == vars(reply.usage)


def test_events_are_one_json_object_a_line(call: Call, untrained: Path) -> None:
    lm = blockpress.load(untrained)
    sampling = lm.generation.sampling.with_(steps=2)
    done = call("run", untrained, PROMPT, "--events", "--max-tokens", 95, "--steps", 2)
    said = [json.loads(line) for line in done.out.splitlines()]
    events = list(lm.stream(PROMPT, 95, 0, sampling))
    assert said == [json.loads(json.dumps(event_to_dict(lm, event))) for event in events]
    assert {each["event"] for each in said} >= {"step", "commit", "text", "done"}
    last = events[-1]
    assert isinstance(last, Done) and "".join(e["text"] for e in said if e["event"] == "text") == last.reply.text


def test_every_sampling_field_is_honoured(call: Call, untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stream = blockpress.LM.stream
    monkeypatch.setattr(blockpress.LM, "stream", lambda *a, **k: seen.append(a[4]) or stream(*a, **k))
    fields = (
        "--steps",
        3,
        "--entropy-bound",
        0.2,
        "--t-min",
        0.5,
        "--t-max",
        0.9,
        "--stability",
        2,
        "--repair-below",
        0.02,
    )
    call(
        "run",
        untrained,
        "1",
        *fields,
        "--confidence",
        0.1,
        "--max-verifications",
        2,
        "--stop",
        "7",
        "--stop",
        "88",
        "--max-tokens",
        5,
    )
    assert vars(seen[0]) == {
        "steps": 3,
        "entropy_bound": 0.2,
        "t_min": 0.5,
        "t_max": 0.9,
        "stability": 2,
        "confidence": 0.1,
        "max_verifications": 2,
        "max_repairs": 0,
        "repair_below": 0.02,
        "checked_spans": None,
        "stop": ("7", "88"),
        "accept": None,  # rules are Python values, no flags
        "settle": None,
    }


def test_a_type_and_a_device_are_honoured(call: Call) -> None:
    done = call("run", "sudoku-nano", PROMPT, "--dtype", "bfloat16", "--device", "cpu", "--json")
    assert done.code == 0
    expected = blockpress.load("sudoku-nano", dtype="bfloat16").generate(PROMPT)
    assert json.loads(done.out)["text"] == expected.text


def test_a_terminal_shows_the_canvas_and_keeps_the_text(call: Call, screen: Screen) -> None:
    done = call("run", "sudoku-nano", PROMPT, "--fast", screen=screen)
    text = blockpress.load("sudoku-nano").generate(PROMPT).text
    assert text is not None and "\n".join(done.out.replace("\r", "").split("\x1b")[-1:]) != ""
    for line in text.splitlines():
        assert line in done.out
    assert "stopped after 90 tokens: 1 canvas" in done.out and done.out.endswith("\x1b[?25h")
