"""`blockpress run`: text on stdout and nothing else, in every form."""

from __future__ import annotations

import json
import re
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
    lm = blockpress.load(untrained)
    reply = lm.generate(PROMPT, max_tokens=30, seed=4, sampling=lm.generation.sampling.with_(steps=6))
    done = call("run", untrained, PROMPT, "--json", "--max-tokens", 30, "--seed", 4, "--steps", 6)
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
        "--top-k",
        5,
        "--top-p",
        0.9,
        "--edit",
        'logit_bias={"5": -1}',
        "--edit",
        "min_p=0.1",
        "--edit",
        "presence-penalty=0.5",
        "--edit",
        "repeat_last_n=7",
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
        "release": 0,
        "greedy": False,
        "max_verifications": 2,
        "max_repairs": 0,
        "repair_below": 0.02,
        "checked_spans": None,
        "stop": ("7", "88"),
        "accept": None,  # rules are Python values, no flags
        "settle": None,
        "logit_bias": {5: -1.0},
        "allowed_token_ids": None,
        "suppress_tokens": (),
        "presence_penalty": 0.5,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "repeat_last_n": 7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
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


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (["--grammar", "g.lark"], "3(1+3)*4*"),
        (["--choice", "7"], "7"),
        (["--choice", "34,567"], "34|567"),
        (["--choice", "34", "--choice", "567"], "34|567"),
    ],
)
def test_an_answer_is_held_to_a_grammar_in_a_file_or_to_a_choice(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], allowed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.lark").write_text('start: "3" (/1+/ start)? | "3" /1+/ start "4" | "34"', encoding="utf-8")
    done = call("run", "sudoku-nano", "12", *options, "--json", "--max-tokens", 8, "--steps", 2)
    text = json.loads(done.out)["text"]
    assert re.fullmatch(allowed, text)


def test_a_choice_that_is_repeated_may_hold_commas(call: Call) -> None:
    done = call("run", "sudoku-nano", "12", "--choice", "3,4", "--choice", "5,6,7")
    assert done.code == 2 and "vocabulary cannot write choice ('3,4', '5,6,7')" in done.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--grammar", "none.lark"], "--grammar is 'none.lark'"),
        (["--grammar", "bad.json"], "grammar is not one that lark reads"),
        (["--schema", "none.json"], "--schema is 'none.json'"),
        (["--schema", "bad.json"], "--schema is 'bad.json': Expecting"),
        (["--regex", "(1"], "regex '(1' is not a regular expression"),
        (["--choice", "1,1"], "choice has '1' twice"),
        (["--choice", "1,"], "empty text"),
        (["--choice", "1", "--regex", "1"], "given with"),
        (["--grammar", "bad.json", "--schema", "bad.json"], "given with"),
    ],
)
def test_a_constraint_that_is_none_is_refused_by_its_option(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"a": ', encoding="utf-8")
    done = call("run", "sudoku-nano", "12", *options, "--steps", 1)
    assert done.code == 2 and named in done.err
