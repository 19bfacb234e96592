"""The vision tower on disk: its tensors by name and shape, its loader, and the smallest tower there is.

A model of our own that never sees an image carries a minimal tower, since `transformers` creates one of 167 million
parameters for a checkpoint without one.

Invariant: the names and shapes are those of the state dict that `transformers` builds from the same config, and every
tensor of a loaded tower comes from the checkpoint.

Run it:  python -m pytest tests/checkpoints/test_vision.py
Source: `Gemma4VisionModel`, `DiffusionGemmaMultimodalEmbedder`, `Gemma4VisionConfig` of `transformers` 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockpress.checkpoints.build import choose_device, choose_types, hold, room_for, without_memory
from blockpress.checkpoints.checkpoint import Checkpoint, load_config, opened_at
from blockpress.checkpoints.files import checkpoint_directory, read_object
from blockpress.checkpoints.index import FLOATS, StoredTensor, open_safetensors
from blockpress.checkpoints.names import is_derived, is_vision
from blockpress.config import ModelConfig
from blockpress.config.vision import MINIMAL_TOWER, PictureSettings, VisionConfig
from blockpress.errors import CheckpointError, MissingWeights, RequestError, ShapeMismatch, UnexpectedWeights
from blockpress.model.vision import VisionTower

ENCODER = "model.encoder."
TOWER = ENCODER + "vision_tower."
PROJECTION = ENCODER + "embed_vision.embedding_projection.weight"

# The file of newer saves; and those of older ones, with the same fields but no section of their own.
_PROCESSOR, _PREPROCESSOR, _VIDEO = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)

_AGREE = "do config and weights come from the same save?"

Shapes = dict[str, tuple[int, ...]]


def load_vision(
    path: str | Path | Checkpoint,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | str | None = None,
    compute_dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> VisionTower:
    """Read a checkpoint's vision tower, in eval mode and without gradients; the text weights are not touched.

    Args:
        path: the checkpoint's directory, or the checkpoint, if it is open. config: replaces the checkpoint's own.
        dtype, compute_dtype, device: as in `load_network`; give those of the network that it is for.

    Raises:
        CheckpointError: the checkpoint has no tower. MissingWeights, UnexpectedWeights, ShapeMismatch, DamagedFile:
            what is wrong with the files. ConfigError: an invalid `vision_config`. RequestError: dtype or device.
    """
    checkpoint = opened_at(path)
    config = load_config(checkpoint) if config is None else config
    if not config.has_canvas:
        raise CheckpointError(
            f"vision is not read in the family {config.family}", hint="leave images out, or use DiffusionGemma"
        )
    # Before `checkpoint.tensors`: a checkpoint without a tower may be a GGUF file, which has none.
    if config.vision is None:
        raise _without_tower(checkpoint.path)
    target_device = choose_device(device)
    types = choose_types(dtype, compute_dtype, config, target_device)
    if types.integers and compute_dtype not in (None, "auto"):
        raise RequestError(
            "compute_dtype is int8, and the vision tower is computed in floats", hint="give compute_dtype float32"
        )
    types = replace(types, integers=False)
    stored = {n: t for n, t in checkpoint.tensors.items() if is_vision(n) and not is_derived(n)}
    if not stored:
        raise _without_tower(checkpoint.path)
    sizes = VisionConfig.from_dict(config.vision)
    # A layer has tensors: a wrong number must not make us build that many layers.
    if sizes.num_layers > len(stored):
        raise MissingWeights(
            f"the vision tower has {len(stored)} tensors, vision_config asks for {sizes.num_layers} layers", hint=_AGREE
        )
    tower = without_memory(lambda: VisionTower(sizes, config.hidden_size))
    _check(stored, {ENCODER + name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()})
    state = {}
    tensors = sorted(stored.values(), key=lambda tensor: tensor.file)
    with room_for(sum(math.prod(tensor.shape) for tensor in tensors) * types.storage.itemsize, target_device):
        for file, group in groupby(tensors, key=lambda tensor: tensor.file):
            with open_safetensors(file) as shard:
                for tensor in group:
                    values = shard.get_tensor(tensor.name).to(device=target_device, dtype=types.storage, copy=True)
                    state[tensor.name.removeprefix(ENCODER)] = values
    tower.load_state_dict(state, assign=True)
    hold(tower, types)
    return tower.eval().requires_grad_(False)


def load_picture_settings(path: str | Path, config: ModelConfig) -> PictureSettings:
    """The checkpoint's image settings: processor_config.json, else preprocessor_config.json, else the defaults.

    Raises:
        CheckpointError: no tower, so no images. DamagedFile: not JSON. ConfigError: a processor that we do not have.
    """
    if config.vision is None:
        raise _without_tower(path)
    directory = checkpoint_directory(path)
    data: dict[str, Any] = {}
    if (directory / _PROCESSOR).is_file():
        data = read_object(directory / _PROCESSOR)
    if "image_processor" not in data and (directory / _PREPROCESSOR).is_file():
        data |= {"image_processor": read_object(directory / _PREPROCESSOR)}
    if "video_processor" not in data and (directory / _VIDEO).is_file():
        data |= {"video_processor": read_object(directory / _VIDEO)}
    return PictureSettings.from_dict(VisionConfig.from_dict(config.vision), {"image_processor": {}} | data)


def vision_tensors(vision_config: Mapping[str, Any], text_hidden: int) -> Shapes:
    """Names and shapes of a tower's tensors as they are stored.

    Args:
        vision_config: `vision_config` of a `config.json`, of the type `gemma4_vision`.
        text_hidden: hidden size of the stack that the soft tokens are projected to.

    Raises:
        ConfigError: another type of tower, or a size that is not a whole number of at least 1, or impossibly large.

    >>> sum(torch.Size(shape).numel() for shape in vision_tensors(MINIMAL_TOWER, 192).values())
    2672
    """
    config = VisionConfig.from_dict(vision_config)
    tower = without_memory(lambda: VisionTower(config, text_hidden))
    return {ENCODER + name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}


def minimal_vision(seed: int, text_hidden: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tower of one layer and 8 features: its `vision_config`, and its bfloat16 tensors by published name.

    It is untrained, so its output for an image means nothing. The same seed gives the same tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in vision_tensors(MINIMAL_TOWER, text_hidden).items():
        drawn = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        tensors[name] = drawn.to(torch.bfloat16)
    return dict(MINIMAL_TOWER), tensors


def _check(stored: Mapping[str, StoredTensor], wanted: Shapes) -> None:
    """Check that every tensor of the tower is stored as floats of its shape, and that there is no other."""
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing:
        raise MissingWeights(f"the vision tower lacks {len(missing)} tensors, such as {missing[0]}", hint=_AGREE)
    if unexpected:
        raise UnexpectedWeights(
            f"the vision tower does not take {len(unexpected)} tensors, such as {unexpected[0]}", hint=_AGREE
        )
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise ShapeMismatch(
                f"the tensor {name} has the shape {list(stored[name].shape)}, the config asks for {list(shape)}",
                hint=_AGREE,
            )
        if stored[name].dtype not in FLOATS:
            raise ShapeMismatch(
                f"the tensor {name} is stored as {stored[name].dtype}", hint=f"a tower is stored as {', '.join(FLOATS)}"
            )


def _without_tower(path: str | Path) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} has no vision tower", hint="leave images and videos out, or take a checkpoint with one"
    )
