"""Chats with a network that writes what it was told, and with random weights: thoughts, calls, budgets, empty answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.chat import RETRIES, MalformedToolCall, ToolCall
from blockpress.config import GenerationConfig, Sampling
from blockpress.decoding import (
    Committed,
    Denoised,
    Done,
    Event,
    MalformedToolCallEvent,
    ReasoningDelta,
    Reply,
    Text,
    ToolCallEvent,
)
from blockpress.decoding.generate import generate
from blockpress.diffusion import KeyedDraws
from blockpress.errors import BlockpressError, CheckpointError, RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Cache, Network
from blockpress.text import Tokenizer
from tests.builders.chats import CANVAS, CONFIG, LOREM, Script, Scripted, Told, whole
from tests.builders.chats import scripted_model as model
from tests.chat_tokenizer import TOKENIZER, backend, ids
from tests.conftest import num_examples

RESULT = 'response:ls{value:<|"|>{"ok": true}<|"|>}<tool_response|>'
HI = [{"role": "user", "content": "Hi"}]
ZIP = {"type": "object", "properties": {"zip": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": ZIP}}]
TURN_END, THOUGHT, THOUGHT_END = ids("<turn|><|channel><channel|>")


def events_of(lm: LM, **options: Any) -> list[Event]:
    return list(lm.chat_stream(HI, **options))


def check_joined(events: list[Event]) -> Reply:
    """The streamed pieces are the reply's."""
    (done,) = (event for event in events if isinstance(event, Done))
    reply = done.reply
    assert events[-1] == done
    assert "".join(event.text for event in events if isinstance(event, Text)) == reply.text
    assert ("".join(event.text for event in events if isinstance(event, ReasoningDelta)) or None) == reply.thinking
    assert tuple(event.call for event in events if isinstance(event, ToolCallEvent)) == reply.tool_calls
    assert tuple(event.call for event in events if isinstance(event, MalformedToolCallEvent)) == reply.broken_calls
    assert (
        sum((event.tokens for event in events if isinstance(event, Committed)), [])[: len(reply.tokens)] == reply.tokens
    )
    assert reply.usage.completion_tokens == len(reply.tokens)
    return reply


# ---------------------------------------------------------------------------------------------------------- a turn


def test_a_turn_may_span_many_canvases():
    turn = '<|channel>thought\nI look it up, twice.\n<channel|>Let me see.<|tool_call>call:ls{path:<|"|>a "b" {c<|"|>,n:[1,null]}'
    turn += "<tool_call|><|tool_call>call:ls{}<tool_call|><|tool_response>"
    reply = check_joined(events_of(model(whole(turn)), thinking=True))
    assert (reply.text, reply.thinking) == ("Let me see.", "I look it up, twice.")
    calls = (ToolCall(name="ls", arguments={"path": 'a "b" {c', "n": [1, None]}), ToolCall(name="ls", arguments={}))
    assert (reply.tool_calls, reply.broken_calls, reply.finish_reason) == (calls, (), "tool_calls")
    assert reply.tokens == ids(turn)
    assert reply.usage.reasoning_tokens == len("thought\nI look it up, twice.\n")
    assert (reply.usage.thought_cut, reply.usage.empty_retries) == (False, 0)


def test_the_prompt_is_rendered_by_the_template():
    lm = model(whole("4<turn|>"))
    assert isinstance(lm.network, Scripted)
    lm.chat([{"role": "system", "content": "Be."}, *HI], tools=[{"type": "function", "function": {"name": "f"}}])
    (prompt,) = lm.network.begun
    assert prompt == (
        '<bos><|turn>system\nBe.<|tool>declaration:f{description:<|"|><|"|>}<tool|><turn|>\n'
        "<|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )
    reply = lm.chat(HI)
    assert (reply.text, reply.tokens, reply.finish_reason, reply.thinking) == ("4", ids("4<turn|>"), "stop", None)
    assert reply.usage.prompt_tokens == len(
        ids("<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>")
    )


def test_a_reply_can_be_sent_back_as_a_message():
    turn = "<|channel>thought\nhm\n<channel|>So:<|tool_call>call:ls{n:1}<tool_call|><|tool_response>"
    lm = model(lambda behind, attempt: "ok<turn|>" if "response" in behind else whole(turn)(behind, attempt))
    assert isinstance(lm.network, Scripted)
    reply = lm.chat(HI, thinking=True)
    answered = [*HI, reply.message, {"role": "tool", "tool_call_id": "call_0", "content": {"ok": True}}]
    assert lm.chat(answered, thinking=True).text == "ok"
    assert any(text.endswith(turn + RESULT) for text in lm.network.begun)


@pytest.mark.parametrize(
    ("turn", "options", "reason", "calls", "broken"),
    [
        ("<|tool_call>call:f{}<tool_call|><eos>", {}, "tool_calls", 1, 0),
        ("<|tool_call>call:f{}<tool_call|><eos>", {"max_tokens": 9}, "length", 0, 1),
        ("<|tool_call>call:f{}<tool_call|>ab<eos>", {"max_tokens": 12}, "length", 1, 0),
        ("<|tool_call>call:f{}<tool_call|>ab<eos>", {"sampling": Sampling(stop="b")}, "stop", 1, 0),
        ("<|tool_call>call:f(a)<tool_call|><eos>", {}, "stop", 0, 1),
        ("<|tool_call>call:f{<eos>", {}, "stop", 0, 1),
        ("<|tool_call>call:f{}<eos>", {}, "tool_calls", 1, 0),
        ("call:f{}<eos>", {"tools": TOOLS}, "tool_calls", 1, 0),
        ("call:f{}<eos>", {"tools": TOOLS, "max_tokens": 8}, "length", 0, 0),
        ("call:g{}<eos>", {"tools": TOOLS}, "stop", 0, 0),
        ("call:f{}<eos>", {}, "stop", 0, 0),
    ],
)
def test_the_finish_reason_says_why_a_turn_ended(
    turn: str, options: dict[str, Any], reason: str, calls: int, broken: int
):
    reply = check_joined(events_of(model(whole(turn)), **options))
    assert (reply.finish_reason, len(reply.tool_calls), len(reply.broken_calls)) == (reason, calls, broken)


def test_a_call_is_read_by_the_schema_of_the_tool_that_the_chat_was_given():
    lm = model(whole("<|tool_call>call:f{zip:501}<tool_call|><eos>"))
    assert check_joined(events_of(lm, tools=TOOLS)).tool_calls == (ToolCall(name="f", arguments={"zip": "501"}),)
    assert check_joined(events_of(lm)).tool_calls == (ToolCall(name="f", arguments={"zip": 501}),)


def test_a_malformed_call_is_returned_with_its_text():
    reply = check_joined(events_of(model(whole("<|tool_call>call:f(a)<tool_call|>b<turn|>"))))
    assert reply.broken_calls == (MalformedToolCall(raw="call:f(a)", fault="there is no '{' after the name"),)
    assert (reply.text, reply.finish_reason) == ("b", "stop")


def test_stop_texts_belong_to_the_answer():
    turn = "<|channel>thought\nnot END here\n<channel|>but here END, or<turn|>"
    reply = check_joined(events_of(model(whole(turn)), thinking=True, sampling=Sampling(stop="END")))
    assert (reply.thinking, reply.text, reply.finish_reason) == ("not END here", "but here ", "stop")
    assert reply.tokens == ids("<|channel>thought\nnot END here\n<channel|>but here ")


@pytest.mark.slow
@settings(max_examples=num_examples(15))
@given(st.integers(1, 40), st.none() | st.integers(1, 40), st.sampled_from([(), ("c", "zz"), ("lm",)]))
def test_streamed_and_joined_equals_the_whole(length: int, limit: int | None, stop: tuple[str, ...]):
    turn = f"<|channel>thought\n{LOREM[:length]}\n<channel|>{LOREM[:length]}<turn|>"
    reply = check_joined(events_of(model(whole(turn)), thinking=True, max_tokens=limit, sampling=Sampling(stop=stop)))
    assert reply.tokens == ids(turn)[: len(reply.tokens)]
    assert limit is None or len(reply.tokens) <= limit


class After:
    """Set once it has been asked `count` times."""

    def __init__(self, count: int) -> None:
        self.left = count

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_a_cancelled_chat_keeps_what_was_committed():
    reply = check_joined(events_of(model(whole("<|channel>thought\n" + LOREM)), thinking=True, cancel=After(4)))
    assert (reply.finish_reason, reply.text) == ("cancelled", "")
    assert reply.thinking == LOREM[: CANVAS - len("?thought\n")]


# ------------------------------------------------------------------------------------------------- the thinking budget


def thinker(thought: str, answer: str) -> Script:
    """Thinks on and on; once its thought is closed, it answers."""

    def script(behind: str, attempt: int) -> str:
        _, closed, said = behind.partition("<channel|>")
        return answer.removeprefix(said) if closed else ("<|channel>thought\n" + thought).removeprefix(behind)

    return script


@pytest.mark.slow
@settings(max_examples=num_examples(25))
@given(st.integers(1, 24), st.integers(0, 24))
def test_the_thinking_budget_is_exact(budget: int, length: int):
    thought = LOREM[:length]
    lm = model(thinker(f"{thought}<channel|>" + "early" * 9, "answer<turn|>"))
    reply = check_joined(events_of(lm, thinking=True, thinking_budget=budget))
    inside = ids("thought\n" + thought)
    # Where a canvas ends just as the budget does, nobody knows yet that the thought would have ended there by itself.
    whole_canvases = (1 + budget) % lm.config.canvas_length == 0
    cut = budget < len(inside) or (budget == len(inside) and whole_canvases)
    assert reply.tokens[: reply.tokens.index(THOUGHT_END)] == [THOUGHT, *inside[:budget]]
    assert (reply.usage.reasoning_tokens, reply.usage.thought_cut) == (min(budget, len(inside)), cut)
    if cut:
        assert reply.tokens == [THOUGHT, *inside[:budget], THOUGHT_END, *ids("answer<turn|>")]
        assert (reply.text, reply.finish_reason) == ("answer", "stop")
        # The next canvas was written behind the closed thought, and nothing of the cut canvas stands between.
        assert isinstance(lm.network, Scripted)
        contexts = [text.rpartition("<|turn>model\n")[2] for text in lm.network.begun]
        assert "<|channel>" + ("thought\n" + thought)[:budget] + "<channel|>" in contexts


def test_no_other_thought_is_opened_once_the_budget_is_spent():
    lm = model(thinker(LOREM, "<|channel>again<turn|>"))
    reply = check_joined(events_of(lm, thinking=True, thinking_budget=9))
    assert reply.tokens.count(THOUGHT) == 1
    assert reply.text == "xagain"
    # What is left of it can be spent on another one, up to the same sum.
    lm = model(whole("<|channel>ab<channel|>c<|channel>defg<channel|>"))
    reply = lm.chat(HI, thinking=True, thinking_budget=4, max_tokens=12)
    assert reply.tokens[:9] == ids("<|channel>ab<channel|>c<|channel>de<channel|>")
    assert (reply.usage.reasoning_tokens, reply.usage.thought_cut) == (4, True)


def test_no_other_thought_is_opened_in_the_canvas_in_which_the_budget_was_spent():
    lm = model(whole("<|channel>ab<channel|>c<|channel>defg<channel|>"))
    reply = check_joined(events_of(lm, thinking=True, thinking_budget=2, max_tokens=8))
    # The next canvas goes on behind the "c", and is banned the thought's beginning.
    assert reply.tokens == ids("<|channel>ab<channel|>cxde")
    assert (reply.usage.reasoning_tokens, reply.usage.thought_cut) == (2, False)


def test_in_a_call_no_thought_is_counted_or_closed():
    turn = "<|tool_call>a<|channel>bcd<tool_call|>h<turn|>"
    reply = check_joined(events_of(model(whole(turn)), thinking=True, thinking_budget=2))
    assert (reply.tokens, reply.text) == (ids(turn), "h")
    assert [call.raw for call in reply.broken_calls] == ["a<|channel>bcd"]
    assert (reply.usage.reasoning_tokens, reply.usage.thought_cut) == (0, False)


@pytest.mark.parametrize("budget", [2, 200])
def test_a_thought_after_a_stop_text_is_not_counted(budget: int):
    """The stop text begins in the first canvas and ends in the second, where a thought follows it."""
    lm = model(whole("abcdefghijST" + "OP<|channel>uvwxyzuvwxyz<turn|>"))
    reply = check_joined(
        events_of(lm, thinking=True, thinking_budget=budget, sampling=Sampling(stop="STOP")),
    )
    assert (reply.text, reply.thinking, reply.finish_reason) == ("abcdefghij", None, "stop")
    assert (reply.usage.reasoning_tokens, reply.usage.thought_cut) == (0, False)


@pytest.mark.parametrize("limit", range(8, 16))
def test_max_tokens_counts_thoughts_and_the_closing_token(limit: int):
    reply = model(thinker(LOREM, "answer<turn|>")).chat(HI, thinking=True, thinking_budget=10, max_tokens=limit)
    assert reply.tokens == ids("<|channel>thought\nab<channel|>answer")[:limit]
    assert reply.finish_reason == "length"
    assert reply.usage.thought_cut == (limit >= 12)


def test_a_thinking_budget_may_end_with_the_context():
    lm = model(thinker(LOREM, "answer<turn|>"))
    prompt = lm.chat(HI, thinking=True, max_tokens=1).usage.prompt_tokens
    lm.network.config = replace(CONFIG, context_length=prompt + CANVAS)
    reply = lm.chat(HI, thinking=True, thinking_budget=CANVAS - 1)
    assert (len(reply.tokens), reply.finish_reason) == (CANVAS, "length")


# ------------------------------------------------------------------------------------------------------ empty answers


BLANKS = ["\n<turn|>", " <turn|>", "<pad><turn|>", "<unk><turn|>"]
"""Nothing that anybody could read, and never the same."""


def terse(script: Sequence[str]) -> Script:
    """The first canvas, once for each attempt; the last one for all others."""
    return lambda behind, attempt: script[min(attempt, len(script) - 1)]


@pytest.mark.parametrize(
    ("script", "text", "retries"),
    [
        (["ok<turn|>"], "ok", 0),
        (["<turn|>", "4<turn|>"], "4", 1),
        (["<eos>a<turn|>"], "xa", 1),
        (["\n <turn|>", " <turn|>"], "x", 2),
        (["\n\n<turn|>"], "x\n", 1),
        (["<turn|>", "\n<turn|>", "4<turn|>"], "4", 2),
        (["<turn|>", "\n<eos>", " \n<turn|>", "4<turn|>"], "4", 3),
        ([*BLANKS, "4<turn|>"], "", 3),
    ],
    ids=["none", "fresh noise", "banned", "blanks", "a blank banned", "a short one", "the last chance", "given up"],
)
def test_an_empty_answer_is_retried(script: list[str], text: str, retries: int):
    reply = check_joined(events_of(model(terse(script))))
    assert (reply.text, reply.finish_reason, reply.usage.empty_retries) == (text, "stop", retries)
    assert reply.usage.canvases == 1
    assert reply.usage.steps == reply.usage.forwards == 2 * (retries + 1)
    reply = model(terse(script)).chat(HI, retry_empty=False)
    assert (reply.tokens, reply.usage.empty_retries) == (ids(script[0])[: len(reply.tokens)], 0)


def test_a_tool_call_is_not_an_empty_answer():
    assert model(whole("<|tool_call>call:f{}<tool_call|><turn|>")).chat(HI).usage.empty_retries == 0


def test_a_retry_bans_the_stop_id_only_where_it_came_too_early():
    reply = model(lambda behind, attempt: "<turn|><turn|>").chat(HI)
    # "x" is what this network writes where its first choice is banned.
    assert (reply.text, reply.tokens, reply.usage.empty_retries) == ("x", ids("x<turn|>"), 1)
    # The response's beginning ends a turn as well.
    reply = model(lambda behind, attempt: "<|tool_response><turn|>").chat(HI)
    assert (reply.text, reply.finish_reason) == ("x", "stop")


def test_a_network_that_only_ends_turns_gives_an_empty_reply_after_all_retries():
    reply = check_joined(events_of(model(terse(BLANKS))))
    assert (reply.text, reply.tokens, reply.finish_reason) == ("", ids(BLANKS[-1]), "stop")
    assert reply.usage.empty_retries == RETRIES == len(BLANKS) - 1
    reply = model(terse(BLANKS)).chat(HI, retry_empty=False)
    assert (reply.text, reply.tokens, reply.usage.empty_retries) == ("\n", ids(BLANKS[0]), 0)


def test_after_a_thought_only_what_follows_it_is_content():
    lm = model(terse(["<|channel>a<channel|><turn|>", "<|channel>a<channel|>4<turn|>"]))
    reply = check_joined(events_of(lm, thinking=True))
    assert (reply.thinking, reply.text, reply.usage.empty_retries) == ("a", "4", 1)
    assert reply.usage.reasoning_tokens == 1
    reply = model(terse(["<|channel>a<turn|>", "<|channel>a<channel|>4<turn|>"])).chat(HI, thinking=True)
    assert (reply.thinking, reply.text, reply.usage.empty_retries) == ("a", "4", 1)


def test_a_retried_canvas_keeps_its_context():
    def script(behind: str, attempt: int) -> str:
        blank = "<|channel>" + "a" * (CANVAS - 2) + "<channel|>"
        return blank if not behind else ["<turn|>", "ok<turn|>"][attempt]

    lm = model(script)
    events = events_of(lm, thinking=True)
    reply = check_joined(events)
    assert (reply.text, reply.usage.empty_retries, reply.usage.canvases) == ("ok", 1, 2)
    # Two canvases of two steps, one written twice, and one commit.
    assert (reply.usage.steps, reply.usage.forwards) == (6, 7)
    steps = [(event.canvas, event.retry, event.step) for event in events if isinstance(event, Denoised)]
    assert steps == [(0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 0, 2), (1, 1, 1), (1, 1, 2)]


def test_a_retried_canvas_has_its_own_draws():
    asked = []

    def keyed(seeds: list[int], canvases: list[int], **size: Any) -> KeyedDraws:
        asked.append(list(canvases))
        return KeyedDraws(seeds, canvases, **size)

    lm = model(terse(BLANKS))
    (request,) = lm.build_chat_requests(HI)
    list(generate(lm.network, [request.row], Sampling(), make_draws=keyed))
    assert len(asked) == RETRIES + 1 and len({number for (number,) in asked}) == len(asked)


# --------------------------------------------------------------------------------------------------------- same tokens


def by_the_users_word(behind: str, attempt: int) -> str:
    raise AssertionError("replaced below")


class Mixed(Scripted):
    """Every row has a script of its own, by the user's word in its prompt."""

    def __init__(self, scripts: dict[str, Script]) -> None:
        super().__init__(by_the_users_word)
        self.scripts = scripts

    def denoise(self, canvas: Tensor, cache: Cache, signal: Tensor | None) -> Tensor:
        assert isinstance(cache, Told)
        rows = []
        for row in range(len(cache.history)):
            text = TOKENIZER.decode(cache.history[row], skip_special=False)
            self.script = self.scripts[text.partition("user\n")[2].partition("<turn|>")[0]]
            rows.append(super().denoise(canvas[row : row + 1], cache.select(torch.tensor([row])), signal))
        return torch.cat(rows)


def test_a_chat_in_a_batch_is_the_chat_alone():
    scripts: dict[str, Script] = {
        "empty": terse(["<turn|>", "\n<turn|>", "4<turn|>"]),
        "long": thinker(LOREM, "answer " * 6 + "<turn|>"),
        "plain": whole("<|channel>a<channel|>" + LOREM[:30] + "<turn|>"),
        "silent": terse(BLANKS),
        "call": whole("<|tool_call>call:f{a:1,b:2}<tool_call|><eos>"),
    }
    talks = [[{"role": "user", "content": word}] for word in scripts]
    options: dict[str, Any] = {"thinking": True, "thinking_budget": 15}

    def fresh() -> LM:
        return LM(
            path=Path("x"),
            network=Mixed(scripts),
            generation=GenerationConfig(),
            tokenizer=TOKENIZER,
            answer=run_reference,
        )

    alone = [fresh().chat(talk, **options) for talk in talks]
    assert fresh().chat(talks, **options) == alone
    assert fresh().chat(talks[::-1], **options) == alone[::-1]
    assert {reply.usage.empty_retries for reply in alone} == {0, 2, 3}
    assert {reply.usage.thought_cut for reply in alone} == {False, True}


@pytest.fixture(scope="module")
def random_lm(random_network) -> LM:  # type: ignore[no-untyped-def]
    """Random weights that write control tokens often enough, and are empty at times."""
    network = random_network(replace(CONFIG, hidden_size=64, canvas_length=8, context_length=160), seed=5)
    with torch.no_grad():
        network.norm.weight *= 3
        network.self_conditioning.down_proj.weight *= 0.1
    loose = Sampling(steps=6, entropy_bound=4.0, confidence=1.5)
    stop_ids = tuple(ids("<eos><turn|>abcdefghijklmnopqrstuvwxyz"))
    return LM(
        path=Path("random"),
        network=network,
        generation=GenerationConfig(sampling=loose, stop_ids=stop_ids),
        tokenizer=TOKENIZER,
    )


@pytest.mark.slow
def test_random_weights_answer_the_same_in_a_batch_and_alone(random_lm: LM, monkeypatch: pytest.MonkeyPatch):
    talks = [[{"role": "user", "content": word}] for word in ["Hi", "Say one word.", "4?"]]
    options: dict[str, Any] = {"max_tokens": 30, "thinking": True, "thinking_budget": 6}
    alone = [random_lm.chat(talk, seed=seed, **options) for seed in range(3) for talk in talks]
    together = random_lm.chat(talks * 3, seed=[seed for seed in range(3) for _ in talks], **options)
    assert together == alone
    assert sum(reply.usage.empty_retries for reply in alone) > 0
    monkeypatch.setattr(random_lm, "answer", run_reference)
    assert random_lm.chat(talks * 3, seed=[seed for seed in range(3) for _ in talks], **options) == alone
    for reply in alone:
        assert (
            reply.usage.empty_retries == RETRIES
            or reply.text
            or reply.tool_calls
            or reply.broken_calls
            or reply.finish_reason != "stop"
        )
    assert random_lm.chat(talks[0], seed=[0, 1], **options) == [alone[0], alone[3]]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"messages": []}, "messages is []"),
        ({"messages": "Hi"}, "messages is 'Hi'"),
        ({"messages": [HI, [{"role": "x"}]]}, "conversation 1: messages[0].role"),
        ({"messages": [HI, 3]}, "conversation 1: messages is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 1}]}]}, "messages[0].content[0]"),
        ({"tools": [3]}, "tools[0]"),
        ({"thinking": "yes"}, "thinking is 'yes'"),
        ({"thinking": True, "thinking_budget": 0}, "thinking_budget is 0"),
        ({"thinking": True, "thinking_budget": True}, "thinking_budget is True"),
        ({"thinking_budget": 5}, "thinking_budget is 5"),
        ({"retry_empty": 1}, "retry_empty is 1"),
        ({"soft_tokens": 71}, "soft_tokens is 71"),
        ({"soft_tokens": 70.0}, "soft_tokens is 70.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": "a"}, "seed"),
        ({"sampling": {}}, "sampling is {}"),
    ],
)
@pytest.mark.parametrize("method", ["chat", "chat_stream"])
def test_bad_arguments_are_named_before_anything_runs(method: str, options: dict[str, Any], told: str):
    lm = model(whole("4<turn|>"))
    with pytest.raises(BlockpressError) as caught:
        getattr(lm, method)(**{"messages": HI, **options})
    assert told in caught.value.message and caught.value.hint
    assert isinstance(lm.network, Scripted) and not lm.network.begun


def test_a_model_without_a_template_refuses_to_chat():
    for tokenizer in (None, Tokenizer(backend())):
        lm = LM(path=Path("here"), network=Scripted(whole("")), generation=GenerationConfig(), tokenizer=tokenizer)
        with pytest.raises(CheckpointError, match="here has no chat template"):
            lm.chat(HI)


def test_a_model_without_control_tokens_refuses_thinking_and_tools(tmp_path: Path):
    from blockpress.text.builder import digits_tokenizer

    digits = Tokenizer(digits_tokenizer(), chat_template="{{ messages[0].content }}")
    config = replace(CONFIG, vocab_size=16)
    lm = LM(path=tmp_path, network=Network(config), generation=GenerationConfig(), tokenizer=digits)
    for options in ({"thinking": True}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
        with pytest.raises(RequestError, match=next(iter(options))):
            lm.chat([{"role": "user", "content": "1"}], **options)  # type: ignore[arg-type]
