"""Text that is released before its canvas ends: never taken back, the same in the engine and the reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blockpress
from blockpress import sudoku
from blockpress.config import Sampling
from blockpress.decoding import Committed, Denoised, Done, EarlyText, Event, ReasoningDelta, Text, TextOutputProcessor
from blockpress.errors import RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from tests.conftest import num_examples

PUZZLES = [sudoku.layout(puzzle.puzzle) for puzzle in sudoku.held_out(0, 2)]
STOP = 1


pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def engine() -> LM:
    return blockpress.load("sudoku-nano")


@pytest.fixture(scope="module")
def reference() -> LM:
    lm = blockpress.load("sudoku-nano")
    lm.answer = run_reference
    return lm


def early(lm: LM, steps: int = 1) -> Sampling:
    return lm.generation.sampling.with_(release=steps)


def of_row(events: list[Event], row: int) -> list[Event]:
    return [event for event in events if event.row == row]


def test_text_comes_before_its_canvas_and_joins_to_the_answer(engine: LM) -> None:
    events = list(engine.stream(PUZZLES, 90, 0, early(engine)))
    for row in range(len(PUZZLES)):
        mine = of_row(events, row)
        kinds = [type(event) for event in mine]
        (reply,) = (event.reply for event in mine if isinstance(event, Done))
        assert kinds.index(Text) < kinds.index(Committed)
        assert (
            "".join(event.text for event in mine if isinstance(event, Text))
            == reply.text
            == engine.decode(reply.tokens)
        )


def test_what_is_released_stays_at_every_later_step(engine: LM) -> None:
    text = ""
    for event in engine.stream(PUZZLES[0], 90, 0, early(engine)):
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Denoised) and text:
            assert engine.decode(event.argmax[: len(text)]) == text
            assert not event.entropy[: len(text)].any()


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (1, {}),
        pytest.param(3, {}, marks=pytest.mark.slow),
        pytest.param(1, {"regex": r"([1-9]{9}\n){8}[1-9]{9}"}, marks=pytest.mark.slow),
        (3, {"logprobs": 1}),
        pytest.param(1, {"pins": {3: 5}}, marks=pytest.mark.slow),
    ],
)
def test_the_engine_and_the_reference_loop_release_the_same(
    engine: LM, reference: LM, steps: int, options: dict[str, Any]
) -> None:
    runs = [list(lm.stream(PUZZLES, 90, 0, early(lm, steps), **options)) for lm in (engine, reference)]
    for row in range(len(PUZZLES)):
        one, other = ([e for e in of_row(run, row) if isinstance(e, Text | Done)] for run in runs)
        assert [e.text if isinstance(e, Text) else e.reply.tokens for e in one] == [
            e.text if isinstance(e, Text) else e.reply.tokens for e in other
        ]


def test_without_release_nothing_changes(engine: LM) -> None:
    plain = engine.generate(PUZZLES[0], 90, 0)
    never = engine.generate(PUZZLES[0], 90, 0, early(engine, 10_000))
    assert (plain.tokens, plain.usage) == (never.tokens, never.usage)


def test_a_verified_answer_is_released_with_its_canvas(engine: LM) -> None:
    kinds = [type(event) for event in engine.stream(PUZZLES[0], 90, 0, early(engine), mode="verified")]
    assert kinds.index(Committed) < kinds.index(Text)


def test_a_cancelled_answer_has_the_text_that_was_given_out(engine: LM) -> None:
    class AfterText:
        def __init__(self) -> None:
            self.seen = False

        def is_set(self) -> bool:
            return self.seen

    flag, text = AfterText(), ""
    for event in engine.stream(PUZZLES[0], 90, 0, early(engine), cancel=flag):
        if isinstance(event, Text):
            text, flag.seen = text + event.text, True
    assert isinstance(event, Done)
    assert event.reply.finish_reason == "cancelled"
    assert event.reply.text == text


@pytest.mark.parametrize("wrong", [-1, 1.5, "2", None])
def test_release_is_a_count(wrong: object) -> None:
    with pytest.raises(RequestError, match="sampling field release"):
        Sampling(release=wrong)  # type: ignore[arg-type]


class Letters:
    """A decoder of one letter a token."""

    stopped: str | None = None

    def __init__(self) -> None:
        self.tokens_used = 0

    def feed(self, ids: list[int]) -> str:
        self.tokens_used += len(ids)
        return "".join(chr(97 + token) for token in ids)

    def finish(self) -> str:
        return ""


def denoised(argmax: list[int], changed: list[bool], entropy: list[float]) -> Denoised:
    return Denoised(
        row=0,
        canvas=0,
        step=1,
        argmax=torch.tensor(argmax),
        accepted=torch.ones(len(argmax), dtype=torch.bool),
        entropy=torch.tensor(entropy),
        changed=torch.tensor(changed),
        settled=False,
    )


STEP = st.tuples(
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.lists(st.sampled_from([0.0, 0.001, 1.0]), min_size=6, max_size=6),
)


@given(
    steps=st.lists(STEP, min_size=1, max_size=12),
    need=st.integers(1, 3),
    most=st.integers(1, 6),
    final=st.integers(0, 6),
)
@settings(max_examples=num_examples(60))
def test_only_what_stayed_is_released_in_order_and_pieces_join_to_the_canvas(
    steps: list[tuple[list[int], list[float]]], need: int, most: int, final: int
) -> None:
    processor = EarlyText(TextOutputProcessor(Letters()), TextOutputProcessor(Letters()), need, 0.005)
    previous, text, history = [-1] * 6, "", list[list[int]]()
    for argmax, entropy in steps:
        argmax[: len(processor.released)] = processor.released
        entropy[: len(processor.released)] = [0.0] * len(processor.released)
        history.append(argmax)
        before = len(processor.released)
        changed = [a != b for a, b in zip(argmax, previous, strict=True)]
        text += "".join(piece.text for piece in processor.step(denoised(argmax, changed, entropy), most, {STOP}) or [])  # type: ignore[union-attr]
        for place in range(before, len(processor.released)):
            assert len(history) > need
            assert len({tokens[place] for tokens in history[-need - 1 :]}) == 1
            assert entropy[place] <= 0.005 and argmax[place] != STOP and place < most
        previous = argmax
    canvas = previous[: max(final, len(processor.released))]
    text += "".join(piece.text for piece in [*processor.take(canvas), *processor.finish()])  # type: ignore[union-attr]
    assert text == "".join(chr(97 + token) for token in canvas)


def test_a_budget_of_thought_is_not_passed_and_a_retried_canvas_keeps_what_was_given_out() -> None:
    from tests.builders import chats

    for told, how in (("say 1234567890 1234567890", {"thinking": True, "thinking_budget": 3}), ("count 30", {})):
        lm = chats.obedient_model()
        options: dict[str, Any] = {"sampling": lm.generation.sampling.with_(release=1), **how}
        messages = [{"role": "user", "content": told}]
        events = list(lm.chat_stream(messages, **options))
        plain = lm.chat(messages, **how)
        assert isinstance(events[-1], Done)
        reply = events[-1].reply
        assert (reply.text, reply.thinking, reply.tokens) == (plain.text, plain.thinking, plain.tokens)
        for kind, whole in ((Text, reply.text), (ReasoningDelta, reply.thinking or "")):
            assert "".join(event.text for event in events if isinstance(event, kind)) == whole
