"""A checkpoint becomes a network, tensor by tensor.

The network is built without memory (on torch's meta device) and every weight is read, cast, moved and put into its
place before the next one is touched: peak memory is the weights and one tensor. Names, shapes and types are compared
first, on the files' headers, so that a checkpoint that does not fit fails in milliseconds.

Invariant: every tensor of the network comes from the checkpoint, and every tensor of the checkpoint is in the network,
equal to one that is, or known by name to be outside it (vision, derived tables).

Run it:  python -c "from blockpress.weights import load_network; print(load_network('runs/sudoku/model').dtype)"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from blockpress.config import GenerationConfig, ModelConfig
from blockpress.errors import (
    CheckpointError,
    ConfigError,
    MissingWeights,
    RequestError,
    ShapeMismatch,
    UnexpectedWeights,
)
from blockpress.model import Network
from blockpress.weights.find import CONFIG, GENERATION, checkpoint_directory, read_object
from blockpress.weights.keys import is_derived, is_quantised, is_vision, our_name, published_name
from blockpress.weights.shards import FLOATS, Stored, catalogue, opened

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read): once before the first tensor and after every one."""

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types a network runs in, by the names that `config.json` and callers use."""

# Floats of 4, 6 and 8 bits, such as F8_E4M3: weights only together with their scales.
_NARROW = re.compile(r"F[468](_|$)")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One read: the tensor `stored` goes to `ours`, or, where `tie`, must equal what is there already."""

    ours: str
    stored: Stored
    tie: bool = False


def load_config(path: str | Path) -> ModelConfig:
    """Read a checkpoint's `config.json`.

    Raises:
        ModelNotFound, CheckpointError: no checkpoint there, or a quantised one.
        DamagedFile: the file is not JSON. ConfigError: it is not a config that this package runs.
    """
    file = checkpoint_directory(path) / CONFIG
    data = read_object(file)
    quantised = data.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise _quantised(f"{str(file)!r} says quantization_config, method {method!r}")
    try:
        return ModelConfig.from_dict(data)
    # A value of a type that nobody foresaw is the file's fault all the same.
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{str(file)!r} is not understood: {error}", hint="fetch the file again") from error


def load_generation(path: str | Path, config: ModelConfig) -> GenerationConfig:
    """Read a checkpoint's `generation_config.json`; without one, the defaults and `config`'s stop ids.

    Raises:
        ModelNotFound, CheckpointError, DamagedFile: as `load_config`. ConfigError: a value that cannot be meant.
    """
    file = checkpoint_directory(path) / GENERATION
    data = read_object(file) if file.is_file() else {}
    try:
        return GenerationConfig.from_dict(data, config)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{str(file)!r} is not understood: {error}", hint="fetch the file again") from error


def load_network(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Network:
    """Read a checkpoint's weights into a network, in eval mode and without gradients.

    Args:
        path: the checkpoint's directory.
        dtype: of the weights in memory: float32, bfloat16, float16 or their names; None: what the config says.
        device: where the weights go, each as soon as it is read.
        config: instead of what the directory's config.json says.
        progress: called with bytes on disk.

    Raises:
        MissingWeights, UnexpectedWeights, ShapeMismatch, DamagedFile, CheckpointError: what the files are short of.
        ConfigError: as `load_config`. RequestError: a dtype or device that there is not, or a device without room.
    """
    directory = checkpoint_directory(path)
    config = load_config(directory) if config is None else config
    target, place = choose_dtype(dtype, config), _choose_device(device)
    network = _without_memory(config)
    jobs = _plan(network, catalogue(directory))
    try:
        _fill(network, jobs, target, place, progress or (lambda done, total: None))
    except (RuntimeError, MemoryError) as error:
        # Of a CPU that is out of memory torch says so in the text alone.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        size = sum(tensor.numel() for tensor in network.state_dict().values()) * target.itemsize
        raise RequestError(
            f"device {str(place)!r} has no room for the weights: {size / 2**30:.1f} GiB in {target}",
            hint="give a dtype of fewer bytes, or a device with more memory",
        ) from error
    return network.eval().requires_grad_(False)


def choose_dtype(dtype: torch.dtype | str | None, config: ModelConfig) -> torch.dtype:
    """The type that a caller asked for, or the config's where `dtype` is None.

    Raises:
        RequestError: not a type that a network runs in.
    """
    known = ", ".join(DTYPES)
    if dtype is None:
        return DTYPES[config.dtype]
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise RequestError(
            f"dtype is {dtype!r}", hint=f"dtype must be one of {known}, or None for the checkpoint's own"
        )
    return chosen


def _choose_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    # torch answers a device that it was not built for with an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(
            f"device {str(device)!r} cannot be used: {reason}", hint="give 'cpu', or a device of this machine"
        ) from error
    return place


def _without_memory(config: ModelConfig) -> Network:
    try:
        with torch.device("meta"):
            return Network(config)
    except RuntimeError as error:
        raise ConfigError(
            f"no network has the sizes of this config: {error}", hint="fetch config.json again"
        ) from error


def _plan(network: Network, tensors: dict[str, Stored]) -> list[_Job]:
    """Where every tensor goes: first those that fill the network, then the ties, which are compared.

    A checkpoint without the causal pass's own scalars is one where they are the canvas's.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    sources: dict[str, list[Stored]] = {name: [] for name in wanted}
    left = []
    for name, stored in tensors.items():
        if is_vision(name) or is_derived(name):
            continue
        if is_quantised(name) or _NARROW.match(stored.dtype):
            raise _quantised(f"the tensor {name} is stored as {stored.dtype}")
        ours = our_name(name)
        if ours is None or ours not in sources:
            left.append(name)
        else:
            _check(stored, wanted[ours])
            sources[ours].insert(0 if name == published_name(ours) else len(sources[ours]), stored)
    for name in sources:
        if not sources[name] and name.endswith("causal_scalar"):
            sources[name] = sources[name.replace("causal_scalar", "layer_scalar")][:1]
    missing = [published_name(name) for name, found in sources.items() if not found]
    if missing:
        raise MissingWeights(_listed("the checkpoint lacks", missing), hint=_other_save("config.json asks for more"))
    if left:
        raise UnexpectedWeights(
            _listed("nothing in the model takes", left), hint=_other_save("config.json asks for less")
        )
    first = [_Job(ours=name, stored=found[0]) for name, found in sources.items()]
    ties = [_Job(ours=name, stored=stored, tie=True) for name, found in sources.items() for stored in found[1:]]
    return first + ties


def _check(stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.dtype not in FLOATS:
        raise ShapeMismatch(
            f"the tensor {stored.name} is stored as {stored.dtype}", hint=f"weights are stored as {', '.join(FLOATS)}"
        )
    if stored.shape != shape:
        raise ShapeMismatch(
            f"the tensor {stored.name} has the shape {list(stored.shape)}, the config asks for {list(shape)}",
            hint=_other_save("the sizes differ"),
        )


def _fill(network: Network, jobs: list[_Job], dtype: torch.dtype, device: torch.device, progress: Progress) -> None:
    total, done = sum(job.stored.bytes for job in jobs), 0
    progress(done, total)
    for file, group in _by_file(jobs):
        with opened(file) as shard:
            for job in group:
                # copy: memory that torch allocates has one alignment, so that sums come out the same in every run.
                # No name holds the tensor that was read, or two of them would be in memory when the next one is.
                fresh = shard.get_tensor(job.stored.name).to(device=device, dtype=dtype, copy=not job.tie)
                _compare(network, job, fresh) if job.tie else _assign(network, job.ours, fresh)
                del fresh
                done += job.stored.bytes
                progress(done, total)


def _by_file(jobs: list[_Job]) -> Iterable[tuple[Path, Iterable[_Job]]]:
    """Jobs grouped by file, each opened once; ties come last, when what they are tied to is in its place."""
    ordered = sorted(jobs, key=lambda job: (job.tie, job.stored.file))
    return ((key[1], group) for key, group in groupby(ordered, key=lambda job: (job.tie, job.stored.file)))


def _assign(network: Network, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = network.get_submodule(owner)
    is_parameter = leaf in dict(module.named_parameters(recurse=False))
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _compare(network: Network, job: _Job, tensor: Tensor) -> None:
    if not torch.equal(network.state_dict()[job.ours], tensor):
        raise UnexpectedWeights(
            f"the tensor {job.stored.name} differs from {published_name(job.ours)}, to which it is tied",
            hint="the model has one stack and one embedding: a checkpoint that unties them cannot be run",
        )


def _quantised(what: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint is quantised: {what}", hint="quantised formats are not read yet; take the bfloat16 checkpoint"
    )


def _other_save(how: str) -> str:
    return f"{how}: do config and weights come from the same save?"


def _listed(what: str, names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:3])}{rest}"
