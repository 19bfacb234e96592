"""Token by token: the tokens, what ends an answer, what is counted, and what a row may ask for on the way."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpress.chat import Piece, TextDelta
from blockpress.config import PRESETS, AutoregressiveSampling
from blockpress.decoding import Committed, Done, Event, Reply, SequenceState, Text
from blockpress.decoding.autoregressive import GREEDY, generate_autoregressive
from blockpress.model import Network
from blockpress.text import StreamDecoder, Tokenizer
from blockpress.text.builder import write_digits_tokenizer
from tests.conftest import make_random_network

VOCAB = 16
DIFFUSION = replace(PRESETS["tiny"](), vocab_size=VOCAB, sliding_window=4, image_id=None)
DENSE: dict[str, Any] = {"num_experts": 0, "top_k_experts": 0, "expert_size": 0}
CONFIGS = {
    "diffusion_gemma": DIFFUSION,
    "gemma4": replace(DIFFUSION, family="gemma4", canvas_length=1),
    "dense gemma4": replace(DIFFUSION, family="gemma4", canvas_length=1, keys_are_values=False, **DENSE),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 4], [6, 6]]
WARM = AutoregressiveSampling(temperature=1.3, top_k=12, top_p=0.97)


@pytest.fixture(scope="module", params=CONFIGS)
def network(request: pytest.FixtureRequest) -> Network:
    return make_random_network(CONFIGS[request.param], seed=3).requires_grad_(False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("digits")
    write_digits_tokenizer(folder)
    return Tokenizer.from_directory(folder)


def rows(prompts: Sequence[list[int]], seeds: Sequence[int] | None = None, **changes: Any) -> list[SequenceState]:
    given = {"stop_ids": (), "canvas_length": 1, "room": 40, "max_tokens": 10} | changes
    return [SequenceState(i, prompt, i if seeds is None else seeds[i], **given) for i, prompt in enumerate(prompts)]


def replies(events: Sequence[Event] | Any) -> list[Reply]:
    done = {event.row: event.reply for event in events if isinstance(event, Done)}
    return [done[index] for index in sorted(done)]


def answers(network: Network, *args: Any, sampling: AutoregressiveSampling = GREEDY, **kw: Any) -> Any:
    return [reply.tokens for reply in replies(generate_autoregressive(network, rows(*args, **kw), sampling))]


@torch.no_grad()
def greedy(network: Network, prompt: list[int], stop_ids: Sequence[int], count: int) -> list[int]:
    """The likeliest next token, every time from the whole row, without a cache that lasts."""
    row = list(prompt)
    while len(row) - len(prompt) < count and not (len(row) > len(prompt) and row[-1] in stop_ids):
        hidden, _ = network.read(torch.tensor([row]), network.empty_cache(1))
        row.append(int(network.logits(hidden)[0, -1].argmax()))
    return row[len(prompt) :]


# ----------------------------------------------------------------------------------------------------------- tokens


def test_the_default_is_greedy_and_batched(network: Network) -> None:
    free = [greedy(network, prompt, (), 10) for prompt in PROMPTS]
    assert answers(network, PROMPTS) == free
    # Two rows end before their limit, so that the batch shrinks on the way.
    stop_ids = (free[0][2], free[2][8])
    wanted = [greedy(network, prompt, stop_ids, 10) for prompt in PROMPTS]
    found = replies(generate_autoregressive(network, rows(PROMPTS, stop_ids=stop_ids)))
    assert [reply.tokens for reply in found] == wanted
    assert [reply.finish_reason for reply in found] == ["stop" if t[-1] in stop_ids else "length" for t in wanted]
    assert len({len(tokens) for tokens in wanted}) > 1


@pytest.mark.slow
@given(
    seeds=st.lists(st.integers(-(2**70), 2**70), min_size=4, max_size=4),
    chosen=st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True),
)
@settings(max_examples=6)
def test_a_row_draws_the_same_alone_and_in_any_batch(seeds: list[int], chosen: list[int]) -> None:
    network = make_random_network(CONFIGS["gemma4"], seed=3).requires_grad_(False)
    alone = [answers(network, [PROMPTS[i]], [seeds[i]], sampling=WARM, max_tokens=6)[0] for i in chosen]
    together = answers(network, [PROMPTS[i] for i in chosen], [seeds[i] for i in chosen], sampling=WARM, max_tokens=6)
    assert together == alone


def test_draws_follow_the_seed_and_differ_by_position(network: Network) -> None:
    drawn = answers(network, [[5, 6, 7]] * 30, sampling=AutoregressiveSampling(temperature=50.0))
    assert len({tuple(tokens) for tokens in drawn}) == 30
    # At that temperature the tokens are all but uniform: of 300, each comes about 19 times.
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCAB)
    assert int(counts.min()) >= 5 and int(counts.max()) <= 40
    assert drawn == answers(network, [[5, 6, 7]] * 30, sampling=AutoregressiveSampling(temperature=50.0))


def test_top_k_of_one_is_greedy(network: Network) -> None:
    likeliest = answers(network, PROMPTS)
    assert answers(network, PROMPTS, sampling=AutoregressiveSampling(temperature=9.0, top_k=1)) == likeliest
    assert answers(network, PROMPTS, sampling=AutoregressiveSampling(temperature=9.0, top_p=1e-6)) == likeliest
    assert answers(network, PROMPTS, sampling=AutoregressiveSampling(temperature=9.0)) != likeliest


# ------------------------------------------------------------------------------------------------- limits and counts


def test_the_end_of_the_context_ends_an_answer(network: Network) -> None:
    found = replies(generate_autoregressive(network, rows(PROMPTS, room=6, max_tokens=None)))
    assert [(len(reply.tokens), reply.finish_reason) for reply in found] == [(6, "length")] * 4


def test_every_token_counts_as_a_forward(network: Network) -> None:
    free = answers(network, PROMPTS)
    for index, reply in enumerate(replies(generate_autoregressive(network, rows(PROMPTS, stop_ids=(free[0][2],))))):
        usage = reply.usage
        assert usage.completion_tokens == usage.forwards == len(reply.tokens)
        assert (usage.canvases, usage.steps, usage.tokens_per_forward) == (0, 0, 1.0)
        assert usage.prompt_tokens == len(PROMPTS[index])


def test_prompts_are_prefilled_then_each_row_reads_a_token(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, read = [], network.read

    def watched(tokens: Any, *args: Any) -> Any:
        shapes.append(tuple(tokens.shape))
        return read(tokens, *args)

    monkeypatch.setattr(network, "read", watched)
    answers(network, PROMPTS, max_tokens=4)
    # The last token is never read.
    assert shapes == [(4, 7), (4, 1), (4, 1), (4, 1)]


def test_a_token_is_emitted_as_soon_as_it_is_sampled(network: Network) -> None:
    events = list(generate_autoregressive(network, rows(PROMPTS[:2], max_tokens=3)))
    kinds = [(type(event).__name__, event.row) for event in events]
    assert kinds == [("Committed", 0), ("Committed", 1)] * 2 + [(k, r) for r in (0, 1) for k in ("Committed", "Done")]
    committed = [event for event in events if isinstance(event, Committed) and event.row == 1]
    assert [token for event in committed for token in event.tokens] == replies(events)[1].tokens
    assert [(event.canvas, event.steps) for event in committed] == [(0, 0), (1, 0), (2, 0)]


def test_cancelling_keeps_the_tokens_so_far(network: Network) -> None:
    cancel, events = threading.Event(), []
    for event in generate_autoregressive(network, rows(PROMPTS), cancel=cancel):
        events.append(event)
        if isinstance(event, Committed) and event.row == 3 and event.canvas == 1:
            cancel.set()
    found = replies(events)
    assert [reply.finish_reason for reply in found] == ["cancelled"] * 4
    assert [reply.tokens for reply in found] == [tokens[:2] for tokens in answers(network, PROMPTS)]
    assert [reply.usage.forwards for reply in found] == [2] * 4
    cancel.set()
    assert [r.usage.forwards for r in replies(generate_autoregressive(network, rows(PROMPTS), cancel=cancel))] == [
        0
    ] * 4


# ------------------------------------------------------------------------------------------------------- text, turns


def test_text_is_streamed_and_a_stop_text_ends_it(network: Network, digits: Tokenizer) -> None:
    free = answers(network, PROMPTS[:1], max_tokens=20)[0]
    whole = digits.decode(free)
    stop = whole[5:7]

    def one(stops: tuple[str, ...]) -> list[Event]:
        decoder = StreamDecoder(digits, stop=stops)
        return list(generate_autoregressive(network, rows(PROMPTS[:1], max_tokens=20, decoder=decoder)))

    events = one(())
    assert "".join(event.text for event in events if isinstance(event, Text)) == whole == replies(events)[0].text
    assert len([event for event in events if isinstance(event, Text)]) > 1
    reply = replies(one((stop,)))[0]
    assert (reply.text, reply.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert reply.tokens == free[: len(reply.tokens)]
    # Tokens that only finished the stop text were computed and are not returned.
    assert reply.usage.completion_tokens == len(reply.tokens) < reply.usage.forwards


class Told:
    """A turn that denies ids, begins an early end again, and cuts the third token in favour of two of its own."""

    def __init__(self, banned: Mapping[int, Any], again: int = 0, cut_at: int | None = None) -> None:
        self.banned_ids, self.counts, self.stopped = banned, (0, False), None
        self.taken: list[int] = []
        self._again, self._cut_at = again, cut_at

    @property
    def has_text(self) -> bool:
        return True

    @property
    def tokens_used(self) -> int:
        return len(self.taken)

    def cut(self, tokens: list[int]) -> list[int]:
        return [2, 3] if len(self.taken) == self._cut_at else tokens

    def should_retry(self, tokens: list[int]) -> bool:
        self._again -= 1
        return self._again >= 0

    def take(self, tokens: list[int]) -> list[Piece]:
        self.taken += tokens
        return [TextDelta("answer", f"{token} ") for token in tokens]

    def finish(self) -> list[Piece]:
        return []


def test_banned_tokens_are_never_written(network: Network) -> None:
    free = answers(network, [PROMPTS[0]])[0]
    banned = {token: range(9) for token in set(free)}
    found = replies(generate_autoregressive(network, rows([PROMPTS[0]], processor=Told(banned))))[0].tokens
    assert len(found) == 10 and not set(found) & set(free)


def test_an_early_stop_is_sampled_again_from_the_same_context(network: Network) -> None:
    """Greedily it comes again, without another forward; the next one is taken."""
    first = answers(network, [PROMPTS[0]])[0][0]
    made = rows([PROMPTS[0]], stop_ids=(first,), processor=Told({}, again=2))
    reply = replies(generate_autoregressive(network, made))[0]
    assert (reply.tokens, reply.finish_reason) == ([first], "stop")
    assert (reply.usage.empty_retries, reply.usage.forwards) == (2, 1)


def test_a_row_that_samples_again_does_not_hold_up_others(network: Network) -> None:
    free = answers(network, PROMPTS)
    stop = free[1][0]
    turns = [None, Told({}, again=3), None, None]
    made = [rows([p], processor=t, stop_ids=(stop,) if t else ())[0] for p, t in zip(PROMPTS, turns, strict=True)]
    for index, row in enumerate(made):
        row.index = index
    found = replies(generate_autoregressive(network, made))
    assert [reply.tokens for reply in found] == [free[0], [stop], free[2], free[3]]
    assert found[1].usage.forwards == 1


def test_replaced_tokens_are_read_in_one_forward(network: Network) -> None:
    reply = replies(generate_autoregressive(network, rows([PROMPTS[0]], processor=Told({}, cut_at=2))))[0]
    free = greedy(network, PROMPTS[0], (), 2)
    assert reply.tokens == [*free, 2, 3, *greedy(network, [*PROMPTS[0], *free, 2, 3], (), 6)]
    assert (reply.usage.completion_tokens, reply.usage.forwards) == (10, 9)


def test_the_shipped_model_decodes_autoregressively() -> None:
    """The weights of a diffusion model, as its own causal pass continues them."""
    import blockpress
    from blockpress.checkpoints import load_network

    shipped = load_network(Path(blockpress.__file__).parent / "models" / "sudoku-nano", dtype="float32")
    prompt = [3 + place % 9 for place in range(90)]
    assert answers(shipped, [prompt, prompt[:40]]) == [greedy(shipped, p, (), 10) for p in (prompt, prompt[:40])]
