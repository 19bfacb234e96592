"""Edits of logits against a plain count over lists: on canvases, in the causal pass and token by token, in every mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.config import PRESETS, AutoregressiveSampling, LogitEdits, Sampling
from blockpress.decoding import Denoised, Done, SequenceState
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.edits import canvas_changes, causal_changes
from blockpress.decoding.generate import generate
from blockpress.decoding.verified import generate_verified
from blockpress.diffusion.pins import UNPINNED
from blockpress.model import Network
from tests.conftest import make_random_network, num_examples

pytestmark = pytest.mark.end_to_end

VOCAB, CANVAS, STOP = 12, 6, 1
CONFIG = replace(PRESETS["tiny"](), vocab_size=VOCAB, canvas_length=CANVAS, sliding_window=8, image_id=None)
CPU = torch.device("cpu")
TOKENS = st.integers(0, VOCAB - 1)
EDITS = st.fixed_dictionaries(
    {
        "logit_bias": st.dictionaries(TOKENS, st.floats(-9, 9), max_size=4),
        "allowed_token_ids": st.none() | st.sets(TOKENS, min_size=6),
        "suppress_tokens": st.sets(TOKENS, max_size=3),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5, 2.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.4, 0.7]),
        "repeat_last_n": st.none() | st.integers(0, 16),
    }
)


def row(prompt: Sequence[int] = (5, 6, 6), seed: int = 0, **changes: Any) -> SequenceState:
    given = {"stop_ids": (STOP,), "canvas_length": CANVAS, "room": 60, "max_tokens": 2 * CANVAS + 1} | changes
    return SequenceState(0, list(prompt), seed, **given)


def edited(
    logits: Tensor, heat: float, e: LogitEdits, prompt: Any, answer: Any, here: Any, stops: Sequence[int] = (STOP,)
) -> Tensor:
    """The same by plain lists: scaled logits of each place, one by one."""
    out = logits.double().clone()
    for place in range(len(out)):
        reach = len([*prompt, *answer]) + place if e.repeat_last_n is None else e.repeat_last_n
        before = [*answer, *here[:place]][max(0, len(answer) + place - reach) :]
        seen = [*prompt, *answer, *here[:place]][max(0, len([*prompt, *answer]) + place - reach) :]
        for token in range(out.shape[1]):
            value = float(out[place, token]) + e.logit_bias.get(token, 0.0)
            if token not in stops:
                if token in seen:
                    value = value * e.repetition_penalty if value < 0 else value / e.repetition_penalty
                count = before.count(token)
                value -= e.frequency_penalty * count + e.presence_penalty * (count > 0)
            allowed = e.allowed_token_ids is None or token in e.allowed_token_ids
            out[place, token] = value / heat if allowed and token not in e.suppress_tokens else -math.inf
    return out


@settings(max_examples=num_examples(40))
@given(
    EDITS,
    st.lists(TOKENS, min_size=1, max_size=5),
    st.lists(TOKENS, max_size=5),
    st.lists(st.none() | TOKENS, min_size=CANVAS, max_size=CANVAS),
    st.floats(0.2, 2),
)
def test_edits_are_those_of_a_plain_count(edits: Any, prompt: Any, answer: Any, here: Any, heat: float) -> None:
    state = row(prompt)
    state.edits = LogitEdits(**edits)
    state._tokens = list(answer)
    logits = torch.randn(CANVAS, VOCAB, generator=torch.Generator().manual_seed(len(answer))) * 4
    wanted = edited(logits, heat, state.edits, prompt, answer, here).softmax(-1)
    decided = [UNPINNED if token is None else token for token in here]
    for changes in (
        canvas_changes(state, decided, CANVAS, VOCAB, CPU),
        causal_changes(state, decided, VOCAB, CPU),
    ):
        if changes is None:
            assert not state.edits.edits_logits
            continue
        got = changes.added(logits / heat, torch.full((CANVAS,), heat))
        torch.testing.assert_close(got.double().softmax(-1), wanted, rtol=1e-4, atol=1e-6)


class Fixed(Network):
    """A network whose canvases have these logits, whatever they hold."""

    table: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table.expand(len(hidden), -1, -1)


@settings(max_examples=num_examples(6))
@given(EDITS, st.integers(0, 99), st.dictionaries(st.integers(0, CANVAS - 1), TOKENS, max_size=2), st.integers(2, 5))
def test_a_step_counts_what_the_step_before_accepted(edits: Any, seed: int, pins: Any, limit: int) -> None:
    """Whole trajectories of two canvases: every argmax, entropy and acceptance by the plain count."""
    sampling = Sampling(steps=4, greedy=True, confidence=0.0, entropy_bound=1.5, **edits)
    network = Fixed(CONFIG)
    network.load_state_dict(make_random_network(CONFIG, seed=1).state_dict())
    network.table = torch.randn(CANVAS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    state = row(seed=seed, max_tokens=CANVAS + limit, stop_ids=())
    state.pins = pins
    decided: list[int | None] = [None] * CANVAS
    canvas, answer = 0, list[int]()
    for event in generate(network, [state], sampling):
        if not isinstance(event, Denoised):
            continue
        if event.canvas != canvas or event.step == 1:
            canvas, decided, answer = event.canvas, [None] * CANVAS, state.answer
        held = pins if canvas == 0 else {}
        room = CANVAS if canvas == 0 else limit
        here = [held.get(place, token) if place < room else None for place, token in enumerate(decided)]
        heat = 0.4 + 0.4 * (5 - event.step) / 4
        wanted = edited(network.table, heat, sampling, state.prompt, answer, here, stops=())
        for place in range(CANVAS):
            if place in held:
                assert event.argmax[place] == held[place] and event.entropy[place] == 0
                continue
            best = float(wanted[place].max())
            assert float(wanted[place, event.argmax[place]]) >= best - 1e-4
            chances = wanted[place].softmax(-1)
            entropy = -float((chances * chances.clamp(min=1e-300).log()).sum())
            assert float(event.entropy[place]) == pytest.approx(entropy, abs=1e-4)
        decided = [
            token if taken else None
            for token, taken in zip(event.argmax.tolist(), event.accepted.tolist(), strict=True)
        ]
    assert canvas == 1


MODES: list[Any] = [
    Sampling(steps=3, t_max=2.0),
    Sampling(steps=3, t_max=2.0, max_verifications=3),
    Sampling(steps=3, t_max=2.0, max_repairs=2, repair_below=0.3),
    AutoregressiveSampling(temperature=2.0),
    AutoregressiveSampling(),
]


@pytest.fixture(scope="module")
def network() -> Network:
    return make_random_network(CONFIG, seed=3).requires_grad_(False)


def tokens(network: Network, sampling: Any, state: SequenceState | None = None, **changes: Any) -> list[int]:
    looked_at = isinstance(sampling, Sampling) and (sampling.reads_drafts or changes.get("logprobs") is not None)
    write: Any = generate_verified if looked_at else generate
    if isinstance(sampling, AutoregressiveSampling):
        write, changes = generate_autoregressive, changes | {"canvas_length": 1}
    [reply] = [event.reply for event in write(network, [state or row(**changes)], sampling) if isinstance(event, Done)]
    return list(reply.tokens)


@pytest.mark.parametrize("sampling", MODES)
def test_banned_tokens_never_stand_in_an_answer_and_forced_ones_do(network: Network, sampling: Any) -> None:
    plain = tokens(network, sampling, stop_ids=())
    common = max(set(plain), key=plain.count)
    free = tokens(network, sampling.with_(suppress_tokens=[common]), stop_ids=())
    assert common not in free and len(free) == len(plain)
    low = tokens(network, sampling.with_(logit_bias={common: -100}), stop_ids=())
    assert common not in low
    few = tokens(network, sampling.with_(allowed_token_ids=[2, 7, 9]), stop_ids=())
    assert set(few) <= {2, 7, 9}
    assert set(tokens(network, sampling.with_(logit_bias={8: 100}), stop_ids=())) == {8}
    assert tokens(network, sampling.with_(logit_bias={STOP: 100})) == [STOP]


@pytest.mark.parametrize("sampling", MODES)
def test_penalties_make_an_answer_of_more_tokens(network: Network, sampling: Any) -> None:
    """The bias pulls towards one token; every penalty takes it from there, and a reward gives it back."""
    pulled = sampling.with_(logit_bias={8: 12.0})
    plain = tokens(network, pulled, stop_ids=())
    often = plain.count(8)
    assert often > len(plain) // 2
    lost = [{"frequency_penalty": 2.0}, {"repetition_penalty": 50.0}]
    for change in lost:
        assert tokens(network, pulled.with_(**change), stop_ids=()).count(8) < often
    assert tokens(network, pulled.with_(frequency_penalty=-2.0), stop_ids=()).count(8) >= often


def test_a_penalty_forgets_what_is_further_back_than_its_window(network: Network) -> None:
    """With a window of n, none of the last n places has the token that comes next, and one further back may."""
    for reach in (1, 3):
        few = dict.fromkeys(range(4, 9), 100.0)  # above 0, so that the penalty divides
        edits: dict[str, Any] = {"repetition_penalty": 1e3, "repeat_last_n": reach, "logit_bias": few}
        for sampling in (AutoregressiveSampling(**edits), Sampling(steps=3, max_verifications=40, **edits)):
            written = tokens(network, sampling, stop_ids=())
            assert all(token not in written[max(0, n - reach) : n] for n, token in enumerate(written))
            assert len(set(written)) < len(written)
    free = tokens(network, AutoregressiveSampling())
    assert tokens(network, AutoregressiveSampling(repetition_penalty=1e3, repeat_last_n=0)) == free


def test_a_canvas_that_is_verified_to_its_end_is_the_greedy_answer_of_the_same_edits(network: Network) -> None:
    """ADR 0014 for edited logits: the causal pass counts what token by token decoding counts."""
    for seed, edits in enumerate(
        (
            {"logit_bias": {5: 3.0, 9: -4.0}},
            {"frequency_penalty": 1.0, "presence_penalty": 0.5},
            {"repetition_penalty": 30.0, "suppress_tokens": [4]},
            {"allowed_token_ids": [1, 4, 5, 6, 7], "frequency_penalty": 2.0},
            {"repetition_penalty": 30.0, "frequency_penalty": 1.0, "repeat_last_n": 4},
        )
    ):
        greedy = tokens(network, AutoregressiveSampling(**edits), seed=seed)  # type: ignore[arg-type]
        checked = Sampling(steps=3, max_verifications=40, **edits)  # type: ignore[arg-type]
        assert tokens(network, checked, seed=seed) == greedy
        assert tokens(network, AutoregressiveSampling(), seed=seed) != greedy


def test_log_probabilities_are_the_models_own(network: Network) -> None:
    """Those of its logits before any edit, whatever writes the tokens."""
    for sampling in (Sampling(steps=3), AutoregressiveSampling(), Sampling(steps=3, max_verifications=9)):
        chosen: Any = sampling.with_(logit_bias={8: 6.0}, frequency_penalty=1.5, suppress_tokens=[4])
        looked_at = isinstance(sampling, Sampling)
        state = row(logprobs=2, canvas_length=CANVAS if looked_at else 1)
        write: Any = generate_verified if looked_at else generate_autoregressive
        [reply] = [event.reply for event in write(network, [state], chosen) if isinstance(event, Done)]
        hidden, _ = network.read(torch.tensor([[*state.prompt, *reply.tokens]]), network.empty_cache(1))
        own = network.logits(hidden)[0, len(state.prompt) - 1 :].log_softmax(-1)
        assert reply.logprobs is not None
        for place, scored in enumerate(reply.logprobs):
            assert scored.logprob == pytest.approx(float(own[place, scored.token]), abs=1e-4)
            assert scored.top[0][1] == pytest.approx(float(own[place].max()), abs=1e-4)


def test_a_repair_asks_what_the_edits_leave(network: Network) -> None:
    """A token that a bias forces is not unlikely: it is not repaired."""
    forced = Sampling(steps=3, max_repairs=3, repair_below=0.5, logit_bias={8: 100})
    [reply] = [event.reply for event in generate_verified(network, [row()], forced) if isinstance(event, Done)]
    assert set(reply.tokens) == {8} and reply.usage.repairs == 0


def test_the_likeliest_token_alone_is_what_greedy_takes(network: Network) -> None:
    for seed in range(2):
        alone = tokens(network, Sampling(steps=4, t_max=2.0, top_k=1), seed=seed)
        assert alone == tokens(network, Sampling(steps=4, t_max=2.0, greedy=True), seed=seed)
        assert alone == tokens(network, Sampling(steps=4, t_max=2.0, top_p=1e-6), seed=seed)
        assert alone == tokens(network, Sampling(steps=4, t_max=2.0, min_p=1.0), seed=seed)
