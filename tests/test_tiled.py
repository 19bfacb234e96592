"""The poem with its two denoisers: the same events, whatever the rows, their edits and their settings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from blockpress.config import ModelConfig, Sampling
from blockpress.diffusion import Edits, KeyedDraws
from blockpress.generate import generate, plain_denoiser, prefill
from blockpress.reply import Done, Row
from blockpress.tiled import tiled_denoiser
from tests.conftest import RandomNetwork


def rows_of(config: ModelConfig, count: int, canvases: int = 3, stop_ids: tuple[int, ...] = ()) -> list[Row]:
    length = config.canvas_length
    return [
        Row(i, [5, 6, 7][: 1 + i % 3], i, stop_ids=stop_ids, canvas_length=length, room=length * canvases)
        for i in range(count)
    ]


@pytest.mark.parametrize("signal", ["exact", "sparse"])
@pytest.mark.parametrize("vocab", [11, 4096 + 37])
def test_it_writes_what_the_plain_denoiser_writes(
    tiny: ModelConfig, random_network: RandomNetwork, vocab: int, signal: str
) -> None:
    """A spread of logits that lets rows settle at different steps, so that the batch shrinks within a canvas."""
    network = random_network(replace(tiny, vocab_size=vocab), seed=3)
    with torch.no_grad():
        network.embed_tokens.weight.mul_(4)
    sampling = Sampling(steps=6, stability=1, confidence=3.0, entropy_bound=2.0)
    if signal == "sparse":  # another signal may write otherwise: it must only write
        fast = partial(tiled_denoiser, signal_kind="sparse")
        events = list(generate(network, rows_of(network.config, 3), sampling, denoiser=fast))
        assert len([event for event in events if isinstance(event, Done)]) == 3
        return
    plain, tiled = (
        list(generate(network, rows_of(network.config, 3), sampling, denoiser=denoiser))
        for denoiser in (None, tiled_denoiser)
    )
    replies = [[event.reply.tokens for event in events if isinstance(event, Done)] for events in (plain, tiled)]
    assert replies[0] == replies[1] and len(plain) == len(tiled)
    assert len({token for reply in replies[0] for token in reply}) > 5
    steps = [event.reply.usage.steps for event in plain if isinstance(event, Done)]
    assert steps == [event.reply.usage.steps for event in tiled if isinstance(event, Done)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_reading_with_edits_and_a_signal(
    tiny: ModelConfig, random_network: RandomNetwork, dtype: torch.dtype
) -> None:
    network = random_network(replace(tiny, vocab_size=300), seed=1).to(dtype)
    config, length = network.config, network.config.canvas_length
    draws = KeyedDraws([1, 2, 3], [0, 0, 4], length=length, vocab=300)
    edits = Edits.of([{}, {17: range(length), 3: {0, 1}}, {}], length)
    rows, temperature = torch.tensor([0, 1, 2]), torch.tensor(0.7)
    canvas = draws.noise(rows, 0)
    with torch.inference_mode():
        cache = prefill(network, rows_of(config, 3))
        plain, tiled = plain_denoiser(network, cache), tiled_denoiser(network, cache)
        signal = plain(rows, 1, canvas, None, temperature, draws, edits).signal
        for left in (rows, rows[1:]):
            given = (left, 2, canvas[left], signal[left], temperature, draws, edits)
            want, got = plain(*given), tiled(*given)
            assert torch.equal(want.argmax, got.argmax) and torch.equal(want.sample, got.sample)
            torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=2e-6)
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(got.signal, want.signal, rtol=near, atol=near)
            assert not (got.argmax[list(left).index(1)] == 17).any()


class Recorded:
    """Draws that know their tokens and not the numbers behind them."""

    def noise(self, rows: Tensor, step: int) -> Tensor:
        return torch.zeros(len(rows), 4, dtype=torch.long)

    def sample(self, rows: Tensor, step: int, scaled: Tensor) -> Tensor:
        return torch.zeros(len(rows), 4, dtype=torch.long)


def test_recorded_draws_are_for_the_plain_denoiser(tiny: ModelConfig, random_network: RandomNetwork) -> None:
    network, draws = random_network(tiny), Recorded()
    cache, row = network.empty_cache(1), torch.tensor([0])
    for denoiser in (plain_denoiser, tiled_denoiser):
        given = (row, 1, draws.noise(row, 0), None, torch.tensor(1.0), draws, None)
        if denoiser is plain_denoiser:
            assert denoiser(network, cache)(*given).sample.shape == (1, 4)
            continue
        with pytest.raises(AssertionError):
            denoiser(network, cache)(*given)
