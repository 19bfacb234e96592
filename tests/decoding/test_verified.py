"""Verified decoding: what is compared, what is pinned, what ends it, what it counts, and that it ends as the greedy
answer of the same weights token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blockpress.config import Sampling
from blockpress.decoding import Committed, Denoised, Done, Event, SequenceState
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import generate
from blockpress.decoding.sequence import FinishedCanvas
from blockpress.decoding.verified import generate_verified, verify_draft
from blockpress.diffusion import KeyedDraws
from blockpress.model import Cache, Network
from tests.conftest import make_random_network

from .test_autoregressive import Told
from .test_scoring import CANVAS, CONFIG, LOOSE, PROMPTS, VOCAB, replies

pytestmark = pytest.mark.end_to_end

ALL = LOOSE.with_(max_verifications=CANVAS)
"""Every check proves a token, so that each canvas ends in agreement."""


@pytest.fixture(scope="module")
def network() -> Network:
    return make_random_network(CONFIG, seed=3).requires_grad_(False)


def rows(prompts: Sequence[list[int]] = PROMPTS, canvas: int = CANVAS, **changes: Any) -> list[SequenceState]:
    given = {"stop_ids": (), "canvas_length": canvas, "room": 60, "max_tokens": 16} | changes
    return [SequenceState(index, prompt, index, **given) for index, prompt in enumerate(prompts)]


def greedy(network: Network, **changes: Any) -> list[list[int]]:
    return [reply.tokens for reply in replies(list(generate_autoregressive(network, rows(canvas=1, **changes))))]


def plain(event: Event) -> tuple[str, dict[str, Any]]:
    return type(event).__name__, {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(event).items()}


# ---------------------------------------------------------------------------------------------------------- verdict

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


@given(TOKENS, TOKENS, st.dictionaries(st.integers(0, 8), st.integers(0, 3), max_size=4), st.sets(st.integers(0, 3)))
def test_a_draft_is_verified_up_to_the_first_disagreement(
    tokens: list[int], expected: list[int], pinned: dict[int, int], stop_ids: set[int]
) -> None:
    size = min(len(tokens), len(expected))
    pinned = {place: token for place, token in pinned.items() if place < size}
    tokens, expected = [pinned.get(i, token) for i, token in enumerate(tokens[:size])], expected[:size]
    found = verify_draft(tokens, expected, pinned, stop_ids, size + 1)
    free = [place for place in range(size) if place not in pinned and tokens[place] != expected[place]]
    assert found.num_accepted == min(free, default=size)
    assert found.tokens[: found.num_accepted] == tokens[: found.num_accepted]
    # What was pinned stays, and what is pinned is what stands, without a gap.
    assert found.pins == pinned | dict(enumerate(found.tokens))
    if free:
        assert found.tokens[found.num_accepted :] == [expected[found.num_accepted]]
        assert found.finished == (expected[found.num_accepted] in stop_ids)
        assert len(found.pins) > len(pinned)
    else:
        assert found.finished and found.tokens == tokens


def test_a_disagreement_at_the_last_counted_position_is_corrected() -> None:
    assert verify_draft([5, 6, 7], [5, 6, 8], {}, {1}, 3).finished
    assert not verify_draft([5, 6, 7], [5, 6, 8], {}, {1}, 4).finished
    # A stop id that the causal pass would not have written yet: behind it the canvas goes on.
    assert not verify_draft([5, 1], [5, 6], {}, {1}, 4).finished


# --------------------------------------------------------------------------------------------------------- same tokens


def test_without_checks_it_is_generate(network: Network) -> None:
    stop = greedy(network)[0][:1]
    ours, theirs = (list(f(network, rows(stop_ids=stop), LOOSE)) for f in (generate_verified, generate))
    assert [plain(event) for event in ours] == [plain(event) for event in theirs]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, CANVAS, None])
def test_a_canvas_in_agreement_is_the_greedy_answer(network: Network, limit: int | None) -> None:
    free = greedy(network)
    for stop_ids in ((), (free[0][2], free[2][9]), (free[1][0],)):
        changes: dict[str, Any] = {"stop_ids": stop_ids, "max_tokens": limit, "room": 2 * CANVAS}
        found = replies(list(generate_verified(network, rows(**changes), ALL)))
        assert [reply.tokens for reply in found] == greedy(network, **changes)
        # Random weights agree with themselves by chance alone, so there was something to do.
        assert sum(reply.usage.redos for reply in found) > 0 or limit == 1 or stop_ids


def test_every_check_accepts_at_least_one_token(network: Network) -> None:
    wanted, before = greedy(network, max_tokens=CANVAS), [0] * len(PROMPTS)
    for checks in range(CANVAS + 1):
        found = replies(
            list(generate_verified(network, rows(max_tokens=CANVAS), LOOSE.with_(max_verifications=checks)))
        )
        same = [sum(1 for _ in matching(reply.tokens, own)) for reply, own in zip(found, wanted, strict=True)]
        assert all(checks <= count >= least for count, least in zip(same, before, strict=True))
        assert all(reply.usage.verifications <= checks for reply in found)
        before = same
    assert before == [CANVAS] * len(PROMPTS)


def matching(one: Sequence[int], other: Sequence[int]) -> Any:
    for a, b in zip(one, other, strict=True):
        if a != b:
            return
        yield a


@given(
    checks=st.integers(0, CANVAS),
    seeds=st.lists(st.integers(-(2**70), 2**70), min_size=4, max_size=4),
    chosen=st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True),
    stop=st.integers(0, VOCAB - 1),
)
@settings(max_examples=3)
def test_a_row_of_a_batch_is_the_row_alone(checks: int, seeds: list[int], chosen: list[int], stop: int) -> None:
    network = make_random_network(CONFIG, seed=3).requires_grad_(False)
    sampling = LOOSE.with_(max_verifications=checks)

    def one(index: int, place: int) -> SequenceState:
        given: dict[str, Any] = {"stop_ids": (stop,), "canvas_length": CANVAS, "room": 60, "max_tokens": 9}
        return SequenceState(place, PROMPTS[index], seeds[index], **given)

    together = replies(
        list(generate_verified(network, [one(index, place) for place, index in enumerate(chosen)], sampling))
    )
    alone = [replies(list(generate_verified(network, [one(index, 0)], sampling)))[0] for index in chosen]
    assert [(reply.tokens, reply.usage) for reply in together] == [(reply.tokens, reply.usage) for reply in alone]


def test_no_two_canvases_share_draws_and_pins_hold_from_the_first_noise_on(network: Network) -> None:
    asked: list[tuple[int, int]] = []

    def keyed(seeds: list[int], canvases: list[int], **size: Any) -> KeyedDraws:
        asked.extend(zip(seeds, canvases, strict=True))
        return KeyedDraws(seeds, canvases, **size)

    turn = Told({}, again=2)
    made = [*rows(PROMPTS[:1], stop_ids=(greedy(network)[0][0],), processor=turn), *rows()[1:]]
    events = list(generate_verified(network, made, ALL, make_draws=keyed))
    assert len(asked) == len(set(asked)) and all(0 <= number < 2**32 for _, number in asked)
    begun = Counter(event.row for event in events if isinstance(event, Denoised) and event.step == 1)
    assert begun == Counter(seed for seed, _ in asked)
    for row in (1, 2, 3):
        last: dict[int, list[list[int]]] = {}
        own = [event for event in events if isinstance(event, Denoised) and event.row == row and event.canvas == 0]
        for event in own:
            last.setdefault(event.verifications, []).append(event.argmax.tolist())
        committed = next(e.tokens for e in events if isinstance(e, Committed) and e.row == row)
        for checks, steps in last.items():
            assert all(argmax[:checks] == committed[:checks] for argmax in steps)
        assert list(last) == list(range(len(last))) and len(last) > 1


# -------------------------------------------------------------------------------------------------------------- counts


def watched(network: Network, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the passes of the network, by name."""
    ran: Counter[str] = Counter()
    for name in ("read", "denoise"):

        def counted(*args: Any, name: str, run: Any) -> Any:
            ran[name] += 1
            return run(*args)

        monkeypatch.setattr(network, name, partial(counted, name=name, run=getattr(network, name)))
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("limit", [5, None])
@pytest.mark.parametrize("checks", [0, 2, CANVAS])
def test_usage_counts_what_the_network_ran(
    network: Network, monkeypatch: pytest.MonkeyPatch, checks: int, limit: int | None, logprobs: int | None
) -> None:
    ran = watched(network, monkeypatch)
    for prompt in PROMPTS[:2]:
        ran.clear()
        made = rows([prompt], max_tokens=limit, room=2 * CANVAS, logprobs=logprobs)
        events = list(generate_verified(network, made, LOOSE.with_(max_verifications=checks)))
        usage = replies(events)[0].usage
        assert usage.steps == ran["denoise"] == len([event for event in events if isinstance(event, Denoised)])
        assert usage.forwards == ran["denoise"] + ran["read"] - 1  # the prompt's
        assert usage.tokens_per_forward == pytest.approx(usage.completion_tokens / usage.forwards)
        assert usage.steps == sum(event.steps for event in events if isinstance(event, Committed))
        assert (usage.redos <= usage.verifications) and (usage.verifications > 0) == (checks > 0)


class Agreeing(Network):
    """A network that writes, in two steps, what it is told, and whose causal pass expects 1 + the token before."""

    def __init__(self, answer: Sequence[int]) -> None:
        super().__init__(CONFIG)
        self.answer, self.reads = list(answer), []
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed_tokens.weight.copy_(torch.eye(VOCAB, CONFIG.hidden_size))  # a hidden state is its logits

    def read(self, tokens: Tensor, cache: Cache, counts: Any = None, images: None = None) -> tuple[Tensor, Cache]:
        self.reads.append(tokens.tolist())
        _, cache = super().read(tokens, cache, counts)
        return F.one_hot((tokens + 1) % VOCAB, CONFIG.hidden_size).to(self.dtype), cache

    def denoise(self, canvas: Tensor, cache: Cache, signal: Tensor | None) -> Tensor:
        begin = int(cache.lengths[0]) - 1
        own = torch.tensor([(self.answer + [0] * 99)[begin : begin + CANVAS]])
        return F.one_hot(own, CONFIG.hidden_size).to(self.dtype) * 100


def test_a_check_that_agrees_is_the_commit() -> None:
    network = Agreeing([*range(4, 4 + 2 * CANVAS)])
    (reply,) = replies(
        list(generate_verified(network, rows([[3]], max_tokens=2 * CANVAS), Sampling(max_verifications=4)))
    )
    assert reply.tokens == network.answer
    assert network.reads == [[[3]], [network.answer[:CANVAS]], [network.answer[CANVAS:]]]
    usage = reply.usage
    assert (usage.canvases, usage.steps, usage.forwards, usage.verifications, usage.redos) == (2, 4, 6, 2, 0)


def test_a_wrong_last_token_is_corrected_without_another_round() -> None:
    right = [*range(4, 4 + 2 * CANVAS)]
    network = Agreeing([*right[: CANVAS - 1], 0, *right[CANVAS:]])
    (reply,) = replies(
        list(generate_verified(network, rows([[3]], max_tokens=2 * CANVAS), Sampling(max_verifications=4)))
    )
    assert reply.tokens == right
    # Of the checked canvas all but the last token is context already.
    wrong = network.answer[:CANVAS]
    assert network.reads == [[[3]], [wrong], [[right[CANVAS - 1]]], [right[CANVAS:]]]
    assert (reply.usage.steps, reply.usage.forwards, reply.usage.verifications, reply.usage.redos) == (4, 7, 2, 0)


def test_a_stop_id_of_the_causal_pass_ends_the_answer() -> None:
    network = Agreeing([4, 5, 0, 7, 8, 9])
    made = rows([[3]], stop_ids=(6,), logprobs=1)
    (reply,) = replies(list(generate_verified(network, made, Sampling(max_verifications=4))))
    assert (reply.tokens, reply.finish_reason, reply.usage.redos) == ([4, 5, 6], "stop", 0)
    assert [(said.token, said.top[0][0]) for said in reply.logprobs or []] == [(4, 4), (5, 5), (6, 6)]


def test_tokens_after_a_stop_id_are_not_compared() -> None:
    network = Agreeing([4, 5, 6, 0, 0, 0])
    (reply,) = replies(list(generate_verified(network, rows([[3]], stop_ids=(6,)), Sampling(max_verifications=4))))
    assert (reply.tokens, reply.usage.verifications, reply.usage.redos) == ([4, 5, 6], 1, 0)
    assert network.reads[1:] == [[[4, 5, 6]]]


def test_after_the_last_check_the_draft_is_committed() -> None:
    network = Agreeing([4, 0, 0, 0, 0, 0])
    (reply,) = replies(list(generate_verified(network, rows([[3]], max_tokens=CANVAS), Sampling(max_verifications=2))))
    # Place 1 is put right, then place 2; the third disagreement is not looked for.
    assert reply.tokens == [4, 5, 6, 0, 0, 0]
    assert (reply.usage.verifications, reply.usage.redos, reply.usage.forwards) == (2, 2, 6 + 2)


# ----------------------------------------------------------------------------------------------------- the other side


def test_an_empty_canvas_is_retried_from_the_same_context(network: Network) -> None:
    """The causal pass wants to stop at once, and so does what comes after it."""
    stop = greedy(network)[0][0]
    made = rows(PROMPTS[:1], stop_ids=(stop,), processor=Told({}, again=2))
    (reply,) = replies(list(generate_verified(network, made, ALL)))
    assert (reply.tokens, reply.usage.empty_retries) == ([stop], 2)
    assert reply.usage.verifications >= 3 and reply.usage.canvases == 1


class Closing(Told):
    """A turn that puts id 2 behind a canvas that holds a certain token."""

    def __init__(self, token: int) -> None:
        super().__init__({})
        self._token = token

    def cut(self, tokens: list[int]) -> list[int]:
        return [*tokens, 2] if self._token in tokens else tokens


def test_inserted_tokens_are_not_compared() -> None:
    right = [*range(4, 4 + CANVAS)]
    network = Agreeing(right)
    made = rows([[3]], max_tokens=CANVAS + 1, processor=Closing(right[0]), logprobs=0)
    (reply,) = replies(list(generate_verified(network, made, Sampling(max_verifications=4))))
    assert reply.tokens == [*right, 2]
    assert (reply.usage.verifications, reply.usage.redos) == (1, 0)


def test_a_correction_that_would_be_cut_is_denoised_again() -> None:
    """What the turn puts behind it has not been read yet, so it has no log-probability."""
    right = [*range(4, 4 + CANVAS)]
    network = Agreeing([*right[:-1], 0])
    made = rows([[3]], max_tokens=CANVAS + 1, processor=Closing(right[-1]), logprobs=0)
    (reply,) = replies(list(generate_verified(network, made, Sampling(max_verifications=4))))
    assert reply.tokens == [*right, 2] == [said.token for said in reply.logprobs or []]
    assert (reply.usage.verifications, reply.usage.redos) == (2, 1)


def test_a_check_never_inserts_a_banned_token(network: Network) -> None:
    free = greedy(network)[0]
    banned = {token: range(CANVAS) for token in set(free[:4])}
    (reply,) = replies(list(generate_verified(network, rows(PROMPTS[:1], processor=Told(banned)), ALL)))
    assert len(reply.tokens) == 16 and not set(reply.tokens) & set(banned)
    assert reply.usage.redos > 0


class After:
    """Set once it has been asked `count` times."""

    def __init__(self, count: int) -> None:
        self.left = count

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("count", [1, 4, 9, 20])
def test_cancelling_works_between_steps_of_every_round(
    network: Network, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    ran = watched(network, monkeypatch)
    done = list(generate_verified(network, rows(PROMPTS[:1], logprobs=1), ALL, After(count)))[-1]
    assert isinstance(done, Done) and done.reply.finish_reason == "cancelled"
    usage = done.reply.usage
    assert (usage.steps, usage.forwards) == (count, count + ran["read"] - 1)
    assert len(done.reply.logprobs or []) == len(done.reply.tokens) == CANVAS * usage.canvases


def test_every_round_of_a_row_has_its_own_draws():
    """The key of a canvas's draws, over many canvases and as many beginnings as checks can make."""
    numbers = set()
    for canvas in (0, 1, 7, 1023):
        row = SequenceState(0, [1], 0, stop_ids=(), canvas_length=4, room=10**7)
        row.canvases += [FinishedCanvas([2], 1)] * canvas
        for _ in range(1100):
            numbers.add(row.canvas_number)
            row.redo({})
    assert len(numbers) == 4 * 1100 and max(numbers) < 1 << 32
