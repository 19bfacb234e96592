"""The vision tower's tensors are those that `transformers` makes, and the minimal tower runs there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from blockpress.errors import ConfigError
from blockpress.weights import minimal_vision, vision_tensors
from blockpress.weights.vision import PROJECTION, TOWER


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
    with torch.device("meta"):
        theirs = Gemma4VisionModel(Gemma4VisionConfig(**config))
    expected = {TOWER + name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    width = theirs.config.hidden_size
    assert vision_tensors(config, 20) == expected | {PROJECTION: (20, width)}


def test_the_minimal_tower_is_small_repeatable_and_sees() -> None:
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
def test_a_tower_that_cannot_be_is_refused_by_name(config: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        vision_tensors(config, 8)
