"""Ours and `transformers` read what the other saves, and nothing changes on the way.

Tensors are compared to the last bit, and so are the logits of one program before and after. Between the two programs
logits differ by rounding: test_fidelity has the limits; here a swapped or stale tensor must show, which moves them by
far more than 1e-4.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.utils import logging

from blockpress.checkpoints import load_config, load_generation, load_network, minimal_vision, save_checkpoint
from blockpress.config import PRESETS, GenerationConfig, LayerConfig, ModelConfig, Sampling
from blockpress.model import Network
from tests.builders.files import bits, figures, same, tensors_of
from tests.conftest import RandomNetwork
from tests.parity.oracle import CACHE, build, to_bfloat16

pytestmark = pytest.mark.parity
logging.disable_progress_bar()


def sliding(dim: int, kv: int) -> LayerConfig:
    return LayerConfig(kind="sliding_attention", head_dim=dim, kv_heads=kv)


def full(dim: int, kv: int) -> LayerConfig:
    return LayerConfig(kind="full_attention", head_dim=dim, kv_heads=kv)


TINY = PRESETS["tiny"]()
CONFIGS = {
    "sliding and full, of different sizes": TINY,
    "a full layer first": replace(TINY, layers=(full(16, 1), sliding(8, 2), full(16, 1))),
    "sizes that are all alike": replace(TINY, layers=(sliding(8, 2), sliding(8, 2), full(8, 2))),
    "one full layer, in bfloat16": replace(TINY, layers=(full(16, 2),), dtype="bfloat16"),
    "both kinds, in bfloat16": replace(TINY, dtype="bfloat16"),
}
SHARD = 30_000


def read_theirs(folder: Path) -> DiffusionGemmaForBlockDiffusion:
    """What `transformers` loads, where every tensor has found its place."""
    model, info = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval().requires_grad_(False)


def their_figures(theirs: DiffusionGemmaForBlockDiffusion) -> Tensor:
    """The same logits as `figures`."""
    config = theirs.config
    draw = torch.Generator().manual_seed(7)
    prompt = torch.randint(0, config.text_config.vocab_size, (1, 11), generator=draw)
    canvas = torch.randint(0, config.text_config.vocab_size, (1, config.canvas_length), generator=draw)
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad():
        first = theirs(input_ids=prompt, decoder_input_ids=canvas, **{CACHE: cache})
        cap = config.text_config.final_logit_softcapping
        causal = torch.tanh(theirs.lm_head(first.encoder_last_hidden_state).float() / cap) * cap
        told = first.logits.to(theirs.dtype)
        again = theirs(decoder_input_ids=canvas, **{CACHE: cache}, self_conditioning_logits=told)
    return torch.cat((causal, first.logits, again.logits), dim=1)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def check_as_near(network: Network, theirs: DiffusionGemmaForBlockDiffusion) -> None:
    """Our logits are theirs. In bfloat16, where rounding sends tokens to other experts, they are about as near to theirs in
    float32 as their own; logits that have nothing to do with each other are 1.4 apart."""
    if network.dtype == torch.float32:
        assert distance(figures(network), their_figures(theirs)) < 1e-4
        return
    exact = their_figures(copy.deepcopy(theirs).float())
    rounding = distance(their_figures(theirs), exact)
    assert rounding < 0.4, "else it is no measure of anything"
    assert distance(figures(network), exact) <= 3 * rounding


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_transformers_checkpoint_round_trips(config: ModelConfig, in_shards: bool, tmp_path: Path) -> None:
    dtype = getattr(torch, config.dtype)
    theirs = build(config, seed=3)
    theirs = theirs if dtype == torch.float32 else to_bfloat16(theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=SHARD if in_shards else "5GB")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == in_shards

    network = load_network(tmp_path / "theirs")
    assert network.dtype == dtype
    assert network.config.layers == config.layers
    check_as_near(network, theirs)

    generation = load_generation(tmp_path / "theirs", network.config)
    save_checkpoint(
        tmp_path / "ours",
        network,
        generation=generation,
        kept_from=tmp_path / "theirs",
        shard_bytes=SHARD if in_shards else 10**9,
    )
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == in_shards
    assert same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    again = read_theirs(tmp_path / "ours")
    assert again.dtype == dtype
    # The tensors are the same; sums over them may not be, since the two lie at other alignments in memory.
    assert distance(their_figures(again), their_figures(theirs)) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_our_checkpoint_round_trips_through_transformers(
    config: ModelConfig, in_shards: bool, tmp_path: Path, random_network: RandomNetwork
) -> None:
    vision, kept = minimal_vision(1, config.hidden_size)
    config = replace(config, vision=vision, image_id=63)
    network = random_network(config, 5).to(getattr(torch, config.dtype))
    save_checkpoint(
        tmp_path / "ours",
        network,
        generation=GenerationConfig(),
        kept={name: tensor.to(network.dtype) for name, tensor in kept.items()},
        shard_bytes=SHARD if in_shards else 10**9,
    )
    theirs = read_theirs(tmp_path / "ours")
    assert theirs.dtype == network.dtype
    check_as_near(network, theirs)

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=SHARD if in_shards else "5GB")
    assert same(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))
    again = load_network(tmp_path / "theirs")
    assert same(dict(again.state_dict()), dict(network.state_dict()))
    assert torch.equal(figures(again), figures(network))
    read = load_config(tmp_path / "theirs")
    assert replace(read, vision=None) == replace(config, vision=None)
    assert (read.vision or {}).items() >= vision.items()


def test_the_comparison_sees_one_wrong_scalar(random_network: RandomNetwork) -> None:
    network = random_network(CONFIGS["sliding and full, of different sizes"], 5)
    right = figures(network)
    for layer in network.layers:
        layer.causal_scalar, layer.layer_scalar = layer.layer_scalar, layer.causal_scalar
    assert distance(figures(network), right) > 1e-3


@pytest.mark.parametrize("spelling", ["per_layer_config", "global_head_dim"])
def test_both_spellings_of_the_full_layers_sizes_are_read(spelling: str, tmp_path: Path) -> None:
    theirs = build(TINY, seed=3)
    theirs.save_pretrained(tmp_path)
    text = theirs.config.to_dict()["text_config"]
    assert "per_layer_config" in text, "this is how transformers saves it"
    if spelling == "global_head_dim":
        load_config(tmp_path)
        save_checkpoint(tmp_path, load_network(tmp_path), generation=GenerationConfig(), kept_from=tmp_path)
    written: dict[str, Any] = load_config(tmp_path).source["text_config"]
    assert spelling in written
    assert load_config(tmp_path).layers == TINY.layers
    assert distance(figures(load_network(tmp_path)), their_figures(theirs)) < 1e-4


def test_a_bfloat16_checkpoint_may_run_in_float32(
    seeing: ModelConfig, random_network: RandomNetwork, tmp_path: Path
) -> None:
    network = random_network(seeing, 5)
    kept = minimal_vision(0, seeing.hidden_size)[1]
    save_checkpoint(
        tmp_path, network, generation=GenerationConfig(), kept=kept, dtype="bfloat16", run_dtype=torch.float32
    )
    assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {torch.bfloat16}
    again = load_network(tmp_path)
    assert again.dtype == torch.float32
    rounded = {name: tensor.bfloat16().float() for name, tensor in network.state_dict().items()}
    assert same(dict(again.state_dict()), rounded)
    theirs = read_theirs(tmp_path)
    assert theirs.dtype == torch.float32
    assert distance(figures(again), their_figures(theirs)) < 1e-4


def test_vision_tensors_survive_byte_for_byte(seeing: ModelConfig, tmp_path: Path, single: Path) -> None:
    before = {name: bits(tensor) for name, tensor in tensors_of(single).items() if "vision" in name}
    assert len(before) == 16
    network = load_network(single, dtype="float16")
    save_checkpoint(tmp_path, network, generation=GenerationConfig(), kept_from=single, dtype="float32")
    after = {name: bits(tensor) for name, tensor in tensors_of(tmp_path).items() if "vision" in name}
    assert after == before
    assert load_config(tmp_path).vision == seeing.vision


def test_the_sampler_round_trips(seeing: ModelConfig, random_network: RandomNetwork, tmp_path: Path) -> None:
    sampling = Sampling(steps=7, entropy_bound=0.5, t_min=0.3, t_max=0.9, stability=2, confidence=0.01)
    generation = GenerationConfig(sampling=sampling, stop_ids=(1, 5))
    kept = minimal_vision(0, seeing.hidden_size)[1]
    save_checkpoint(tmp_path / "ours", random_network(seeing), generation=generation, kept=kept)
    theirs = read_theirs(tmp_path / "ours").generation_config
    assert theirs.eos_token_id == [1, 5]
    assert (theirs.max_denoising_steps, theirs.sampler_config.entropy_bound) == (7, 0.5)
    assert (theirs.t_min, theirs.t_max, theirs.confidence_threshold) == (0.3, 0.9, 0.01)
    theirs.save_pretrained(tmp_path / "ours")
    assert load_generation(tmp_path / "ours", seeing) == generation


def test_a_fresh_model_of_theirs_has_the_default_sampler(tmp_path: Path) -> None:
    build(TINY).save_pretrained(tmp_path)
    assert load_generation(tmp_path, load_config(tmp_path)) == GenerationConfig()
    (tmp_path / "generation_config.json").unlink()
    assert load_generation(tmp_path, replace(TINY, eos_ids=(4, 9))).stop_ids == (4, 9)


def test_a_loaded_network_is_in_eval_mode_and_owns_its_memory(single: Path) -> None:
    network = load_network(single)
    assert isinstance(network, Network)
    assert not network.training
    tensors = [*network.parameters(), *network.buffers()]
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
