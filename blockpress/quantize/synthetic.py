"""A checkpoint of random values in the shape of a preset, in any format, to measure speed and memory on.

Random bytes are used as ranks of a normal distribution and mapped to codes of the format, so that 25 billion weights
are drawn directly in their stored form. A matrix has 256 (in 4 bits 16) different values.

    linear layers, router    mean 0, standard deviation 1/sqrt(inputs): activations keep their size
    embedding                standard deviation 1/sqrt(hidden)
    norms, scales, scalars   1

Invariant: a tensor is a function of (its name, seed, format), so that --layers N is a prefix of the whole.

Run it:  blockpress synthesize tiny ./random --format nvfp4
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blockpress.checkpoints.atomic import SHARD_BYTES, staged, write_json
from blockpress.checkpoints.files import CONFIG, GENERATION
from blockpress.checkpoints.names import published_name
from blockpress.checkpoints.safetensors.stream import StreamWriter, streamed
from blockpress.config import PRESETS, GenerationConfig, ModelConfig
from blockpress.errors import ModelNotFound, RequestError
from blockpress.model import Network
from blockpress.quantize.convert import COPIED_FILES
from blockpress.quantize.encoders import Format, Fp8, quantization_config
from blockpress.quantize.encoders.layout import quantiles
from blockpress.quantize.recipe import Entry, QuantizationRecipe, make_recipe

MARK = "synthetic"
"""The key of config.json that marks the weights as random."""

# Values of a plain tensor that are drawn at a time.
_PIECE = 1 << 24

_CARD = """# Random weights

This checkpoint has the shape of `{preset}` and random weights (seed {seed}, {layers} layers, {form}), written by
`blockpress synthesize` to measure speed and memory. It has learnt nothing: what it writes is noise.
"""


def synthesize(
    preset: str,
    target: str | Path,
    form: Format | None = None,
    *,
    seed: int = 0,
    layers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a checkpoint of random weights, without vision and without a tokenizer.

    Args:
        preset: a key of `blockpress.config.PRESETS`.
        form: of the linear layers; None: all in bfloat16.
        layers: only the first `layers` layers; None: all.
        progress: called with (bytes written, bytes to write).

    Returns:
        The bytes of all tensors.

    Raises:
        ModelNotFound: no such preset. RequestError: an invalid seed or number of layers.
        CheckpointError: the target cannot be written, or the disk is full.
    """
    if not isinstance(seed, int) or seed < 0:
        raise RequestError(f"seed is {seed!r}", hint="seed must be a whole number of at least 0")
    config = _config(preset, layers)
    recipe = _recipe(config, form)
    slots = recipe.slots()
    total, done = sum(slot.bytes for slot in slots), 0
    generation = GenerationConfig(stop_ids=config.eos_ids).to_dict()
    document = config.to_dict() | {MARK: {"preset": preset, "seed": seed, "by": "blockpress synthesize"}}
    if form is not None:
        document |= {"quantization_config": quantization_config(form, recipe.ignore)}
    with staged(Path(target), need=total, replaces=COPIED_FILES) as staging:
        with streamed(staging, slots, shard_bytes) as writer:
            for entry in recipe.entries:
                done += _draw(entry, recipe, seed, writer)
                if progress is not None:
                    progress(done, total)
        card = _CARD.format(preset=preset, seed=seed, layers=len(config.layers), form=form.name if form else "bf16")
        (staging / "README.md").write_text(card, encoding="utf-8")
        write_json(staging / GENERATION, generation)
        write_json(staging / CONFIG, document)
    return total


def _config(preset: str, layers: int | None) -> ModelConfig:
    if preset not in PRESETS:
        raise ModelNotFound(f"there is no preset {preset!r}", hint=f"presets: {', '.join(sorted(PRESETS))}")
    config = PRESETS[preset]()
    if layers is not None:
        if not isinstance(layers, int) or not 1 <= layers <= len(config.layers):
            raise RequestError(f"layers is {layers!r}", hint=f"{preset} has {len(config.layers)}: give 1 to that many")
        config = replace(config, layers=config.layers[:layers])
    return replace(config, dtype="bfloat16", vision=None)


def _recipe(config: ModelConfig, form: Format | None) -> QuantizationRecipe:
    with torch.device("meta"):
        state = Network(config).state_dict()
    tensors = {published_name(name, config.family): ("BF16", tuple(tensor.shape)) for name, tensor in state.items()}
    if form is not None:
        return make_recipe(tensors, form)
    entries = tuple(Entry(name=n, code=code, shape=shape, kind="kept") for n, (code, shape) in tensors.items())
    # Without a quantised entry the format is never used.
    return QuantizationRecipe(form=Fp8(), entries=entries, ignore=(), notes=())


def _draw(entry: Entry, recipe: QuantizationRecipe, seed: int, writer: StreamWriter) -> int:
    """Write one entry; returns its bytes."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(entry.name.encode())]))
    if entry.smaller:
        for module in entry.modules:
            tensors = recipe.form.draw(module.rows, module.columns, module.columns**-0.5, rng)
            for part, tensor in tensors.items():
                writer.write(f"{module.name}.{part}", tensor)
    else:
        for slot in recipe.slots_of(entry):
            for piece in _plain(slot.shape, rng):
                writer.write(slot.name, piece)
    return sum(slot.bytes for slot in recipe.slots_of(entry))


def _plain(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Tensor]:
    """A tensor in bfloat16, in pieces: ones where it has one axis, else normal values."""
    if len(shape) < 2:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    levels = torch.from_numpy(quantiles(256) * shape[-1] ** -0.5).to(torch.bfloat16).view(torch.int16).numpy()
    left = math.prod(shape)
    while left:
        count = min(left, _PIECE)
        ranks = np.frombuffer(rng.bytes(count), dtype=np.uint8)
        yield torch.from_numpy(levels[ranks]).view(torch.bfloat16)
        left -= count
