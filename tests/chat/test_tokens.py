"""The same chats token by token: what is special about a turn holds where a canvas is one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockpress.chat import RETRIES, ToolCall
from blockpress.config import AutoregressiveSampling, GenerationConfig
from blockpress.decoding import Committed, Denoised, Event, Reply
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Cache
from tests.builders.chats import EOS, LOREM, VOCAB, Script, Scripted, Told, whole
from tests.chat_tokenizer import TOKENIZER, ids

from .test_conversation import HI, RESULT, THOUGHT, After, check_joined, thinker


class Speaking(Scripted):
    """Its next token is the first that its script goes on with; where that is banned, an "x"."""

    def read(
        self, tokens: Tensor, cache: Cache, counts: Tensor | None = None, images: Any = None
    ) -> tuple[Tensor, Cache]:
        assert counts is not None
        hidden, grown = super().read(tokens, cache, counts, images)
        assert isinstance(grown, Told)
        # What stands behind a row's own tokens is not to be looked at.
        hidden = torch.full_like(hidden, float("nan"))
        for row, (history, count) in enumerate(zip(grown.history, counts.tolist(), strict=True)):
            if count:
                text = TOKENIZER.decode(history, skip_special=False)
                self.begun[text] += 1
                word, _, behind = text.rpartition("<|turn>model\n")
                best = torch.tensor((ids(self.script_of(word)(behind, 0)) + ids(LOREM))[0])
                hidden[row, count - 1] = F.one_hot(best, VOCAB) * 100 + F.one_hot(torch.tensor(ids("x")[0]), VOCAB) * 30
        return hidden, grown

    def script_of(self, prompt: str) -> Script:
        return self.script


def model(script: Script, kind: type[Speaking] = Speaking) -> LM:
    generation = GenerationConfig(stop_ids=(EOS,))
    return LM(
        path=Path("scripted"), network=kind(script), generation=generation, tokenizer=TOKENIZER, answer=run_reference
    )


def events_of(lm: LM, **options: Any) -> list[Event]:
    return list(lm.chat_stream(HI, mode="autoregressive", **options))


def reply_of(script: Script, **options: Any) -> Reply:
    return check_joined(events_of(model(script), **options))


def test_an_autoregressive_turn_has_thoughts_and_calls():
    turn = (
        '<|channel>thought\nI look.\n<channel|>See.<|tool_call>call:ls{path:<|"|>a "b" {c<|"|>,n:[1,null]}<tool_call|>'
    )
    turn += "<|tool_call>call:ls{}<tool_call|><|tool_response>"
    events = events_of(model(whole(turn)), thinking=True)
    assert not any(isinstance(event, Denoised) for event in events)
    assert [event.tokens for event in events if isinstance(event, Committed)] == [[token] for token in ids(turn)]
    reply = check_joined(events)
    assert (reply.text, reply.thinking, reply.tokens) == ("See.", "I look.", ids(turn))
    calls = (ToolCall(name="ls", arguments={"path": 'a "b" {c', "n": [1, None]}), ToolCall(name="ls", arguments={}))
    assert (reply.tool_calls, reply.finish_reason) == (calls, "tool_calls")
    usage = reply.usage
    assert (usage.forwards, usage.canvases, usage.steps, usage.tokens_per_forward) == (len(ids(turn)), 0, 0, 1.0)
    assert (usage.reasoning_tokens, usage.thought_cut) == (len("thought\nI look.\n"), False)


@pytest.mark.parametrize(("budget", "length"), [(1, 0), (7, 5), (8, 0), (9, 0), (11, 3), (12, 3), (20, 26)])
def test_the_thinking_budget_is_exact(budget: int, length: int):
    thought = "thought\n" + LOREM[:length]
    reply = reply_of(
        thinker(f"{LOREM[:length]}<channel|>answer<turn|>", "answer<turn|>"), thinking=True, thinking_budget=budget
    )
    # Every token ends its canvas, so a budget that is just enough closes the thought, too.
    cut = budget <= len(thought)
    assert reply.tokens == ids(f"<|channel>{thought[:budget]}<channel|>answer<turn|>")
    assert (reply.text, reply.usage.reasoning_tokens) == ("answer", min(budget, len(thought)))
    assert reply.usage.thought_cut == cut
    # The closing token is put behind the last one, and both are read by one forward.
    assert reply.usage.forwards == len(reply.tokens) - cut


def test_no_other_thought_is_opened_once_the_budget_is_spent():
    def script(behind: str, attempt: int) -> str:
        return "ab" if behind.endswith("<|channel>") else "<|channel>"

    reply = reply_of(script, thinking=True, thinking_budget=1, max_tokens=6)
    assert reply.tokens == ids("<|channel>a<channel|>xxx")
    assert reply.tokens.count(THOUGHT) == 1


@pytest.mark.parametrize("limit", range(8, 16))
def test_max_tokens_counts_thoughts_and_the_closing_token(limit: int):
    reply = reply_of(thinker(LOREM, "answer<turn|>"), thinking=True, thinking_budget=10, max_tokens=limit)
    assert reply.tokens == ids("<|channel>thought\nab<channel|>answer")[:limit]
    assert (reply.finish_reason, reply.usage.thought_cut) == ("length", limit >= 12)


def test_the_end_of_a_turn_is_banned_until_something_was_said():
    reply = reply_of(lambda behind, attempt: "<turn|>")
    assert (reply.tokens, reply.text, reply.finish_reason) == (ids("x<turn|>"), "x", "stop")
    # Nothing new was read before the token was chosen again.
    assert (reply.usage.empty_retries, reply.usage.forwards) == (1, 2)
    reply = reply_of(lambda behind, attempt: "<turn|>", retry_empty=False)
    assert (reply.tokens, reply.usage.empty_retries) == (ids("<turn|>"), 0)
    # Behind a thought it has not begun either, and a blank is no answer.
    reply = reply_of(whole("<|channel>a<channel|>\n<turn|>"), thinking=True, max_tokens=6)
    assert reply.tokens[:5] == ids("<|channel>a<channel|>\nx") and reply.usage.empty_retries == 1


def test_a_network_that_only_ends_turns_gives_an_empty_reply_after_all_retries():
    """Where an end is banned it writes a blank, and ends again."""

    class Silent(Speaking):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden) + 25 * F.one_hot(torch.tensor(ids(" ")[0]), VOCAB)

    lm = model(lambda behind, attempt: "<turn|>", Silent)
    reply = check_joined(events_of(lm))
    assert (reply.text, reply.finish_reason, reply.usage.empty_retries) == (" " * RETRIES, "stop", RETRIES)
    assert reply.tokens == ids(" " * RETRIES + "<turn|>")


def test_a_stop_text_ends_the_answer():
    sampling = AutoregressiveSampling(stop="END")
    reply = reply_of(whole("<|channel>END<channel|>but here END, or"), thinking=True, sampling=sampling)
    assert (reply.thinking, reply.text, reply.finish_reason) == ("END", "but here ", "stop")
    assert reply.tokens == ids("<|channel>END<channel|>but here ")


def test_a_cancelled_chat_keeps_its_tokens():
    reply = reply_of(whole("<|channel>thought\nabc"), thinking=True, cancel=After(12))
    assert (reply.finish_reason, reply.text, reply.thinking) == ("cancelled", "", "ab")
    assert reply.usage.reasoning_tokens == 10


def test_a_chat_in_a_batch_is_the_chat_alone():
    scripts: dict[str, Script] = {
        "empty": lambda behind, attempt: "<turn|>",
        "long": thinker(LOREM, "answer " * 3 + "<turn|>"),
        "plain": whole("<|channel>a<channel|>" + LOREM[:30] + "<turn|>"),
        "call": whole("<|tool_call>call:f{a:1,b:2}<tool_call|><eos>"),
    }

    class Mixed(Speaking):
        def script_of(self, prompt: str) -> Script:
            return scripts[prompt.partition("user\n")[2].partition("<turn|>")[0]]

    talks = [[{"role": "user", "content": word}] for word in scripts]
    options: dict[str, Any] = {"thinking": True, "thinking_budget": 15, "mode": "autoregressive"}

    def fresh() -> LM:
        return model(whole(""), Mixed)

    alone = [fresh().chat(talk, **options) for talk in talks]
    assert fresh().chat(talks, **options) == alone
    assert fresh().chat(talks[::-1], **options) == alone[::-1]
    assert {reply.usage.empty_retries for reply in alone} == {0, 1}
    assert {reply.usage.thought_cut for reply in alone} == {False, True}


def test_the_tool_answers_and_the_turn_goes_on():
    turn = "<|tool_call>call:ls{n:1}<tool_call|><|tool_response>"

    def script(behind: str, attempt: int) -> str:
        _, answered, said = behind.rpartition("<tool_response|>")
        return "ok<turn|>".removeprefix(said) if answered else whole(turn)(behind, attempt)

    lm = model(script)
    reply = lm.chat(HI, mode="autoregressive")
    answered = [*HI, reply.message, {"role": "tool", "tool_call_id": "call_0", "content": {"ok": True}}]
    again = lm.chat(answered, mode="autoregressive")
    assert (again.text, again.finish_reason) == ("ok", "stop")
    assert isinstance(lm.network, Speaking)
    assert any(text.endswith(turn + RESULT) for text in lm.network.begun)
