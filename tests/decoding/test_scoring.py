"""What the causal pass says of tokens, against one whole pass over each row; and log-probabilities of every mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from blockpress.config import PRESETS, AutoregressiveSampling, Sampling
from blockpress.decoding import Committed, Done, Event, Reply, SequenceState, TokenLogprob
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.scoring import causal_forward, gather_last_hidden, score_tokens
from blockpress.decoding.verified import generate_verified, prefill_verified
from blockpress.model import Network
from blockpress.ops import vocabulary
from blockpress.ops.vocabulary import blocks
from tests.conftest import make_random_network

from .test_autoregressive import Told

VOCAB, CANVAS = 16, 6
CONFIG = replace(PRESETS["tiny"](), vocab_size=VOCAB, canvas_length=CANVAS, sliding_window=4, image_id=None)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 4], [6, 6]]
LOOSE = Sampling(steps=4, entropy_bound=1.0, confidence=0.4)
WARM = AutoregressiveSampling(temperature=1.3, top_k=12, top_p=0.97)
MODES = {"diffusion": LOOSE, "verified": LOOSE.with_(max_verifications=2), "autoregressive": WARM}
each_mode = pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.slow] * (mode == "verified")) for mode in MODES]
)


@pytest.fixture(scope="module")
def network() -> Network:
    return make_random_network(CONFIG, seed=3).requires_grad_(False)


def rows(prompts: Sequence[list[int]], mode: str = "diffusion", **changes: Any) -> list[SequenceState]:
    length = 1 if mode == "autoregressive" else CANVAS
    given = {"stop_ids": (), "canvas_length": length, "room": 60, "max_tokens": 10, "logprobs": 2} | changes
    return [SequenceState(i, prompt, i, **given) for i, prompt in enumerate(prompts)]


def answer(network: Network, made: Sequence[SequenceState], mode: str) -> list[Event]:
    sampling = MODES[mode]
    if isinstance(sampling, Sampling):
        return list(generate_verified(network, made, sampling))
    return list(generate_autoregressive(network, made, sampling))


def replies(events: Sequence[Event]) -> list[Reply]:
    done = {event.row: event.reply for event in events if isinstance(event, Done)}
    return [done[index] for index in sorted(done)]


def truth(network: Network, prompt: Sequence[int], tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """One causal pass over the whole row, and all of its logits at once."""
    with torch.inference_mode():
        hidden, _ = network.read(torch.tensor([[*prompt, *tokens]]), network.empty_cache(1))
        log_p = network.logits(hidden)[0].log_softmax(-1)[len(prompt) - 1 :]
    found = []
    for place, token in enumerate(tokens):
        order = sorted(range(VOCAB), key=lambda other: -float(log_p[place, other]))[:top]
        tops = tuple((other, float(log_p[place, other])) for other in order)
        found.append(TokenLogprob(token, float(log_p[place, token]), tops))
    return found


def check_equal(ours: Sequence[TokenLogprob] | None, theirs: Sequence[TokenLogprob]) -> None:
    assert ours is not None and len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.token == other.token and one.logprob == pytest.approx(other.logprob, abs=2e-4)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=2e-4)
        # Of two that are all but equally likely, either may be the first.
        clear = all(a[1] - b[1] > 1e-3 for a, b in zip(other.top, other.top[1:], strict=False))
        assert not clear or [token for token, _ in one.top] == [token for token, _ in other.top]


# ------------------------------------------------------------------------------------------------- of given tokens


@pytest.mark.parametrize("block", [1, 3, 32])
@torch.inference_mode()
def test_a_ragged_batch_is_scored_as_each_row_alone(
    network: Network, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(blocks, "BUFFER", block * VOCAB * 4)
    made = rows(PROMPTS)
    for row, top in zip(made, [2, None, 0, 5], strict=True):
        row.logprobs = top
    asked = [[1, 2, 3, 4], [7, 7], [15], []]
    states, cache = causal_forward(network, asked, *prefill_verified(network, made))
    for row, tokens, judged in zip(made, asked, score_tokens(network, states, made, asked), strict=True):
        whole = truth(network, row.prompt, tokens, VOCAB)
        assert judged.greedy_ids == [said.top[0][0] for said in whole]
        if row.logprobs is None:
            assert judged.logprobs == judged.greedy_logprobs == []
            continue
        check_equal(judged.logprobs, truth(network, row.prompt, tokens, row.logprobs))
        assert [said.token for said in judged.greedy_logprobs] == judged.greedy_ids
        assert [said.logprob for said in judged.greedy_logprobs] == pytest.approx(
            [x.top[0][1] for x in whole], abs=2e-4
        )
    assert cache.lengths.tolist() == [7, 3, 8, 2]


@torch.inference_mode()
def test_a_scored_draft_can_be_dropped_from_the_cache(network: Network) -> None:
    made, asked = rows(PROMPTS), [[1, 2, 3, 4], [7, 7], [15], []]
    last, cache = prefill_verified(network, made)
    states, seen = causal_forward(network, asked, last, cache)
    kept = torch.tensor([2, 0, 1, 0])
    part = [own[:count] for own, count in zip(asked, kept.tolist(), strict=True)]
    wanted, other = causal_forward(network, part, last, cache)
    torch.testing.assert_close(gather_last_hidden(states, kept), gather_last_hidden(wanted, kept), rtol=1e-4, atol=1e-4)
    mine, canvas = seen.until(cache.lengths + kept), torch.full((4, CANVAS), 5)
    assert torch.equal(mine.lengths, other.lengths) and mine.width == other.width
    torch.testing.assert_close(
        network.denoise(canvas, mine, None), network.denoise(canvas, other, None), rtol=1e-4, atol=1e-4
    )


@torch.inference_mode()
def test_a_banned_id_is_never_greedy_and_keeps_its_logprob(network: Network) -> None:
    free = rows(PROMPTS[:1])
    states, _ = causal_forward(network, [[1, 2, 3]], *prefill_verified(network, free))
    (plain,) = score_tokens(network, states, free, [[1, 2, 3]])
    told = rows(PROMPTS[:1], processor=Told({plain.greedy_ids[1]: {1}}))
    (judged,) = score_tokens(network, states, told, [[1, 2, 3]])
    assert judged.logprobs == plain.logprobs and judged.greedy_ids[::2] == plain.greedy_ids[::2]
    assert judged.greedy_ids[1] == plain.logprobs[1].top[1][0] != plain.greedy_ids[1]


@torch.inference_mode()
def test_logprobs_of_the_vocabulary_sum_to_one(network: Network) -> None:
    made = rows(PROMPTS[:2], logprobs=VOCAB)
    states, _ = causal_forward(network, [[1, 2], [3]], *prefill_verified(network, made))
    for judged in score_tokens(network, states, made, [[1, 2], [3]]):
        for said in judged.logprobs:
            assert sum(math.exp(value) for _, value in said.top) == pytest.approx(1, abs=1e-5)
            assert list(said.top) == sorted(said.top, key=lambda pair: -pair[1])
            assert dict(said.top)[said.token] == said.logprob


# ---------------------------------------------------------------------------------------------------- of every mode


@each_mode
def test_a_reply_has_the_logprobs_of_its_tokens(network: Network, mode: str) -> None:
    """Also where `max_tokens` cuts a canvas, and where a stop id ends one."""
    free = replies(answer(network, rows(PROMPTS, mode), mode))
    for stop_ids in ((), (free[0].tokens[3], free[1].tokens[7])):
        events = answer(network, rows(PROMPTS, mode, stop_ids=stop_ids), mode)
        for prompt, reply in zip(PROMPTS, replies(events), strict=True):
            check_equal(reply.logprobs, truth(network, prompt, reply.tokens, 2))
        for index, reply in enumerate(replies(events)):
            parts = [event.logprobs for event in events if isinstance(event, Committed) and event.row == index]
            assert [said for part in parts for said in part or []] == reply.logprobs
    assert len({len(reply.tokens) for reply in replies(events)}) > 1


@each_mode
def test_a_row_of_a_batch_is_the_row_alone(network: Network, mode: str) -> None:
    together = replies(answer(network, rows(PROMPTS, mode), mode))
    for index, reply in enumerate(together):
        (alone,) = replies(answer(network, [rows(PROMPTS, mode)[index]], mode))
        assert (alone.tokens, alone.usage) == (reply.tokens, reply.usage)
        check_equal(alone.logprobs, reply.logprobs or [])


@each_mode
def test_asking_for_logprobs_changes_no_token(network: Network, mode: str) -> None:
    told = replies(answer(network, rows(PROMPTS, mode), mode))
    silent = replies(answer(network, rows(PROMPTS, mode, logprobs=None), mode))
    for one, other in zip(told, silent, strict=True):
        assert other.logprobs is None and one.tokens == other.tokens
        # The last canvas is read for them; token by token every hidden state is there anyway.
        assert one.usage.forwards - other.usage.forwards <= (mode != "autoregressive")
        assert one.usage.steps == other.usage.steps


@each_mode
def test_rows_with_and_without_logprobs_share_a_batch(network: Network, mode: str) -> None:
    made = rows(PROMPTS, mode)
    made[1].logprobs, made[2].logprobs = None, 0
    found = replies(answer(network, made, mode))
    assert [reply.tokens for reply in found] == [r.tokens for r in replies(answer(network, rows(PROMPTS, mode), mode))]
    assert found[1].logprobs is None and all(said.top == () for said in found[2].logprobs or [])
    assert len(found[2].logprobs or []) == len(found[2].tokens)


@each_mode
def test_inserted_tokens_have_logprobs(network: Network, mode: str) -> None:
    """A turn cuts the third token, or a canvas behind its beginning, and writes two of its own."""
    turn = Told({}, cut_at=2 if mode == "autoregressive" else 0)
    (reply,) = replies(answer(network, rows(PROMPTS[:1], mode, processor=turn), mode))
    place = 2 if mode == "autoregressive" else 0
    assert reply.tokens[place : place + 2] == [2, 3] and len(reply.tokens) == 10
    check_equal(reply.logprobs, truth(network, PROMPTS[0], reply.tokens, 2))


def test_the_extra_forward_for_logprobs_is_counted(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, what a turn puts behind its own first token is read once more, before it is committed."""
    reads, read = [], network.read
    monkeypatch.setattr(network, "read", lambda *given: reads.append(given) or read(*given))
    made = rows(PROMPTS[:1], "autoregressive", processor=Told({}, cut_at=2))
    (reply,) = replies(answer(network, made, "autoregressive"))
    assert reply.usage.forwards == len(reads) == 10


class Stopping(Told):
    """A turn that finds a stop text behind so many tokens, in the canvas where it is whole."""

    def __init__(self, begins: int, ends: int) -> None:
        super().__init__({})
        self._begins, self._ends = begins, ends

    @property
    def tokens_used(self) -> int:
        return self._begins if len(self.taken) >= self._ends else len(self.taken)

    def take(self, tokens: list[int]) -> Any:
        said = super().take(tokens)
        self.stopped = "stop" if len(self.taken) >= self._ends else None
        return said


@each_mode
@pytest.mark.parametrize(("begins", "ends"), [(2, 4), (5, 8), (0, 9)])
def test_a_stop_text_cuts_logprobs_with_the_tokens(network: Network, mode: str, begins: int, ends: int) -> None:
    (reply,) = replies(answer(network, rows(PROMPTS[:1], mode, processor=Stopping(begins, ends)), mode))
    assert (len(reply.tokens), reply.finish_reason) == (begins, "stop")
    check_equal(reply.logprobs, truth(network, PROMPTS[0], reply.tokens, 2))


@pytest.mark.parametrize("gap", [0.0, 9.0, 15.0, 20.0])
@pytest.mark.parametrize("native", [False, True])
def test_logprobs_count_many_small_probabilities(gap: float, native: bool) -> None:
    logits = torch.zeros(1, 262_144)
    logits[:, 7] = gap
    one = torch.ones(1, 1)
    told = vocabulary.score_targets(
        one, logits.T, cap=None, tokens=torch.tensor([7]), top=1, wide=True, native=native
    ).logprobs
    assert told is not None
    wanted = float(logits.double().log_softmax(-1)[0, 7])
    assert abs(float(told.target) - wanted) <= 2 * 2.0**-24 * 32, "two roundings of numbers below 32"
