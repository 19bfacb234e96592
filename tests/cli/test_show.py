"""`blockpress show` and the counts behind it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


FORMATS = {
    "fp8": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "fp8 + nvfp4": {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}, "b": {"weights": {"num_bits": 8, "type": "float"}}}},
    "int4": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
    "int8": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}},
    "mxfp4": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}}},
    "bitsandbytes": {"quant_method": "bitsandbytes"},
    "unnamed method": {"something": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_are_named_and_counted_as_stored(call: Call, untrained: Path, tmp_path: Path, name: str) -> None:
    """One layer's experts packed to a byte a weight: what is packed is said, and counts with its scales as stored."""
    shutil.copytree(untrained, tmp_path / "packed")
    tensors = load_file(untrained / "model.safetensors")
    plain = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    key = next(key for key in tensors if ".experts.down_proj" in key)
    weight = tensors.pop(key)
    tensors[f"{key}.weight"] = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    tensors[f"{key}.weight_scale"] = torch.ones(weight.shape[0], 1)
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    config = json.loads((untrained / "config.json").read_text()) | {"quantization_config": FORMATS[name]}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    said = json.loads(call("show", tmp_path / "packed", "--json").out)
    assert said["format"] == name and said["files"]["quantised"] == ["experts"]
    need = said["memory"]["in"]["float32"]
    assert need["weights"] == plain - weight.numel() * (weight.element_size() - 1) + 4 * weight.shape[0]
    assert f"format               {name}, packed by" in call("show", tmp_path / "packed").out


def test_plain_weights_are_counted_as_loaded(call: Call, untrained: Path) -> None:
    said = json.loads(call("show", untrained, "--json").out)
    tensors = load_file(untrained / "model.safetensors")
    stored = sum(
        t.numel() * t.element_size()
        for name, t in tensors.items()
        if not name.startswith("model.encoder.vision") and "embed_vision" not in name
    )
    assert said["format"] == "fp32" and said["files"]["text"] == stored
    assert said["memory"]["in"]["float32"]["weights"] == stored == 2 * said["memory"]["in"]["bfloat16"]["weights"]


def test_the_context_option_is_honoured(call: Call, untrained: Path) -> None:
    said = json.loads(call("show", untrained, "--context", 100, "--json").out)["memory"]
    assert said["tokens"] == 100
    for need in said["in"].values():
        page = PRESETS["sudoku-nano"]().canvas_length
        whole = -(-100 // page) * page  # the window and a chunk reach over it
        assert need["context"] == whole * sum(need["context_token"].values())
        assert need["total"] == need["weights"] + need["context"] + max(need["canvas"], need["reading"])
    assert json.loads(call("show", untrained, "--json").out)["memory"]["tokens"] == 256, "the model's own limit"
    for wrong in (0, 257):
        done = call("show", untrained, "--context", wrong)
        assert done.code == 2 and f"--context is {wrong}" in done.err


def test_every_device_says_what_fits(call: Call, untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = json.loads(call("show", untrained, "--json").out)["memory"]["in"]
    free = {
        "cpu": need["float32"]["total"],
        "cuda:0": need["bfloat16"]["total"],
        "cuda:1": need["bfloat16"]["total"] - 1,
    }
    monkeypatch.setattr("blockpress.hardware.free_memory", lambda: free)
    rows = {line.split("  ")[0]: line for line in call("show", untrained).out.splitlines()}
    assert rows["on cpu"].endswith("fits in float32 and bfloat16")
    assert rows["on cuda:0"].endswith("fits in bfloat16") and rows["on cuda:1"].endswith("does not fit")


def test_a_tie_is_counted_once(call: Call, untrained: Path, tmp_path: Path) -> None:
    shutil.copytree(untrained, tmp_path / "tied")
    tensors = load_file(untrained / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    once, twice = (json.loads(call("show", path, "--json").out)["files"] for path in (untrained, tmp_path / "tied"))
    assert once["text"] == twice["text"] < twice["bytes"] > once["bytes"]
