"""The reference loop with a network that gives a set answer: events, limits, stops, cancellation, counts."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blockpress.config import PRESETS, Sampling
from blockpress.decoding import Committed, Denoised, Done, Event, Reply, SequenceState, Text
from blockpress.decoding.generate import generate, pad
from blockpress.diffusion import KeyedDraws
from blockpress.model import Cache, Network
from blockpress.text import StreamDecoder, Tokenizer
from blockpress.text.builder import write_digits_tokenizer

CANVAS, VOCAB, EOS = 12, 16, 1
CONFIG = replace(PRESETS["tiny"](), vocab_size=VOCAB, hidden_size=VOCAB, canvas_length=CANVAS, context_length=4096)
ENDLESS = "0123456789" * 40


class Scripted(Network):
    """A network whose causal pass is a real one and whose denoiser reads answers from a script.

    Row r has a prompt of r + 1 tokens, so that the context's length tells row and canvas. The argmax of a canvas moves
    with every step before the last but one of `steps(row, canvas)`, so it settles exactly there (with stability 1).
    """

    def __init__(self, answers: Sequence[list[int]], steps: Callable[[int, int], int] = lambda row, canvas: 2) -> None:
        super().__init__(CONFIG)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed_tokens.weight.copy_(torch.eye(VOCAB))
        self.answers, self.steps = answers, steps
        self.calls: Counter[tuple[int, int]] = Counter()
        self.reads: list[list[int]] = []
        self.caches: list[weakref.ref[Cache]] = []

    def read(
        self, tokens: Tensor, cache: Cache, counts: Tensor | None = None, images: None = None
    ) -> tuple[Tensor, Cache]:
        assert counts is not None
        self.reads.append(counts.tolist())
        hidden, cache = super().read(tokens, cache, counts)
        self.caches.append(weakref.ref(cache))
        return hidden, cache

    def denoise(self, canvas: Tensor, cache: Cache, signal: Tensor | None) -> Tensor:
        written = []
        for length in cache.lengths.tolist():
            row, number = length % CANVAS - 1, length // CANVAS
            self.calls[row, number] += 1
            shift = max(0, self.steps(row, number) - 1 - self.calls[row, number])
            tokens = self.answers[row][number * CANVAS : (number + 1) * CANVAS]
            written.append([(token + shift) % VOCAB for token in tokens])
        return F.one_hot(torch.tensor(written), VOCAB).float() * 100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("digits")
    write_digits_tokenizer(folder)
    return Tokenizer.from_directory(folder)


def ids(text: str) -> list[int]:
    """Digits as tokens; `.` is the end of the answer."""
    return [EOS if sign == "." else 5 + int(sign) for sign in text]


def answer(text: str) -> list[int]:
    """A script that goes on for ever behind the text."""
    return ids(text) + ids(ENDLESS)


@dataclass
class Play:
    """What a run of scripted rows gave."""

    network: Scripted
    events: list[Event]

    def of(self, row: int, kind: type | None = None) -> list[Any]:
        return [event for event in self.events if event.row == row and (kind is None or isinstance(event, kind))]

    def reply(self, row: int = 0) -> Reply:
        (done,) = self.of(row, Done)
        return done.reply


def rows_for(
    count: int,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    max_tokens: int | None = None,
    room: int = 4000,
    stop_ids: Sequence[int] = (EOS,),
) -> list[SequenceState]:
    return [
        SequenceState(
            row,
            [7] * (row + 1),
            row,
            stop_ids=stop_ids,
            canvas_length=CANVAS,
            room=room,
            max_tokens=max_tokens,
            decoder=None if tokenizer is None else StreamDecoder(tokenizer, stop=list(stop)),
        )
        for row in range(count)
    ]


def play(
    answers: Sequence[list[int]],
    tokenizer: Tokenizer | None = None,
    *,
    steps: Callable[[int, int], int] = lambda row, canvas: 2,
    cancel: Any = None,
    sampling: Sampling | None = None,
    **limits: Any,
) -> Play:
    network = Scripted(answers, steps)
    rows = rows_for(len(answers), tokenizer, **limits)
    return Play(network, list(generate(network, rows, sampling or Sampling(), cancel)))


def test_one_canvas_from_prompt_to_reply(tokenizer: Tokenizer):
    run = play([ids("12345.678901")], tokenizer, steps=lambda row, canvas: 4)
    reply = run.reply()
    assert (reply.text, reply.tokens, reply.finish_reason) == ("12345", ids("12345."), "stop")
    assert [type(event).__name__ for event in run.events] == ["Denoised"] * 4 + ["Committed", "Text", "Done"]
    assert run.events[4] == Committed(0, 0, ids("12345."), 4)
    assert [event.argmax.tolist() == ids("12345.678901") for event in run.of(0, Denoised)] == [False, False, True, True]


# ---------------------------------------------------------------------------------------------------------- events


def test_events_come_in_order_for_every_row(tokenizer: Tokenizer):
    texts = ["1." + "0" * 10, "2" * 30 + "." + "0" * 5, "3" * 14 + "." + "0" * 9]
    run = play([answer(text) for text in texts], tokenizer, steps=lambda row, canvas: 2 + (row * 2 + canvas) % 5)
    for row, canvases in enumerate([1, 3, 2]):
        events = run.of(row)
        assert isinstance(events[-1], Done)
        assert run.of(row, Done) == events[-1:]
        for number in range(canvases):
            steps = [event for event in run.of(row, Denoised) if event.canvas == number]
            wanted = 2 + (row * 2 + number) % 5
            assert [event.step for event in steps] == list(range(1, wanted + 1))
            assert [event.settled for event in steps] == [False] * (wanted - 1) + [True]
            committed = Committed(row, number, events[-1].reply.tokens[number * CANVAS : (number + 1) * CANVAS], wanted)
            # Its place: behind its last step, before the next canvas's first.
            assert events[events.index(steps[-1]) + 1] == committed
        assert len(run.of(row, Committed)) == canvases
        assert {event.canvas for event in run.of(row, Denoised)} == set(range(canvases))
    # Time goes on: a step's events of all rows stand together.
    clock = [(event.canvas, event.step) for event in run.events if isinstance(event, Denoised)]
    assert clock == sorted(clock)


def test_the_first_step_changes_all_and_the_settled_one_nothing():
    first, *between, last = play([answer("1" * 12)], max_tokens=12, steps=lambda row, canvas: 5).of(0, Denoised)
    assert first.changed.all()
    assert all(event.changed.all() for event in between[:-1])
    assert not last.changed.any()
    assert all(event.accepted.all() and event.entropy.max() < 1e-6 for event in [first, *between, last])


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.sampled_from([(), ("77",), ("12", "2345"), ("890123",)]),
    st.none() | st.integers(1, 40),
)
def test_streamed_text_joins_to_the_reply_and_rows_are_independent(
    tokenizer: Tokenizer, lengths: list[int], stop: Sequence[str], max_tokens: int | None
):
    scripts = [(ENDLESS[row:][:length] + ".") for row, length in enumerate(lengths)]
    answers = [answer(script) for script in scripts]
    run = play(answers, tokenizer, steps=lambda row, canvas: 2 + (row + canvas) % 3, stop=stop, max_tokens=max_tokens)
    for row, script in enumerate(scripts):
        reply = run.reply(row)
        text = script[:max_tokens].rstrip(".")
        starts = [text.find(one) for one in stop if one in text]
        wanted = text[: min(starts, default=len(text))]
        assert reply.text == wanted == "".join(event.text for event in run.of(row, Text))
        assert all(event.text for event in run.of(row, Text))
        assert reply.tokens == ids(wanted if starts else script[:max_tokens])
        ended = bool(starts) or len(text) < len(script[:max_tokens])
        assert reply.finish_reason == ("stop" if ended else "length")


# ---------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("limit", [1, 2, CANVAS - 1, CANVAS, CANVAS + 1, 2 * CANVAS, 5 * CANVAS // 2])
@pytest.mark.parametrize("with_text", [True, False])
def test_max_tokens_is_exact(tokenizer: Tokenizer, limit: int, with_text: bool):
    run = play([answer("")], tokenizer if with_text else None, max_tokens=limit)
    reply = run.reply()
    assert reply.tokens == answer("")[:limit]
    assert reply.text == (ENDLESS[:limit] if with_text else None)
    assert reply.finish_reason == "length"
    canvases = -(-limit // CANVAS)
    assert (reply.usage.completion_tokens, reply.usage.canvases) == (limit, canvases)
    assert set(run.network.calls) == {(0, number) for number in range(canvases)}
    assert sum((event.tokens for event in run.of(0, Committed)), []) == reply.tokens


@pytest.mark.parametrize(("limit", "reason"), [(5, "length"), (6, "stop"), (7, "stop")])
def test_a_stop_id_at_the_token_limit_is_a_stop(limit: int, reason: str):
    reply = play([answer("12345.")], max_tokens=limit).reply()
    assert (reply.tokens, reply.finish_reason) == (ids("12345.")[:limit], reason)


@pytest.mark.parametrize(("room", "canvases"), [(CANVAS, 1), (2 * CANVAS - 1, 1), (2 * CANVAS, 2), (40, 3)])
def test_the_end_of_the_context_ends_an_answer(room: int, canvases: int):
    reply = play([answer("")], room=room).reply()
    assert (len(reply.tokens), reply.finish_reason) == (canvases * CANVAS, "length")


def test_the_end_of_the_context_releases_held_text(tokenizer: Tokenizer):
    # The canvas ends in what may be the beginning of the stop string.
    reply = play([answer("")], tokenizer, room=CANVAS, stop=["12"]).reply()
    assert (reply.text, reply.finish_reason) == ("0", "stop")
    reply = play([answer("")], tokenizer, room=CANVAS, stop=["013"]).reply()
    assert (reply.text, reply.finish_reason) == ("012345678901", "length")


# ----------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("place", [0, 1, CANVAS - 1, CANVAS, CANVAS + 5, 2 * CANVAS - 1])
def test_a_stop_id_is_kept_and_ends_the_answer(place: int):
    run = play([answer(ENDLESS[:place] + ".")])
    reply = run.reply()
    assert (reply.tokens, reply.finish_reason) == (ids(ENDLESS[:place] + "."), "stop")
    assert set(run.network.calls) == {(0, number) for number in range(place // CANVAS + 1)}
    assert reply.usage.canvases == place // CANVAS + 1
    # The last canvas needs no commit.
    assert run.network.reads == [[1]] + [[CANVAS]] * (place // CANVAS)


def test_the_first_stop_id_counts():
    reply = play([answer("123456.")], stop_ids=[EOS, 8, 10]).reply()
    assert (reply.tokens, reply.finish_reason) == (ids("123"), "stop")


def test_without_stop_ids_the_answer_goes_on():
    assert play([answer("1.2.")], stop_ids=[], max_tokens=30).reply().finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["5"], "01234"),
        (["0"], ""),
        (["34567"], "012"),
        (["9012"], "012345678"),
        (["890123"], "01234567"),
        (["01" + ENDLESS[2:30]], ""),
        (["12345", "34"], "0"),
        (["23", "1299"], "01"),
    ],
    ids=["inside", "first", "long", "border", "across", "three canvases", "two", "decoy"],
)
def test_a_stop_string_ends_the_text_before_itself(tokenizer: Tokenizer, stop: list[str], text: str):
    run = play([answer("")], tokenizer, stop=stop)
    reply = run.reply()
    assert (reply.text, reply.tokens, reply.finish_reason) == (text, ids(text), "stop")
    assert reply.usage.completion_tokens == len(text)
    assert "".join(event.text for event in run.of(0, Text)) == text


def test_no_canvas_starts_after_a_stop_string(tokenizer: Tokenizer):
    run = play([answer("")], tokenizer, stop=["9012"])
    assert set(run.network.calls) == {(0, 0), (0, 1)}
    assert run.reply().usage.canvases == 2


def test_an_unfinished_stop_string_is_released_at_the_end(tokenizer: Tokenizer):
    reply = play([answer("123451234.")], tokenizer, stop=["12346"]).reply()
    assert (reply.text, reply.finish_reason) == ("123451234", "stop")
    reply = play([answer("")], tokenizer, stop=["99"], max_tokens=30).reply()
    assert (reply.text, reply.finish_reason) == (ENDLESS[:30], "length")


def test_a_stop_string_after_the_stop_id_or_the_limit_is_ignored(tokenizer: Tokenizer):
    assert play([answer("12.34")], tokenizer, stop=["34"]).reply().tokens == ids("12.")
    reply = play([answer("1234")], tokenizer, stop=["34"], max_tokens=3).reply()
    assert (reply.text, reply.finish_reason) == ("123", "length")


# ---------------------------------------------------------------------------------------------------- cancellation


class After:
    """Set once it has been asked `count` times, that is after `count` steps."""

    def __init__(self, count: int) -> None:
        self.left = count

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize(("count", "canvases"), [(1, 0), (3, 0), (4, 0), (5, 1), (8, 1), (10, 2)])
def test_cancelling_between_steps_keeps_committed_tokens(tokenizer: Tokenizer, count: int, canvases: int):
    run = play([answer("")], tokenizer, steps=lambda row, canvas: 4, cancel=After(count))
    reply = run.reply()
    assert reply.finish_reason == "cancelled"
    assert reply.tokens == answer("")[: canvases * CANVAS]
    assert reply.text == ENDLESS[: canvases * CANVAS]
    assert len(run.of(0, Denoised)) == reply.usage.steps == count
    assert (reply.usage.canvases, reply.usage.forwards) == (canvases, count + canvases)
    assert reply.usage.completion_tokens == canvases * CANVAS


def test_a_threading_event_cancels_every_row_under_way():
    cancel, events = threading.Event(), []
    network = Scripted([answer("1."), answer(""), answer("")])
    for event in generate(network, rows_for(3), Sampling(), cancel):
        events.append(event)
        if isinstance(event, Denoised) and (event.row, event.canvas, event.step) == (1, 1, 1):
            cancel.set()
    replies = {event.row: event.reply for event in events if isinstance(event, Done)}
    assert [replies[row].finish_reason for row in range(3)] == ["stop", "cancelled", "cancelled"]
    assert [replies[row].usage.steps for row in range(3)] == [2, 3, 3]
    assert [len(replies[row].tokens) for row in range(3)] == [2, CANVAS, CANVAS]


@pytest.mark.parametrize("count", [2, 3])
def test_cancelled_text_is_streamed_too(tokenizer: Tokenizer, count: int):
    # The first canvas ends in "1", which may begin the stop string, so it is held back until the end.
    run = play([answer("")], tokenizer, stop=["15"], cancel=After(count))
    assert run.reply().text == "".join(event.text for event in run.of(0, Text)) == ENDLESS[: CANVAS * (count - 2)]


# ---------------------------------------------------------------------------------------------------------- counts


def test_usage_counts_by_the_projects_definitions(tokenizer: Tokenizer):
    steps = {0: [3, 5, 2], 1: [2], 2: [4, 4]}
    scripts = [ENDLESS[:30] + ".", "12.", ENDLESS[:15] + "."]
    run = play([answer(text) for text in scripts], tokenizer, steps=lambda row, canvas: steps[row][canvas])
    for row, taken in steps.items():
        usage = run.reply(row).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (row + 1, len(scripts[row]))
        assert (usage.canvases, usage.steps) == (len(taken), sum(taken))
        assert usage.forwards == sum(taken) + len(taken) - 1
        assert usage.tokens_per_forward == pytest.approx(len(scripts[row]) / (sum(taken) + len(taken) - 1))
        assert [event.steps for event in run.of(row, Committed)] == taken


def test_text_cut_by_a_stop_string_is_not_counted(tokenizer: Tokenizer):
    usage = play([answer("")], tokenizer, stop=["9012"]).reply().usage
    assert (usage.completion_tokens, usage.steps, usage.forwards) == (9, 4, 5)
    assert usage.tokens_per_forward == pytest.approx(9 / 5)


def test_an_unsettled_canvas_ends_at_the_last_step_with_its_argmax():
    run = play([answer("")], steps=lambda row, canvas: 100, max_tokens=CANVAS, stop_ids=[], sampling=Sampling(steps=7))
    last = run.of(0, Denoised)[-1]
    assert (last.step, last.settled) == (7, False)
    assert run.reply().tokens == last.argmax.tolist() != answer("")[:CANVAS]
    assert run.reply().usage.steps == 7


# -------------------------------------------------------------------------------------------------- the other side


def test_draws_are_keyed_by_row_seed_and_canvas_number():
    asked = []

    def keyed(seeds: list[int], canvases: list[int], **size: Any) -> KeyedDraws:
        asked.append((list(seeds), list(canvases), size["length"], size["vocab"]))
        return KeyedDraws(seeds, canvases, **size)

    network = Scripted([answer(""), answer("1."), answer("")])
    list(generate(network, rows_for(3, max_tokens=30), Sampling(), make_draws=keyed))
    assert asked == [
        ([0, 1, 2], [0, 0, 0], CANVAS, VOCAB),
        ([0, 2], [1, 1], CANVAS, VOCAB),
        ([0, 2], [2, 2], CANVAS, VOCAB),
    ]


def test_closing_early_frees_the_network():
    network = Scripted([answer("")])
    events: Iterator[Event] = generate(network, rows_for(1), Sampling())
    for _ in range(3):
        next(events)
        assert not torch.is_inference_mode_enabled()
    events.close()  # type: ignore[attr-defined]
    assert not torch.is_inference_mode_enabled()
    assert list(events) == []
    gc.collect()
    assert len(network.caches) == 1
    assert network.caches[0]() is None
    fresh = Scripted([answer("")])
    assert list(generate(fresh, rows_for(1, max_tokens=3), Sampling()))[-1] == Done(
        0, play([answer("")], max_tokens=3).reply()
    )


def test_short_rows_are_padded_on_the_right():
    tokens, counts = pad(Scripted([]), [[5, 6, 7], [8], [9, 10]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert counts.tolist() == [3, 1, 2]
