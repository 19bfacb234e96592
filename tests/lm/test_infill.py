"""Infilling and editing: the text around a hole comes back byte for byte, whatever the weights, tokenizer and place."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from operator import mul
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockpress
from blockpress import sudoku
from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.constrain.automaton import DEAD
from blockpress.constrain.filling import ANY_TEXT, filling
from blockpress.decoding import Denoised, Done, Reply, Text
from blockpress.errors import BlockpressError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Network
from blockpress.text import Tokenizer

from ..chat_tokenizer import TOKENIZER as CHAT
from ..conftest import num_examples

RandomNetwork = Callable[..., Network]
SHORT = Sampling(steps=2)
PUZZLE = sudoku.layout("530070000600195000098000060800060003400803001700020006060000280000419005000080079")
SOLVED = sudoku.layout("534678912672195348198342567859761423426853791713924856961537284287419635345286179")
DIGITS = st.text("0123456789\n", max_size=30)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "def f(x):\n    return ",
            "naïve café — ",
            "日本語のテキスト",
            "👩\u200d👩\u200d👧 ok",
            "inter",
            "\r\n",
            "<eos>",
            "",
        ]
    ),
)


@pytest.fixture(scope="module")
def lm() -> LM:
    """With a third of its steps: what it is sure of needs fewer."""
    loaded = blockpress.load("sudoku-nano")
    loaded.generation = replace(loaded.generation, sampling=loaded.generation.sampling.with_(steps=16))
    return loaded


@pytest.fixture(scope="module")
def short(tiny: ModelConfig, random_network: RandomNetwork, digits: Tokenizer) -> LM:
    """Random weights, canvases of 16 tokens."""
    config = replace(tiny, vocab_size=16, canvas_length=16, context_length=96)
    return LM(path=Path(), network=random_network(config), generation=GenerationConfig(stop_ids=(1,)), tokenizer=digits)


@pytest.fixture(scope="module")
def large(gemma: Tokenizer, tiny: ModelConfig, random_network: RandomNetwork) -> LM:
    """The published tokenizer, 262,144 pieces, with random weights."""
    config = replace(tiny, vocab_size=262144, canvas_length=16, context_length=256)
    generation = GenerationConfig(stop_ids=(1, 106))
    return LM(path=Path(), network=random_network(config), generation=generation, tokenizer=gemma)


@pytest.fixture(scope="module")
def chat(tiny: ModelConfig, random_network: RandomNetwork) -> LM:
    """A model with a chat template."""
    config = replace(tiny, vocab_size=CHAT.vocab_size, canvas_length=32, context_length=512)
    return LM(path=Path(), network=random_network(config), generation=GenerationConfig(stop_ids=(1,)), tokenizer=CHAT)


def check_whole(reply: Reply, pieces: list[str]) -> None:
    assert reply.whole is not None and reply.text == "".join(reply.holes)
    assert len(reply.holes) == len(pieces) - 1
    expected = pieces[0] + "".join(hole + piece for hole, piece in zip(reply.holes, pieces[1:], strict=True))
    assert reply.whole.encode() == expected.encode()


@settings(max_examples=num_examples(12))
@given(prefix=DIGITS, suffix=DIGITS, most=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_text_around_a_hole_comes_back_byte_for_byte(
    short: LM, prefix: str, suffix: str, most: int, seed: int
) -> None:
    reply = short.infill(prefix, suffix, most, seed, sampling=SHORT)
    check_whole(reply, [prefix, suffix])
    assert len(reply.tokens) <= most + 1 and reply.invalid is None  # a token may hold some of a seam


def test_a_hole_without_a_limit_ends_after_four_canvases(short: LM) -> None:
    replies = short.infill("12", "34", seed=[0, 1, 2, 3], sampling=SHORT)
    assert all(len(reply.tokens) <= 64 for reply in replies)
    assert any(reply.usage.canvases > 1 for reply in replies)


@settings(max_examples=num_examples(5))
@given(pieces=st.lists(st.text("0123456789\n", min_size=1, max_size=8), min_size=3, max_size=4), seed=st.integers(0, 9))
def test_several_holes_are_filled_between_their_pieces(short: LM, pieces: list[str], seed: int) -> None:
    check_whole(short.infill(pieces, None, 4, seed, sampling=SHORT), pieces)


@pytest.mark.slow
@settings(max_examples=num_examples(4))
@given(prefix=TEXTS, suffix=TEXTS, seed=st.integers(0, 99))
def test_so_does_any_text_with_the_published_tokenizer(large: LM, prefix: str, suffix: str, seed: int) -> None:
    reply = large.infill(prefix, suffix, 4, seed, sampling=SHORT)
    check_whole(reply, [prefix, suffix])
    assert reply.text is not None and reply.text.encode().decode() == reply.text


@pytest.mark.slow
@settings(max_examples=num_examples(10))
@given(data=st.data())
def test_the_seams_allow_the_cut_of_the_joined_text(large: LM, gemma: Tokenizer, data: st.DataObject) -> None:
    """Of real text, cut anywhere: what the tokenizer makes of the whole is among the allowed canvases."""
    source = Path(blockpress.__file__).parent / "lm" / "infill.py"
    text = source.read_text(encoding="utf-8")
    start = data.draw(st.integers(0, len(text) - 600))
    length = data.draw(st.integers(0, 60))
    prefix, hole, suffix = (
        text[start : start + 300],
        text[start + 300 : start + 300 + length],
        text[start + 300 + length : start + 500],
    )
    assert allows(large, gemma, prefix, hole, suffix)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "hole", "suffix"),
    [
        (" def __init__(self) -> None:\n        self.fill, self.seams", ", self.canvas, self.rest = fill, seams", ", self.canvas"),
        ("seams: Seams, canvas: int,", " context: int) -> None:\n        self.fill, self.seams", ", self.canvas, self.rest = 1"),
        ("def sign(x):\n    if x < 0:", "\n        return -1\n    if x > 0:\n        return 1", "\n        return x\n    return 0"),
        ("[", "1, 1, 1, 1", ", 1, 1, 1, 1, 1]"),
    ],
)  # fmt: skip
def test_a_hole_may_hold_what_the_text_after_it_begins_with(
    large: LM, gemma: Tokenizer, prefix: str, hole: str, suffix: str
) -> None:
    assert allows(large, gemma, prefix, hole, suffix)


def allows(lm: LM, tokenizer: Tokenizer, prefix: str, hole: str, suffix: str) -> bool:
    """Whether the canvas may hold the tokenizer's own cut of the joined text, and is split at the hole then."""
    seams = lm._builder.fills._seams
    before, heal = seams.before(prefix)
    seam, after = seams.after(suffix)
    whole = tokenizer.encode(prefix + hole + suffix, add_special=False)
    if whole[: len(before)] != before or whole[len(whole) - len(after) :] != after:
        return True  # 1 place in 400
    made = filling(seams.region(heal, ANY_TEXT, seam), 0, [], after, "stop", [1])
    canvas, state = whole[len(before) :], made.start
    for token in [*canvas, 1]:
        state = made.automaton.step(state, token) if state != DEAD else DEAD
    inside, _ = made.split([*canvas, 1, 1])
    return state != DEAD and bool(made.automaton.accepting[state]) and inside == canvas[: len(canvas) - len(after)]


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (10, 16), (30, 37), (45, 52), (60, 75), (84, 89)])
def test_a_hole_in_a_solved_grid_is_filled_rightly(lm: LM, start: int, stop: int) -> None:
    reply = lm.infill(SOLVED[:start], SOLVED[stop:], 16, instruction=PUZZLE)
    assert reply.text == SOLVED[start:stop] and reply.finish_reason == "stop"


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (10, 16), (60, 75)])
def test_a_hole_whose_text_before_is_in_the_prompt_is_filled_rightly(lm: LM, start: int, stop: int) -> None:
    """Not at every place: the shipped weights were never trained to read a grid's solution causally."""
    reply = lm.infill(PUZZLE + SOLVED[:start], SOLVED[stop:], 16)
    assert reply.text == SOLVED[start:stop] and reply.finish_reason == "stop"


def test_two_holes_in_a_solved_grid_are_filled_rightly(lm: LM) -> None:
    pieces = [PUZZLE + SOLVED[:10], SOLVED[13:50], SOLVED[55:]]
    assert lm.infill(pieces, None, 8).holes == (SOLVED[10:13], SOLVED[50:55])


def test_an_edit_mends_what_is_wrong_and_nothing_around_it(lm: LM) -> None:
    wrong = SOLVED[:36] + "111" + SOLVED[39:]
    reply = lm.edit(wrong, (34, 42), instruction=PUZZLE)
    assert reply.whole == SOLVED and reply.text == SOLVED[34:42]
    kept = lm.edit(PUZZLE + SOLVED, (len(PUZZLE) + 20, len(PUZZLE) + 30))
    assert kept.whole == PUZZLE + SOLVED


@settings(max_examples=num_examples(6))
@given(
    text=st.text("0123456789\n", min_size=1, max_size=20),
    ends=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    noise=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_an_edit_leaves_the_text_around_its_span(short: LM, text: str, ends: tuple[int, int], noise: float) -> None:
    start, stop = sorted(min(end, len(text)) for end in ends)
    stop = min(stop, start + 6)
    reply = short.edit(text, (start, stop), noise=noise, sampling=SHORT, max_tokens=8)
    check_whole(reply, [text[:start], text[stop:]])


def test_a_hole_longer_than_a_canvas_is_filled_canvas_by_canvas(short: LM) -> None:
    for seed in range(4):
        reply = short.infill("12", "34" * 20, 30, seed, sampling=SHORT, regex="[1-9]{25,30}")
        check_whole(reply, ["12", "34" * 20])
        assert re.fullmatch("[1-9]{25,30}", reply.text or "") and len(reply.tokens) <= 30


@pytest.mark.parametrize("suffix", ["345", "345678", "345" * 20, "3333", "3" * 40])
def test_a_hole_may_repeat_the_beginning_of_the_text_after_it(short: LM, suffix: str) -> None:
    hole = f"7{suffix[:6]}1{suffix[:3]}"
    for length in (3, 6, 11):
        reply = short.infill("12", suffix, sampling=SHORT, regex=hole[:length])
        assert reply.text == hole[:length] and reply.whole == "12" + hole[:length] + suffix
        assert reply.finish_reason == "stop" and reply.invalid is None


@settings(max_examples=num_examples(10))
@given(
    suffix=st.builds(mul, st.sampled_from(["7", "34", "12345678", "9\n"]), st.integers(0, 20)),
    least=st.integers(0, 20),
    more=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_a_hole_of_any_size_is_written_wherever_its_end_comes_to_stand(
    short: LM, suffix: str, least: int, more: int, seed: int
) -> None:
    """Inside of the canvas, where what stands after it is cut, or on a later canvas."""
    shape = f"[37]{{{least},{least + more}}}"
    reply = short.infill("12", suffix, None, seed, sampling=SHORT, regex=shape)
    check_whole(reply, ["12", suffix])
    assert re.fullmatch(shape, reply.text or "") and reply.invalid is None


def test_a_hole_for_which_the_others_leave_no_room_says_so(short: LM) -> None:
    pieces = ["3" * 18, "3" * 9, "3" * 6]
    replies = short.infill(pieces, None, seed=[0, 2], sampling=SHORT)
    for reply in replies:
        check_whole(reply, pieces)
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"regex": "[1-3]{2,5}"}, lambda text: re.fullmatch("[1-3]{2,5}", text)),
        ({"choice": ["12", "345"]}, lambda text: text in ["12", "345"]),
        ({"schema": {"type": "integer", "minimum": 10, "maximum": 99}}, lambda text: 10 <= json.loads(text) <= 99),
        ({"grammar": 'start: "1" start "2" | "3"'}, lambda text: re.fullmatch("1*32*", text) and len(text) % 2),
        ({"regex": r"\b[1-3]{2,5}\b(?!.)"}, lambda text: re.fullmatch("[1-3]{2,5}", text)),
    ],
    ids=["regex", "choice", "schema", "grammar", "boundaries"],
)
def test_a_hole_may_have_a_shape(short: LM, options: dict[str, Any], fits: Callable[[str], Any]) -> None:
    for seed in range(3):
        reply = short.infill("12", "34", seed=seed, sampling=SHORT, **options)
        assert fits(reply.text or "")
        check_whole(reply, ["12", "34"])


def test_an_instruction_stands_before_the_text_in_a_turn_of_the_user(chat: LM) -> None:
    seen: list[str] = []
    answer = chat.answer

    def spy(network: Any, requests: Any, cancel: Any) -> Any:
        seen.append(CHAT.decode(requests[0].row.prompt, skip_special=False))
        return answer(network, requests, cancel)

    spied = LM(path=Path(), network=chat.network, generation=chat.generation, tokenizer=CHAT, answer=spy)
    reply = spied.edit("a cat <eos>sat", (2, 5), "Say dog.", sampling=SHORT, max_tokens=4)
    check_whole(reply, ["a ", " <eos>sat"])
    assert all("<|turn>user" in prompt and "Say dog.\n\na cat <eos>sat" in prompt for prompt in seen)
    assert all(prompt.endswith("<|channel>thought\n<channel|>") for prompt in seen)


def test_seeds_are_rows_and_each_is_as_alone(short: LM) -> None:
    together = short.infill("12", "34", 6, seed=[1, 2, 1], sampling=SHORT)
    assert together == [short.infill("12", "34", 6, seed, sampling=SHORT) for seed in (1, 2, 1)]


def test_the_reference_loop_fills_the_same(lm: LM) -> None:
    slow = LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=lm.tokenizer, answer=run_reference)
    hole = PUZZLE + SOLVED[:85], SOLVED[88:]
    assert slow.infill(*hole, 4) == lm.infill(*hole, 4)


def test_events_are_the_steps_the_holes_and_the_reply(lm: LM) -> None:
    events = list(lm.infill_stream(PUZZLE + SOLVED[:30], SOLVED[37:], 9))
    (done,) = (event for event in events if isinstance(event, Done))
    assert events[-1] is done and done.reply == lm.infill(PUZZLE + SOLVED[:30], SOLVED[37:], 9)
    assert "".join(event.text for event in events if isinstance(event, Text)) == done.reply.text
    steps = [event for event in events if isinstance(event, Denoised)]
    assert 0 < len(steps) < done.reply.usage.steps  # the lengths that were tried are counted, not shown


def test_a_cancelled_fill_says_so_and_keeps_the_text(lm: LM) -> None:
    cancel = threading.Event()
    events = []
    for event in lm.infill_stream(PUZZLE + SOLVED[:30], SOLVED[37:], 9, cancel=cancel):
        events.append(event)
        cancel.set()
    reply = events[-1].reply
    assert reply.finish_reason == "cancelled" and reply.invalid is not None
    assert reply.whole == PUZZLE + SOLVED[:30] + SOLVED[37:]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("12",), {}, "suffix is None"),
        ((["12"],), {}, "prefix has 1 texts"),
        ((["1", "", "2"],), {}, r"prefix\[1\] is empty"),
        ((["1", "2"], "3"), {}, "suffix is '3' beside a list"),
        ((7, "3"), {}, "prefix is 7"),
        (("1x", "3"), {}, "no token for 'x'"),
        (("1", "3", 0), {}, "max_tokens is 0"),
        (("1", "3", None, []), {}, "seed is empty"),
        (("1", "3", None, "s"), {}, "seed is 's'"),
        (("1", "3"), {"instruction": ""}, "instruction is ''"),
        (("1", "3"), {"sampling": Sampling(stop=("2",))}, "sampling.stop is"),
        (("1", "3"), {"sampling": Sampling(max_verifications=2)}, "sampling.max_verifications is 2"),
        (("1", "3"), {"sampling": Sampling(max_repairs=2)}, "sampling.max_repairs is 2"),
        (("1", "3"), {"sampling": 5}, "sampling is 5"),
        (("1", "3"), {"cancel": 5}, "cancel is 5"),
        (("1", "3", 2), {"regex": "[1-9]{5}"}, r"regex '\[1-9\]\{5\}' needs 5 tokens, and max_tokens is 2"),
        (("1", "3"), {"regex": "x"}, "the vocabulary cannot write regex 'x'"),
        (("1", "3"), {"regex": "1", "choice": ["1"]}, "regex and choice are given"),
        ((["1", "2", "3"],), {"regex": "1"}, "is given for 2 holes"),
        (("1" * 300, "3"), {}, "tokens stand before the hole"),
    ],
)
def test_what_cannot_be_filled_is_refused_by_name(lm: LM, arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(BlockpressError, match=words):
        lm.infill_stream(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("12", (1, 3)), r"span is \(1, 3\), and the text has 2 characters"),
        (("12", (1, 0)), r"span is \(1, 0\)"),
        (("12", (-1, 1)), r"span is \(-1, 1\)"),
        (("12", 5), "span is 5"),
        (("12", (0, 1, 2)), r"span is \(0, 1, 2\)"),
        ((12, (0, 1)), "text is 12"),
        (("12", (0, 1), None, 1.5), "noise is 1.5"),
        (("1" * 100, (0, 100)), "span has 100 tokens, and a canvas has room for"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name(lm: LM, arguments: Any, words: str) -> None:
    with pytest.raises(BlockpressError, match=words):
        lm.edit_stream(*arguments)
