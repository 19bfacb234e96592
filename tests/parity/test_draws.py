"""How a next token is drawn, against `transformers`: its filters, its reading of generation_config.json, its shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blockpress.checkpoints import load_config, load_generation, load_network
from blockpress.config import AutoregressiveSampling, GenerationConfig
from blockpress.decoding import SequenceState
from blockpress.decoding.autoregressive import sample_next
from blockpress.decoding.generate import take
from blockpress.errors import ConfigError, RequestError
from blockpress.ops.nucleus import keep_top_k, keep_top_p

from .siblings import CASES, TINY, checkpoint, prompts

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("vocab", [5, 64, 5000])
@pytest.mark.parametrize(
    ("temperature", "k", "p"),
    [(1.0, 64, 0.95), (0.7, 3, 1.0), (1.3, None, 0.5), (0.2, 10_000, 0.01), (2.0, 1, 0.9), (1.0, None, 1e-12)],
)
def test_filters_are_those_of_transformers(vocab: int, temperature: float, k: int | None, p: float) -> None:
    draw = torch.Generator().manual_seed(vocab)
    for spread in (0.1, 1.0, 10.0):
        logits = spread * torch.randn(40, vocab, generator=draw)
        logits[::4] = logits[::4].round()  # ties
        theirs = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        theirs = theirs if k is None else TopKLogitsWarper(k)(None, theirs)
        theirs = TopPLogitsWarper(p)(None, theirs) if p < 1 else theirs
        ours = (logits / temperature)[:, None]
        ours = ours if k is None else keep_top_k(ours, k)
        ours = keep_top_p(ours, p) if p < 1 else ours
        distinct = torch.ones(40, dtype=torch.bool)
        distinct[::4] = False
        assert torch.equal(ours[distinct, 0], theirs[distinct])
        # Which of equal tokens are dropped is anybody's choice there.
        assert torch.equal(ours[:, 0].sort().values, theirs.sort().values)


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ({"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}, (1.0, 64, 0.95)),
        ({"do_sample": True}, (1.0, 50, 1.0)),
        ({"do_sample": True, "top_k": 0, "temperature": 0.3}, (0.3, None, 1.0)),
        ({"do_sample": False, "temperature": 0.3}, (0.0, None, 1.0)),
        ({}, (0.0, None, 1.0)),
    ],
)
def test_draws_follow_the_reference_distribution(
    told: dict[str, Any], read: Any, workspace: Path, tmp_path: Path
) -> None:
    """generation_config.json is read as `generate` reads it: our draws come as often as its probabilities say."""
    theirs, directory = checkpoint("experts, keys are values", workspace)
    config = load_config(directory)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": [1, 106, 50]}))
    generation = load_generation(tmp_path, config)
    sampling = generation.autoregressive
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == read and generation.stop_ids == (1, 106, 50)
    written = generation.to_dict()
    assert "max_denoising_steps" not in written and type(generation).from_dict(written, config) == generation

    network, count = load_network(directory), 4000
    prompt = prompts(CASES["experts, keys are values"])[0]
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=1,
        pad_token_id=0,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
        **told,
    )
    expected = out.scores[0][0].softmax(-1)
    hidden, _ = network.read(torch.tensor([prompt]), network.empty_cache(1))
    rows = [SequenceState(i, prompt, i, stop_ids=(), canvas_length=1, room=9) for i in range(count)]
    drawn = sample_next(network, rows, hidden[:, -1:].expand(count, 1, -1), sampling).tolist()
    if sampling.temperature == 0:
        assert set(drawn) == {int(expected.argmax())}
        return
    frequency = torch.bincount(torch.tensor(drawn), minlength=64) / count
    assert set(frequency.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())
    # Five standard errors of a share, at the largest that it can be.
    assert float((frequency - expected).abs().max()) <= 5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize(
    ("edits", "processors"),
    [
        ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
        ({"repetition_penalty": 0.6, "top_k": 5}, [RepetitionPenaltyLogitsProcessor(0.6), TopKLogitsWarper(5)]),
        ({"min_p": 0.4}, [MinPLogitsWarper(0.4)]),
        ({"top_k": 9, "top_p": 0.6, "min_p": 0.3}, [TopKLogitsWarper(9), TopPLogitsWarper(0.6), MinPLogitsWarper(0.3)]),
        ({"logit_bias": {5: 4.0, 60: -3.5}}, [SequenceBiasLogitsProcessor({(5,): 4.0, (60,): -3.5})]),
        ({"suppress_tokens": [3, 40]}, [SuppressTokensLogitsProcessor([3, 40])]),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_edits_are_those_of_the_reference_s_processors(
    edits: dict[str, Any], processors: list[Any], temperature: float, workspace: Path
) -> None:
    """The tokens that our draws take, and how often, are those of the processors' probabilities."""
    theirs, directory = checkpoint("experts, keys are values", workspace)
    network, count = load_network(directory), 1500
    prompt = prompts(CASES["experts, keys are values"])[0]
    scores = theirs(torch.tensor([prompt])).logits[:, -1].float().detach()
    [*early] = [
        each for each in processors if not isinstance(each, TopKLogitsWarper | TopPLogitsWarper | MinPLogitsWarper)
    ]
    late = [each for each in processors if each not in early]
    heat = [TemperatureLogitsWarper(temperature)] if temperature else []
    for processor in [*early, *heat, *(late if temperature else [])]:
        scores = processor(torch.tensor([prompt]), scores)
    expected = scores[0].softmax(-1)
    sampling = AutoregressiveSampling(temperature=temperature, **edits)
    hidden, _ = network.read(torch.tensor([prompt]), network.empty_cache(1))
    rows = [SequenceState(i, prompt, i, stop_ids=(), canvas_length=1, room=9) for i in range(count)]
    drawn = sample_next(network, take(rows, sampling), hidden[:, -1:].expand(count, 1, -1), sampling).tolist()
    if temperature == 0:
        assert set(drawn) == {int(expected.argmax())}
        return
    frequency = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / count
    assert set(frequency.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert float((frequency - expected).abs().max()) <= 5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("typical_p", 0.9), ("num_beams", 4), ("no_repeat_ngram_size", 2), ("sequence_bias", [[[3], 1.0]])],
)
def test_unsupported_samplers_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        GenerationConfig.from_dict({key: value}, TINY)


def test_sampling_is_checked() -> None:
    for field, value in {"temperature": -1, "top_k": 0, "top_p": 0.0, "stop": ("",)}.items():
        with pytest.raises(RequestError, match=field):
            AutoregressiveSampling(**{field: value})
    with pytest.raises(RequestError, match="no field 'steps'"):
        AutoregressiveSampling().with_(steps=3)
