"""Pins: what must stand somewhere stands there in every step, and nobody else can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpress.config import PRESETS
from blockpress.decoding.denoisers import plain_denoiser
from blockpress.decoding.generate import commit_tokens
from blockpress.diffusion import DenoiserOutput, KeyedDraws, Pins, TokenMask

from ..conftest import make_random_network
from .test_denoise import LENGTH, POLICY, VOCAB, Policy, Script, pinned_signal, plain, run

PINNED = st.lists(
    st.dictionaries(st.integers(0, LENGTH - 1), st.integers(0, VOCAB - 1), max_size=LENGTH), min_size=1, max_size=4
)


@given(st.integers(0, 10**6), PINNED, POLICY)
def test_a_batch_with_pins_equals_the_plain_loop_row_by_row(
    seed: int, pinned: list[dict[int, int]], policy: Policy
) -> None:
    draws = KeyedDraws(range(len(pinned)), [0] * len(pinned), length=LENGTH, vocab=VOCAB)
    script, pins = Script(seed, policy.schedule), Pins.of(pinned, LENGTH, pinned_signal)
    assert (pins is None) == (not any(pinned))
    steps, rows = run(script, draws, len(pinned), policy, pins)
    assert rows == [plain(script, draws, row, policy, own) for row, own in enumerate(pinned)]
    for own, seen in ((own, seen) for own, row in zip(pinned, rows, strict=True) for seen in row):
        assert {place: seen.canvas[place] for place in own} == own == {place: seen.argmax[place] for place in own}
        assert all(seen.accepted[place] for place in own)
    for step in steps:
        for place, row in enumerate(step.rows.tolist()):
            assert all(step.entropy[place, pin] == 0 for pin in pinned[row])


@pytest.mark.slow
@given(st.integers(0, 10**6), PINNED, POLICY)
def test_a_row_without_pins_is_unchanged(seed: int, pinned: list[dict[int, int]], policy: Policy) -> None:
    pinned = [{}, *pinned]
    draws = KeyedDraws(range(len(pinned)), [0] * len(pinned), length=LENGTH, vocab=VOCAB)
    script = Script(seed, policy.schedule)
    _, rows = run(script, draws, len(pinned), policy, Pins.of(pinned, LENGTH, pinned_signal))
    assert rows[0] == plain(script, draws, 0, policy)


def test_a_canvas_that_is_all_pins_settles_as_soon_as_it_may() -> None:
    policy = Policy(steps=9, bound=0.1, stability=2, confidence=0.005)
    pins = Pins.of([dict.fromkeys(range(LENGTH), 3)], LENGTH, pinned_signal)
    draws = KeyedDraws([0], [0], length=LENGTH, vocab=VOCAB)
    (row,) = run(Script(0, policy.schedule), draws, 1, policy, pins)[1]
    assert [seen.argmax for seen in row] == [[3] * LENGTH] * 3 and row[-1].settled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_pin_reads_as_certainty_of_one_token(dtype: torch.dtype) -> None:
    """The same reading to the last bit as from logits in which every other id is banned at the pinned places."""
    config = replace(PRESETS["tiny"](), canvas_length=6)
    network = make_random_network(config, seed=2).to(dtype)
    pinned: list[Mapping[int, int]] = [{0: 5, 4: 17}, {}, {5: 0}]
    others: list[dict[int, Any]] = [
        {token: {p for p in own if own[p] != token} for token in range(config.vocab_size)} for own in pinned
    ]
    length, every = config.canvas_length, torch.arange(3)
    draws = KeyedDraws([1, 2, 3], [0, 0, 0], length=length, vocab=config.vocab_size)
    reading = plain_denoiser(network, commit_tokens(network, [[3, 4], [9], [8, 8, 8]], network.empty_cache(3)))

    def once(edits: TokenMask | None) -> DenoiserOutput:
        return reading(every, 1, draws.noise(every, 0), None, torch.tensor(0.7), draws, edits)

    pins = Pins.of(pinned, length, network.embed)
    assert pins is not None
    ours, theirs = pins(every, once(None)), once(TokenMask.of(others, length))
    for name, value in vars(theirs).items():
        assert torch.equal(getattr(ours, name), value), name
