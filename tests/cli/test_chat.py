"""`blockpress run` with a model that has a chat template: its form, its options, thoughts beside the answer."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import blockpress
from blockpress.chat import MalformedToolCall, ToolCall
from blockpress.chat.messages import check_messages
from blockpress.checkpoints import save_checkpoint
from blockpress.cli import run
from blockpress.cli.chat import Aside, ChatView
from blockpress.cli.serialize import ended, event_to_dict, reply_to_dict
from blockpress.config import PRESETS, GenerationConfig, Sampling
from blockpress.decoding import Done, MalformedToolCallEvent, ReasoningDelta, Reply, Text, ToolCallEvent, Usage

from ..chat_tokenizer import TOKENIZER, VOCABULARY
from .conftest import Call, Screen

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="session")
def talker(workspace: Path, random_network: Callable[..., Any]) -> Path:
    """A checkpoint with a chat template and random weights, whose answers end early."""
    path = workspace / "cli-talker"
    config = replace(PRESETS["tiny"](), vocab_size=len(VOCABULARY), canvas_length=8, context_length=256)
    generation = GenerationConfig(sampling=Sampling(steps=3), stop_ids=(1, *range(40, 60)))
    save_checkpoint(path, random_network(config, seed=2), generation=generation)
    TOKENIZER.save(path)
    return path


def test_a_model_with_a_template_chats(call: Call, talker: Path) -> None:
    reply = blockpress.load(talker).chat(HI, max_tokens=30, seed=3)
    done = call("run", talker, "Hi", "--json", "--max-tokens", 30, "--seed", 3)
    assert done.code == 0 and not done.err
    assert json.loads(done.out) == json.loads(json.dumps(reply_to_dict(reply, chat=True)))
    done = call("run", talker, "--max-tokens", 30, "--seed", 3, stdin="Hi\n")
    assert done.out.removesuffix("\n") == (reply.text or "").removesuffix("\n")
    assert ended(reply) in done.err


def test_chat_options_are_honoured(call: Call, talker: Path) -> None:
    lm = blockpress.load(talker)
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    wanted = lm.chat(messages, max_tokens=20, thinking=True, thinking_budget=3)
    options = ("--system", "Be brief.", "--max-tokens", 20, "--json")
    said = json.loads(call("run", talker, "Hi", *options, "--thinking-budget", 3).out)
    assert said == json.loads(json.dumps(reply_to_dict(wanted, chat=True)))
    said = json.loads(call("run", talker, "Hi", *options, "--no-thinking").out)
    assert said == json.loads(json.dumps(reply_to_dict(lm.chat(messages, max_tokens=20), chat=True)))


def test_raw_sends_the_prompt_unchanged(call: Call, talker: Path) -> None:
    reply = blockpress.load(talker).generate("Hi", max_tokens=20)
    said = json.loads(call("run", talker, "Hi", "--raw", "--json", "--max-tokens", 20).out)
    assert (said["tokens"], said["usage"]) == (reply.tokens, vars(reply.usage))


def test_chat_events_are_one_json_object_a_line(call: Call, talker: Path) -> None:
    lm = blockpress.load(talker)
    done = call("run", talker, "Hi", "--events", "--thinking", "--max-tokens", 20)
    events = list(lm.chat_stream(HI, thinking=True, max_tokens=20))
    assert [json.loads(line) for line in done.out.splitlines()] == [
        json.loads(json.dumps(event_to_dict(lm, event))) for event in events
    ]


@pytest.mark.parametrize(
    "options",
    [("--system", "x"), ("--thinking",), ("--no-thinking",), ("--thinking-budget", 5)],
)
def test_a_plain_prompt_takes_no_chat_options(call: Call, talker: Path, options: tuple[object, ...]) -> None:
    for command in (("run", "sudoku-nano", "1", *options), ("run", talker, "1", "--raw", *options)):
        done = call(*command)
        assert done.code == 2 and not done.out
        assert str(options[0]).removeprefix("--no-").removeprefix("--") in done.err


@pytest.mark.parametrize("budget", [0, -1])
def test_a_thinking_budget_must_be_a_count(call: Call, talker: Path, budget: int) -> None:
    done = call("run", talker, "Hi", "--thinking-budget", budget)
    assert done.code == 2 and "--thinking-budget" in done.err


LS = ToolCall(name="ls", arguments={"a": "x"})
BAD = MalformedToolCall(raw="call:\x1b[31mls(", fault="there is no '{' behind the name")
USAGE = Usage(prompt_tokens=1, completion_tokens=9, canvases=1, steps=2, forwards=2, tokens_per_forward=4.5)
DONE = Done(0, Reply("ok", [], "tool_calls", replace(USAGE, reasoning_tokens=3, empty_retries=1)))
EVENTS = [
    ReasoningDelta(0, "I a"),
    ReasoningDelta(0, "dd.\nAll\x1b of"),
    Text(0, "ok"),
    ToolCallEvent(0, LS),
    MalformedToolCallEvent(0, BAD),
    DONE,
]


def test_calls_and_notes_go_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def told(events: list[Any]) -> str:
        aside = Aside()
        for event in events:
            aside.see(event)
        captured = capsys.readouterr()
        assert not captured.out
        return captured.err

    wanted = (
        "I add.\nAll\x1b of\ncall:ls{a:<|\"|>x<|\"|>}\nno call (there is no '{' behind the name): call:\\x1b[31mls(\n"
    )
    assert told(EVENTS) == wanted
    assert told([ReasoningDelta(0, "a"), DONE]) == "a\n"
    assert told([Text(0, "a"), DONE]) == ""
    monkeypatch.setattr("blockpress.cli.chat.is_terminal", lambda stream: True)
    assert told(EVENTS[:2]) == "\x1b[2mI a\x1b[0m\x1b[2mdd.\nAll\\x1b of\x1b[0m"


def test_thoughts_are_dimmed_above_the_answer(talker: Path) -> None:
    view = ChatView(blockpress.load(talker), Sampling())
    for event in EVENTS:
        view.see(event)
    lines = [(line.plain, str(line.style)) for line in view.release()]
    assert lines[:2] == [("I add.", "dim"), ("All\\x1b of", "dim")]
    assert [line for line, _ in lines[2:]] == [
        'call:ls{a:<|"|>x<|"|>}',
        "no call (there is no '{' behind the name): call:\\x1b[31mls(",
        "ok",
    ]
    assert lines[-1][1] == ""


def test_the_summary_says_how_a_chat_ended() -> None:
    assert ended(DONE.reply) == (
        "called after 9 tokens: 1 canvas, 2 steps, 1 begun again because empty, 3 tokens of thought"
    )


class Typed(io.StringIO):
    """A stdin that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_conversation_resends_its_history(
    call: Call, talker: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    stream = blockpress.LM.chat_stream
    monkeypatch.setattr(blockpress.LM, "chat_stream", lambda lm, m, **o: asked.append(m) or stream(lm, m, **o))
    lines = iter(["Hi", "And?"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(io, "StringIO", Typed)
    done = call("run", talker, "--system", "Be.", "--max-tokens", 10, "--fast", screen=screen)
    assert done.code == 0
    system = {"role": "system", "content": "Be."}
    first = blockpress.load(talker).chat([system, *HI], max_tokens=10)
    assert asked[:2] == [[system, *HI], [system, *HI, first.message, {"role": "user", "content": "And?"}]]
    assert sys.stdin is not None


def test_a_conversation_goes_on_after_calls_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Reply(
        "Let me see.", [], "tool_calls", USAGE, thinking="hm", tool_calls=(ToolCall(name="f", arguments={}),)
    )
    asked: list[Any] = []
    asking: Any = SimpleNamespace(message=lambda text, first: {"role": "user", "content": text})
    monkeypatch.setattr(run, "_tell", lambda asking, text, fast, before: asked.append([*before]) or called)
    lines = iter(["Hi", "And?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    run._converse(asking, fast=True)
    assert check_messages([*asked[1], *HI])[0] == [*HI, {"role": "assistant", "content": "Let me see."}, *HI]
