"""`blockpress show` and the counts behind it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from blockpress import costs
from blockpress.config import PRESETS, LayerConfig, ModelConfig
from blockpress.model import Network

from .conftest import Call


def variants() -> list[ModelConfig]:
    tiny = PRESETS["tiny"]()
    wide = LayerConfig(kind="full_attention", head_dim=16, kv_heads=4)
    return [
        tiny,
        PRESETS["sudoku-nano"](),
        dataclasses.replace(tiny, layers=(*tiny.layers, wide), num_experts=6, top_k_experts=3, expert_size=10),
        dataclasses.replace(tiny, vocab_size=100, hidden_size=24, intermediate_size=40),
    ]


@pytest.mark.parametrize("config", variants())
def test_parameters_are_those_of_the_network(config: ModelConfig) -> None:
    with torch.device("meta"):
        network = Network(config)
    named = {name: parameter.numel() for name, parameter in network.named_parameters()}
    counted = costs.parameters(config)
    assert sum(counted.values()) == sum(named.values())
    for part, key in {"embedding": "embed_tokens", "attention": "self_attn", "experts": ".experts.", "router": "router",
                      "dense MLP": ".mlp.", "self-conditioning": "self_conditioning"}.items():  # fmt: skip
        assert counted[part] == sum(count for name, count in named.items() if key in name), part


def test_the_published_model_has_its_published_size() -> None:
    config = PRESETS["diffusiongemma-26B-A4B"]()
    assert sum(costs.parameters(config).values()) == pytest.approx(25.25e9, abs=5e6)
    assert costs.active_parameters(config) == pytest.approx(3.8e9, abs=5e7)
    assert costs.context_bytes(config, "bfloat16") == {"sliding_attention": 200 * 1024, "full_attention": 20 * 1024}
    with torch.device("meta"):
        assert sum(p.numel() for p in Network(config).parameters()) == sum(costs.parameters(config).values())


def test_context_bytes_are_those_of_the_cache(tiny: ModelConfig) -> None:
    network = Network(tiny)
    network.requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.ones_(parameter)
    _, cache = network.read(torch.tensor([[3, 4, 5]]), network.empty_cache(1))
    held = sum(part.numel() * part.element_size() for pair in cache.layers for part in pair)
    assert held == 3 * sum(costs.context_bytes(tiny, "float32").values())


def test_a_checkpoint_is_described_from_its_headers(call: Call, untrained: Path) -> None:
    done = call("show", untrained, "--json")
    said = json.loads(done.out)
    size = (untrained / "model.safetensors").stat().st_size
    assert said["files"]["bytes"] == size and said["files"]["count"] == 1 and said["tokenizer"] is True
    assert said["total"] == sum(said["parameters"].values()) > said["active"] > 0
    assert said["sampling"]["steps"] == 48 and said["stop_ids"] == [1] and said["canvas"] == 90
    assert said["path"] == str(untrained) and said["layers"]["kinds"]["sliding"]["count"] == 4


def test_the_shipped_model_keeps_its_vision_tower_beside_it(call: Call) -> None:
    said = json.loads(call("show", "--json").out)
    assert said["model"] == "sudoku-nano" and said["vision_parameters"] > 0
    text = call("show").out
    for word in ("parameters", "sliding layers", "experts", "canvas", "90 tokens", "vision", "sampling", "stop ids"):
        assert word in text
    assert "\x1b" not in text


def test_a_preset_needs_no_files(call: Call) -> None:
    done = call("show", "diffusiongemma-26B-A4B")
    assert "25.25 B, 3.84 B of them active a token" in done.out and "a preset" in done.out
    assert "200.0 KiB sliding + 20.0 KiB full" in done.out and "1, 106, 50" in done.out


def test_an_unknown_name_lists_models_and_presets(call: Call) -> None:
    done = call("show", "nobody")
    assert done.code == 2 and "sudoku-nano" in done.err and "diffusiongemma-26B-A4B" in done.err
