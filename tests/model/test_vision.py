"""The vision tower against `transformers`: features and projected features of random towers of every kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, Gemma4VisionConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaMultimodalEmbedder
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from blockpress.config.vision import VisionConfig
from blockpress.errors import MediaError
from blockpress.model import vision
from blockpress.model.vision import VisionTower
from blockpress.ops import attention

pytestmark = pytest.mark.parity

FLOAT32 = 5e-5  # large heads at scale 1 make sharp attention: the fused product then differs by 1.6e-5
TEXT = 20
BASE = {
    "model_type": "gemma4_vision",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
}
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "standardize": {"standardize": True},
    "clipped": {"use_clipped_linears": True},
    "pooling 2, shared keys, another base": {
        "pooling_kernel_size": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 30.0},
        "rms_norm_eps": 1e-4,
    },
    "all, heads of 72 as published": {
        "standardize": True,
        "use_clipped_linears": True,
        "head_dim": 72,
        "pooling_kernel_size": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GRIDS = [(6, 6), (6, 12), (6, 6), (18, 6), (24, 30)]  # rows and columns, for poolings of 2 and 3
towers = pytest.mark.parametrize("name", TOWERS)


class Oracle(torch.nn.Module):
    """The tower and the embedder behind it, under the names of the published checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        theirs = Gemma4VisionConfig(**config)
        self.vision_tower = Gemma4VisionModel(theirs)
        text = DiffusionGemmaConfig(text_config={"hidden_size": TEXT}).text_config
        self.embed_vision = DiffusionGemmaMultimodalEmbedder(theirs, text)


def oracle(name: str, seed: int = 0) -> tuple[Oracle, VisionConfig]:
    data = BASE | TOWERS[name]
    theirs = Oracle(data).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for key, tensor in theirs.state_dict().items():
        if key.endswith("_min"):
            tensor.fill_(-0.7)
        elif key.endswith("_max"):
            tensor.fill_(0.6)
        elif tensor.ndim < 2:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * tensor.shape[-1] ** -0.5)
    return theirs, VisionConfig.from_dict(data)


def tower_like(theirs: Oracle, config: VisionConfig, op: Any = attention.fused) -> VisionTower:
    tower = VisionTower(config, TEXT, op).eval().requires_grad_(False)
    tower.load_state_dict(theirs.state_dict())
    return tower


def picture(rows: int, columns: int, config: VisionConfig, seed: int = 0) -> SimpleNamespace:
    draw = np.random.default_rng(seed)
    y, x = np.divmod(np.arange(rows * columns), columns)
    patches = draw.random((rows * columns, 3 * config.patch_size**2), dtype=np.float32)
    return SimpleNamespace(patches=patches, positions=np.stack((x, y), -1))


def their_features(theirs: Oracle, pictures: list[SimpleNamespace], spare: int) -> tuple[Tensor, Tensor]:
    """Features of all pictures as one padded batch, before and after the projection; `spare` more patches of padding."""
    k = theirs.vision_tower.config.pooling_kernel_size**2
    most = max(len(p.patches) for p in pictures) + spare * k
    pixels = torch.zeros(len(pictures), most, pictures[0].patches.shape[1])
    places = torch.full((len(pictures), most, 2), -1)
    for row, one in enumerate(pictures):
        pixels[row, : len(one.patches)] = torch.from_numpy(one.patches)
        places[row, : len(one.positions)] = torch.from_numpy(one.positions)
    theirs.vision_tower.set_attn_implementation("eager")
    seen = theirs.vision_tower(pixels, places).last_hidden_state
    return seen, theirs.embed_vision(seen)


def distance(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@towers
@pytest.mark.parametrize("op", [attention.plain, attention.fused], ids=["plain", "fused"])
def test_features_are_the_reference_s(name: str, op: Any) -> None:
    theirs, config = oracle(name)
    ours = tower_like(theirs, config, op)
    pictures = [picture(*grid, config, seed) for seed, grid in enumerate(GRIDS)]
    raw, projected = their_features(theirs, pictures, spare=5)
    soft = [len(p.patches) // config.pooling**2 for p in pictures]
    assert sum(soft) == len(raw)
    found = ours(pictures)
    assert [len(features) for features in found] == soft
    worst = max(distance(a, b) for a, b in zip(found, projected.split(soft), strict=True))
    assert worst <= FLOAT32, f"{name}: {worst:.2e}"
    alone = [ours.vision_tower(*_tensors(p), GRIDS[i][0])[0] for i, p in enumerate(pictures)]
    worst = max(distance(a, b) for a, b in zip(alone, raw.split(soft), strict=True))
    assert worst <= FLOAT32, f"{name}, before the projection: {worst:.2e}"


def _tensors(one: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(one.patches)[None], torch.from_numpy(one.positions)[None]


@towers
def test_bfloat16_stays_near(name: str) -> None:
    theirs, config = oracle(name)
    for tensor in theirs.state_dict().values():
        tensor.copy_(tensor.bfloat16())
    pictures = [picture(12, 6, config)]
    _, full = their_features(theirs, pictures, 0)
    low = tower_like(theirs, config).to(torch.bfloat16)
    (ours,) = low(pictures)
    _, their_low = their_features(theirs.to(torch.bfloat16), pictures, 0)
    assert ours.dtype == torch.bfloat16
    assert distance(ours, full) <= max(0.03, 1.5 * distance(their_low, full))


def test_a_wrong_tower_is_found() -> None:
    """Each single mistake moves the features a hundred limits away: the comparison can fail."""
    name = "all, heads of 72 as published"
    theirs, config = oracle(name)
    pictures = [picture(12, 6, config)]
    _, right = their_features(theirs, pictures, 0)
    wrong = []
    for changes in ({"rope_theta": 90.0}, {"pooling": 2, "rms_norm_eps": 1e-2}):
        other = VisionConfig(**(config.__dict__ | changes))
        wrong.append(tower_like(theirs, other)(pictures)[0])
    swapped = tower_like(theirs, config)
    table = swapped.vision_tower.patch_embedder.position_embedding_table
    table.copy_(table.flip(0))
    wrong.append(swapped(pictures)[0])
    for key in ("std_bias", "encoder.layers.1.mlp.up_proj.output_max", "encoder.layers.0.self_attn.q_proj.input_min"):
        off = tower_like(theirs, config)
        off.vision_tower.get_buffer(key).mul_(0.9)
        wrong.append(off(pictures)[0])
    for found in wrong:
        assert distance(found, right) >= 100 * FLOAT32


def test_pictures_in_a_batch_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, config = oracle("plain")
    ours = tower_like(theirs, config)
    pictures = [picture(6, 6, config, seed) for seed in range(5)] + [picture(6, 12, config)]
    together = ours(pictures)
    assert all(distance(a, ours([p])[0]) <= 1e-6 for a, p in zip(together, pictures, strict=True))
    monkeypatch.setattr(vision, "AT_ONCE", 80)  # two pictures of 36 patches, one of 72
    batches: list[int] = []
    ours.vision_tower.register_forward_hook(lambda module, given, out: batches.append(len(given[0])))
    assert all(distance(a, b) <= 1e-6 for a, b in zip(ours(pictures), together, strict=True))
    assert batches == [2, 2, 1, 1]
    assert ours([]) == []


def test_unreadable_patches_are_refused() -> None:
    _, config = oracle("plain")
    ours = VisionTower(config, TEXT)
    good = picture(6, 12, config)
    for bad, message in (
        (SimpleNamespace(patches=good.patches[:, :-1], positions=good.positions), "shape"),
        (SimpleNamespace(patches=good.patches, positions=good.positions[::-1].copy()), "no grid"),
        (SimpleNamespace(patches=good.patches[:-1], positions=good.positions[:-1]), "no grid"),
        (SimpleNamespace(patches=good.patches[:0], positions=good.positions[:0]), "shape"),
        (picture(6, 8, config), "no grid"),
        (picture(8, 6, config), "no grid"),
        (picture(8, 7, config), "no grid"),  # 8 and 7 leave 2 and 1 over, together a multiple
        (picture(3, 66, config), "the tower knows 64"),
    ):
        with pytest.raises(MediaError, match=message):
            ours([bad])
