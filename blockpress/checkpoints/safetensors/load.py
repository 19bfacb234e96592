"""Loads a checkpoint into a network, tensor by tensor.

The network is built without memory (`build.py`) and every weight is read, cast, moved and set before the next one is
touched: peak memory is the weights and one tensor. Names, shapes and types are compared first, on the files' headers
(`mapping.py`), so that a checkpoint that does not fit fails in milliseconds.

Packed weights stay packed (`packed.py`). Experts that are stored one by one are read directly into their stacks.

Invariant: every tensor of the network comes from the checkpoint, and every tensor of the checkpoint is in the network,
equal to one that is, or known by name to be outside it (vision, derived tables, scales of activations).

Run it:  python -c "from blockpress.checkpoints import load_network; print(load_network('runs/sudoku/model').dtype)"
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from blockpress.checkpoints.build import (
    Progress,
    Types,
    choose_device,
    choose_types,
    converting,
    multiplied,
    packable,
    put,
    room_for,
    without_memory,
)
from blockpress.checkpoints.checkpoint import Checkpoint, load_config, opened_at
from blockpress.checkpoints.gguf.load import load_gguf_network
from blockpress.checkpoints.index import open_safetensors
from blockpress.checkpoints.names import published_name
from blockpress.checkpoints.safetensors.mapping import Slot, Target, plan_mapping
from blockpress.checkpoints.safetensors.packed import Field
from blockpress.config import ModelConfig
from blockpress.errors import UnexpectedWeights
from blockpress.model import Network
from blockpress.ops.packed import HalfFloats, PackedTensors
from blockpress.ops.weight import Weight


@dataclass(kw_only=True)
class _Filling:
    """A target while it is being read: the layout's tensors so far, and how many stored tensors remain."""

    target: Target
    remaining: int
    tensors: dict[str, Tensor] = field(default_factory=dict)


def load_network(
    path: str | Path | Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    compute_dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Network:
    """Read a checkpoint's weights into a network, in eval mode and without gradients. Packed weights stay packed.

    Args:
        path: the checkpoint's directory or GGUF file, or the checkpoint, if it is open.
        dtype: of the weights that are not packed: float32, bfloat16, float16 or their names; None: the config's.
        compute_dtype: of activations and products: `dtype`, or float32; None or "auto": the fast one of this machine.
            Where it is wider than `dtype`, matrices stay in memory as they are stored and are widened where they are
            used. int8: layers multiply integers, all else is float32 (ADR 0022).
        device: where each weight is put as soon as it is read.
        config: replaces the checkpoint's own.
        progress: called with bytes on disk.

    Raises:
        MissingWeights, UnexpectedWeights, ShapeMismatch, DamagedFile, CheckpointError: what is wrong with the files.
        ConfigError: as `load_config`. RequestError: unknown types or device, or a device without room.
    """
    checkpoint = opened_at(path)
    if checkpoint.gguf is not None:
        file = checkpoint.gguf if config is None else replace(checkpoint.gguf, config=config)
        return load_gguf_network(file, dtype=dtype, compute_dtype=compute_dtype, device=device, progress=progress)
    config = load_config(checkpoint) if config is None else config
    target_device = choose_device(device)
    types = choose_types(dtype, compute_dtype, config, target_device)
    network = without_memory(lambda: Network(config))
    targets = plan_mapping(network, checkpoint.tensors, checkpoint.quantization)
    matrices, products = packable(network), multiplied(network)
    sizes = (
        target.memory(types.size(matrix=target.ours in matrices, product=target.ours in products)) for target in targets
    )
    with room_for(sum(sizes), target_device):
        _fill(network, targets, types, target_device, progress or (lambda done, total: None))
    return network.eval().requires_grad_(False)


def _fill(network: Network, targets: list[Target], types: Types, device: torch.device, progress: Progress) -> None:
    matrices, products = packable(network), multiplied(network)
    fillings = [_Filling(target=t, remaining=sum(len(recipe.fields) for recipe in t.recipes.values())) for t in targets]
    jobs = [
        (filling, slot, part)
        for filling in fillings
        for slot, recipe in filling.target.recipes.items()
        for part in recipe.fields
    ]
    # Tied tensors come last, when the tensor they are tied to is set; each file is opened once, and once more for ties.
    jobs.sort(key=lambda job: (job[0].target.tie, job[2].stored.file))
    total, done = sum(job[2].stored.bytes for job in jobs), 0
    progress(done, total)
    for (_, file), group in groupby(jobs, key=lambda job: (job[0].target.tie, job[2].stored.file)):
        with open_safetensors(file) as shard:
            for filling, slot, part in group:
                # No variable keeps the tensor, or two of them would be in memory while the next one is read.
                with converting(part.stored.name):
                    _take(filling, slot, part, part.convert(shard.get_tensor(part.stored.name)), types.storage, device)
                filling.remaining -= 1
                if not filling.remaining:
                    ours = filling.target.ours
                    _finish(network, filling, types, matrix=ours in matrices, product=ours in products)
                done += part.stored.bytes
                progress(done, total)


def _take(filling: _Filling, slot: Slot, part: Field, values: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Copy a part's values into the stack of experts, or keep them as a tensor of their own."""
    target, plain = filling.target, filling.target.first.build is None
    if not part.name:
        return
    kind = dtype if plain else values.dtype
    if target.experts is None:
        # copy: memory allocated by torch is always aligned alike, so that sums are the same in every run.
        filling.tensors[part.name] = values.to(device=device, dtype=kind, copy=not target.tie).contiguous()
        return
    expert, half = slot
    rows = values.shape[0]
    if part.name not in filling.tensors:
        shape = (target.experts, target.halves * rows, *values.shape[1:])
        filling.tensors[part.name] = torch.empty(shape, dtype=kind, device=device)
    filling.tensors[part.name][expert, half * rows : (half + 1) * rows].copy_(values)


def _finish(network: Network, filling: _Filling, types: Types, *, matrix: bool, product: bool) -> None:
    """Build the weight from the tensors read, and set it in the network or compare it with its tied twin."""
    build = filling.target.first.build
    loaded = filling.tensors["weight"] if build is None else build(**filling.tensors)
    filling.tensors = {}
    weight = types.held(loaded, matrix=matrix, product=product)
    if filling.target.tie:
        _compare(network, filling.target, weight)
    else:
        put(network, filling.target.ours, weight)


def _compare(network: Network, target: Target, weight: Weight) -> None:
    owner, _, leaf = target.ours.rpartition(".")
    current = getattr(network.get_submodule(owner), leaf)
    if not all(torch.equal(one, other) for one, other in zip(_parts(current), _parts(weight), strict=True)):
        twin = published_name(target.ours, network.config.family)
        raise UnexpectedWeights(
            f"the tensor {target.first.fields[0].stored.name} differs from {twin}, to which it is tied",
            hint="the model has one stack and one embedding: a checkpoint that unties them cannot be run",
        )


def _parts(weight: Weight) -> list[Tensor]:
    if isinstance(weight, Tensor | HalfFloats):
        return [weight if isinstance(weight, Tensor) else weight.values]
    assert isinstance(weight, PackedTensors), "only what was read here is compared"
    # A comparison of bytes: 8-bit floats have none of their own.
    return [tensor.contiguous().view(torch.uint8) for tensor in weight.tensors().values()]
