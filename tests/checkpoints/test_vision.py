"""The vision tower's tensors are those that `transformers` makes; a tower is loaded whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blockpress.checkpoints import load_config, minimal_vision, resolve, vision_tensors
from blockpress.checkpoints.safetensors.vision import PROJECTION, TOWER, load_picture_settings, load_vision
from blockpress.config.vision import PictureSettings
from blockpress.errors import (
    BlockpressError,
    CheckpointError,
    ConfigError,
    DamagedFile,
    MissingWeights,
    RequestError,
    ShapeMismatch,
    UnexpectedWeights,
)
from blockpress.multimodal import prepare_images


@pytest.mark.parity
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
        {"use_clipped_linears": True, "num_hidden_layers": 1},
        {"standardize": True, "num_hidden_layers": 1, "patch_size": 8, "position_embedding_size": 32},
        minimal_vision(0, 8)[0],
    ],
)
def test_names_and_shapes_are_the_reference_s(config: dict[str, Any]) -> None:
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    with torch.device("meta"):
        theirs = Gemma4VisionModel(Gemma4VisionConfig(**config))
    expected = {TOWER + name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    width = theirs.config.hidden_size
    assert vision_tensors(config, 20) == expected | {PROJECTION: (20, width)}


@pytest.mark.parity
def test_the_minimal_tower_is_small_repeatable_and_sees() -> None:
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    config, tensors = minimal_vision(3, 192)
    assert sum(tensor.numel() for tensor in tensors.values()) < 3000
    assert all(torch.equal(tensors[name], again) for name, again in minimal_vision(3, 192)[1].items())
    assert not torch.equal(tensors[PROJECTION], minimal_vision(4, 192)[1][PROJECTION])
    tower = Gemma4VisionModel(Gemma4VisionConfig(**config))
    tower.load_state_dict({n.removeprefix(TOWER): t for n, t in tensors.items() if n.startswith(TOWER)})
    patches = torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(0))
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    with torch.no_grad():
        seen = tower(patches, places).last_hidden_state
    assert seen.shape == (4, 8)
    assert seen.isfinite().all()
    assert seen.std(0).min() > 0


@pytest.mark.parametrize(
    ("config", "name"),
    [({"model_type": "siglip"}, "model_type"), ({"hidden_size": 0}, "hidden_size"), ({"head_dim": "8"}, "head_dim")],
)
def test_an_invalid_tower_is_refused_by_name(config: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        vision_tensors(config, 8)


@pytest.fixture(params=["single", "sharded"])
def seeing_checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_tower_is_loaded(seeing_checkpoint: Path) -> None:
    tower = load_vision(seeing_checkpoint, dtype="float32")
    kept = minimal_vision(0, load_config(seeing_checkpoint).hidden_size)[1]
    state = tower.state_dict()
    assert {"model.encoder." + name for name in state} == kept.keys()
    assert all(torch.equal(state[name.removeprefix("model.encoder.")], tensor.float()) for name, tensor in kept.items())
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert load_vision(seeing_checkpoint, dtype=torch.bfloat16).vision_tower.patch_embedder.input_proj.weight.dtype == (
        torch.bfloat16
    )


def test_the_shipped_tower_sees() -> None:
    """Its 16 positions allow square pictures only; of others it says so."""
    path = resolve("sudoku-nano")
    config = load_config(path)
    settings = load_picture_settings(path, config)
    assert settings == PictureSettings(patch_size=4, pooling=2)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tower = load_vision(path, config=config)
    (features,) = tower(prepare_images([Image.fromarray(noise)], settings, 70))
    assert features.shape == (64, config.hidden_size)
    assert features.isfinite().all()
    with pytest.raises(BlockpressError, match="the tower knows 16"):
        tower(prepare_images([Image.fromarray(noise)], settings, 280))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def own(single: Path, tmp_path: Path) -> Path:
    for file in single.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


NAME = TOWER + "encoder.layers.0.mlp.up_proj.linear.weight"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda t: t.pop(NAME), MissingWeights, "up_proj"),
        (lambda t: t.update({TOWER + "std_bias": torch.zeros(8)}), UnexpectedWeights, "std_bias"),
        (lambda t: t.update({NAME: torch.zeros(8, 7)}), ShapeMismatch, r"\[8, 7\]"),
        (lambda t: t.update({NAME: torch.zeros(8, 8, dtype=torch.int8)}), ShapeMismatch, "I8"),
        (lambda t: [t.pop(name) for name in [n for n in t if "vision" in n]], CheckpointError, "no vision tower"),
    ],
    ids=["missing", "left over", "shape", "type", "none at all"],
)
def test_a_tower_that_does_not_fit_is_refused(own: Path, change: Any, kind: type[Exception], message: str) -> None:
    rewrite(own, change)
    with pytest.raises(kind, match=message):
        load_vision(own)


def test_a_checkpoint_without_a_tower_is_named(own: Path) -> None:
    data = json.loads((own / "config.json").read_text())
    del data["vision_config"]
    (own / "config.json").write_text(json.dumps(data))
    for load in (lambda: load_vision(own), lambda: load_picture_settings(own, load_config(own))):
        with pytest.raises(CheckpointError, match="no vision tower"):
            load()


@pytest.mark.parametrize(
    ("field", "value", "kind", "message"),
    [
        ("hidden_size", 10**18, ConfigError, "no network has the sizes"),
        ("position_embedding_size", 10**18, ConfigError, "no network has the sizes"),
        ("num_hidden_layers", 10**12, MissingWeights, "asks for 1000000000000 layers"),
    ],
)
def test_invalid_tower_sizes_are_refused(
    field: str, value: int, kind: type[Exception], message: str, own: Path
) -> None:
    data = json.loads((own / "config.json").read_text())
    data["vision_config"][field] = value
    (own / "config.json").write_text(json.dumps(data))
    with pytest.raises(kind, match=message):
        load_vision(own)


def test_an_unknown_device_is_refused(single: Path) -> None:
    with pytest.raises(RequestError, match="device 'xpu:7'"):
        load_vision(single, device="xpu:7")
    with pytest.raises(RequestError, match="dtype"):
        load_vision(single, dtype="int8")


def test_the_processor_s_files_are_read(own: Path) -> None:
    config = load_config(own)
    assert load_picture_settings(own, config).max_soft_tokens == 280
    (own / "preprocessor_config.json").write_text(json.dumps({"max_soft_tokens": 140, "patch_size": 4}))
    assert load_picture_settings(own, config).max_soft_tokens == 140
    (own / "processor_config.json").write_text(json.dumps({"processor_class": "Gemma4Processor"}))
    assert load_picture_settings(own, config).max_soft_tokens == 140
    (own / "processor_config.json").write_text(json.dumps({"image_processor": {"max_soft_tokens": 560}}))
    (own / "video_preprocessor_config.json").write_text(json.dumps({"max_soft_tokens": 140}))
    read = load_picture_settings(own, config)
    assert (read.max_soft_tokens, read.video_soft_tokens) == (560, 140)
    (own / "processor_config.json").write_text("{")
    with pytest.raises(DamagedFile, match="processor_config"):
        load_picture_settings(own, config)
