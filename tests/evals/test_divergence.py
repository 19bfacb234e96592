"""What is said about a changed model: nothing about itself, more the more it is changed, and the figures' definitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.errors import RequestError
from blockpress.evals.divergence import POSITIONS, Recording, compare_recordings, record
from blockpress.lm import LM
from blockpress.model import Network
from tests.conftest import RandomNetwork

PROMPTS = [[3, 4, 5], [7, 8, 9, 10], [11]]


def model(network: Network) -> LM:
    generation = GenerationConfig(sampling=Sampling(steps=6))
    return LM(path=Path("nowhere"), network=network, generation=generation, tokenizer=None)


def shaken(network: Network, config: ModelConfig, by: float) -> Network:
    other = Network(config).eval()
    other.load_state_dict(network.state_dict())
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=noise) * parameter.abs().mean())
    return other


def test_a_model_has_no_divergence_from_itself(tiny: ModelConfig, random_network: RandomNetwork) -> None:
    lm = model(random_network(tiny))
    found = compare_recordings(record(lm, PROMPTS, seed=5), record(lm, PROMPTS, seed=5, batch=2))
    for step in (found.first, found.second):
        assert step.kl == step.kl_largest == 0 and step.agreement == 1
        assert step.entropy_original == step.entropy_changed > 0
    assert found.tokens_same == 1 and found.steps_original == found.steps_changed
    assert (found.prompts, found.positions, found.seed) == (3, min(POSITIONS, tiny.canvas_length), 5)


def test_divergence_grows_with_noise(tiny: ModelConfig, random_network: RandomNetwork) -> None:
    network = random_network(tiny)
    truth = record(model(network), PROMPTS)
    near, far = (compare_recordings(truth, record(model(shaken(network, tiny, by)), PROMPTS)) for by in (0.01, 0.2))
    for step in ("first", "second"):
        one, other = getattr(near, step), getattr(far, step)
        assert 0 < one.kl < one.kl_largest and one.kl < 0.1 * other.kl
        assert 1 >= one.agreement > other.agreement


def test_the_second_step_uses_each_model_s_own_probabilities(tiny: ModelConfig, random_network: RandomNetwork) -> None:
    """A model that differs in self-conditioning alone is the same at step 1 and another at step 2."""
    network = random_network(tiny)
    other = shaken(network, tiny, 0)
    with torch.no_grad():
        other.self_conditioning.down_proj.weight.mul_(1.5)
    found = compare_recordings(record(model(network), PROMPTS), record(model(other), PROMPTS))
    assert found.first.kl == 0 and found.second.kl > 1e-6


def recording(beliefs: torch.Tensor, steps: tuple[int, ...], answers: tuple[tuple[int, ...], ...]) -> Recording:
    beliefs = beliefs.log()
    return Recording(
        seed=0,
        probabilities=beliefs,
        argmax=beliefs.argmax(-1),
        entropy=-(beliefs.exp() * beliefs).sum(-1),
        answers=answers,
        steps=steps,
    )


def test_figures_equal_those_computed_by_hand() -> None:
    p = torch.tensor([0.5, 0.5]).expand(1, 2, 1, 2)
    q = torch.tensor([0.25, 0.75]).expand(1, 2, 1, 2)
    found = compare_recordings(recording(p, (4,), ((1, 2, 3, 9),)), recording(q, (6,), ((1, 2, 4),)))
    assert found.first.kl == pytest.approx(0.5 * torch.tensor(0.5 / 0.25 * 0.5 / 0.75).log().item(), rel=1e-6)
    assert found.first.agreement == 0 and found.first.entropy_original == pytest.approx(0.693147, abs=1e-6)
    assert (found.steps_original, found.steps_changed, found.tokens_same) == (4, 6, 0.5)


def test_incomparable_models_are_refused(tiny: ModelConfig, random_network: RandomNetwork) -> None:
    lm = model(random_network(tiny))
    with pytest.raises(RequestError, match="prompts is empty"):
        record(lm, [])
    one = record(lm, PROMPTS[:1])
    for other in (replace(one, seed=1), record(lm, PROMPTS)):
        with pytest.raises(RequestError, match="differ in shape or seed"):
            compare_recordings(one, other)


def test_memory_bounds_the_positions_kept(
    tiny: ModelConfig, random_network: RandomNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, one = model(random_network(tiny)), 2 * tiny.vocab_size * 4
    for room, positions in ((6 * len(PROMPTS) * one, 6), (7 * len(PROMPTS) * one - 1, 6), (1, 1), (10**9, 12)):
        monkeypatch.setattr("blockpress.evals.divergence.MAX_BYTES", room)
        kept = record(lm, PROMPTS).probabilities
        assert kept.shape == (len(PROMPTS), 2, positions, tiny.vocab_size)
