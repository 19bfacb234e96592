"""What loading has in common for every kind of file: dtypes, device, an empty network, and setting its weights.

Why: a network is built without memory (on torch's meta device) and gets its weights one by one, so that none is in
memory twice. `safetensors/load.py` and `gguf/load.py` read them.

Weights have two types: the one they are stored in while in memory, and the one products are computed in (`Types`). With
int8, the layers' matrices are stored as integers and multiplied as integers.

Invariant: a dtype, a device or a lack of memory that ends a load is the caller's `RequestError`; impossible sizes are a
`ConfigError`; an error of our own is passed on unchanged.

Run it:  python -m pytest tests/checkpoints/test_load.py tests/checkpoints/test_gguf.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from blockpress import hardware
from blockpress.config import ModelConfig
from blockpress.config.checks import value_text
from blockpress.config.model import DTYPES as NAMES
from blockpress.errors import ConfigError, DamagedFile, RequestError
from blockpress.model.layers import Experts, Weighted, put_packed
from blockpress.ops.integers import MOST_COLUMNS, quantized
from blockpress.ops.packed import HalfFloats
from blockpress.ops.weight import Weight

Made = TypeVar("Made", bound=nn.Module)

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read): once before the first tensor and after every one."""

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES}
"""The types a network runs in, by the names that `config.json` and callers use."""

COMPUTE_DTYPES: dict[str, torch.dtype] = {**DTYPES, "int8": torch.int8}
"""The types that products are computed in, by name: those and int8."""


def choose_dtype(dtype: torch.dtype | str | None, config: ModelConfig) -> torch.dtype:
    """The requested dtype, or the config's where `dtype` is None.

    Raises:
        RequestError: not a dtype that a network runs in.
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


@dataclass(frozen=True, kw_only=True)
class Types:
    """The type that weights are stored in while in memory, and the type that products are computed in: the same or a
    wider one. `integers`: the layers' matrices are int8 codes in memory and are multiplied as integers."""

    storage: torch.dtype
    compute: torch.dtype
    integers: bool = False

    def size(self, *, matrix: bool, product: bool = False) -> int:
        """Bytes of a value in memory."""
        if product and self.integers:
            return 1
        return (self.storage if matrix else self.compute).itemsize

    def held(self, weight: Weight, *, matrix: bool, product: bool = False) -> Weight:
        """A weight of the storage type, or a packed one, as the network keeps it in memory.

        A matrix stays as it is or, where it is a `product` and those use integers, is quantised to int8; anything else
        is widened to the compute type.
        """
        if product and self.integers:
            return quantized(weight)
        if not isinstance(weight, Tensor) or self.storage == self.compute:
            return weight
        return HalfFloats(values=weight) if matrix else weight.to(self.compute)


def choose_types(
    dtype: torch.dtype | str | None,
    compute_dtype: torch.dtype | str | None,
    config: ModelConfig,
    device: torch.device,
) -> Types:
    """The requested types; None: the config's dtype, and the compute type that is fast on that device (as "auto").

    Raises:
        RequestError: unknown types, a compute type that cannot represent the storage type, or int8 where integer
            products are not available.
    """
    storage = choose_dtype(dtype, config)
    compute = COMPUTE_DTYPES.get(compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
    if compute_dtype is None or compute_dtype == "auto":
        fast = hardware.compute_dtype(storage, device)
        compute = fast if fast in (torch.float32, torch.int8) else storage
    stored, requested = (str(kind).removeprefix("torch.") for kind in (storage, compute))
    if compute is None or requested not in COMPUTE_DTYPES:
        raise RequestError(
            f"compute_dtype is {compute_dtype!r}",
            hint=f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, or auto for the fast one of this machine",
        )
    if compute == torch.int8:
        _check_integers(config, device)
        return Types(storage=storage, compute=torch.float32, integers=True)
    if compute not in (storage, torch.float32):
        raise RequestError(
            f"compute_dtype is {requested}, which does not hold the weights in {stored}",
            hint=f"give dtype {requested} instead to round the weights, or leave compute_dtype to auto",
        )
    return Types(storage=storage, compute=compute)


def _check_integers(config: ModelConfig, device: torch.device) -> None:
    """Raises RequestError: that device has no integer products, or their sums would overflow 32 bits."""
    if device.type != "cpu":
        raise RequestError(
            f"compute_dtype is int8, and device is {str(device)!r}",
            hint="products of integers are made on processors: leave compute_dtype to auto, or give device 'cpu'",
        )
    widest = max(config.num_heads * layer.head_dim for layer in config.layers)
    depths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    depths |= {"expert_size": config.expert_size if config.num_experts else 0, "num_heads * head_dim": widest}
    for name, depth in depths.items():
        if depth > MOST_COLUMNS:
            raise RequestError(
                f"compute_dtype is int8, and the model's {name} is {depth}",
                hint=f"sums of more than {MOST_COLUMNS} products of integers leave 32 bits: give compute_dtype float32",
            )


def choose_device(device: torch.device | str) -> torch.device:
    """The requested device.

    Raises:
        RequestError: torch does not know it, or cannot use it on this machine.
    """
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    # torch raises AssertionError for a device that it was not built for, the others for what names none.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        given = str(device) if isinstance(device, torch.device) else device
        raise RequestError(
            f"device {value_text(given)} cannot be used: {reason}",
            hint="give 'cpu', or a device of this machine",
        ) from error
    return chosen


def without_memory(make: Callable[[], Made]) -> Made:
    """What `make` returns, a network or a vision tower, with weights that have shapes but no memory.

    Raises:
        ConfigError: no tensor can have these sizes.
    """
    try:
        with torch.device("meta"):
            return make()
    except RuntimeError as error:
        raise ConfigError(
            f"no network has the sizes of this config: {error}", hint="fetch the checkpoint again"
        ) from error


@contextmanager
def room_for(size: int, device: torch.device) -> Iterator[None]:
    """Report that the device has no room for weights of `size` bytes when memory runs out inside the block.

    Raises:
        RequestError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # When a CPU runs out of memory, only the text of torch's error tells.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise RequestError(
            f"device {str(device)!r} has no room for the weights, which take {size / 2**30:.1f} GiB",
            hint="give a device with more memory, a dtype of fewer bytes, or a checkpoint in fewer bits",
        ) from error


@contextmanager
def converting(name: str) -> Iterator[None]:
    """For values that no check foresaw: what torch says of them is said of the tensor. Memory that runs out passes.

    Raises:
        DamagedFile: torch cannot convert them.
    """
    try:
        yield
    except (RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise DamagedFile(
            f"the tensor {name} cannot be read: {reason}", hint="fetch the checkpoint again, or convert it again"
        ) from error


def packable(network: nn.Module) -> set[str]:
    """Names of the weights of a network or a vision tower that may stay packed in memory."""
    names = set()
    for name, module in network.named_modules():
        if isinstance(module, Weighted):
            names.add(f"{name}.weight")
        elif isinstance(module, Experts):
            names |= {f"{name}.gate_up_proj", f"{name}.down_proj"}
    return names


def multiplied(network: nn.Module) -> set[str]:
    """Those of them that are multiplied as integers with int8 products: the matrices of layers and self-conditioning.
    The embedding, which is also the head, and the router stay floats."""
    excluded = ("embed_tokens.weight", "router.proj.weight")
    return {name for name in packable(network) if not name.endswith(excluded)}


def hold(network: nn.Module, types: Types) -> None:
    """Convert all weights, which are of the storage type, to what `types` keeps in memory."""
    if types.storage != types.compute or types.integers:
        matrices, products = packable(network), multiplied(network)
        for name, weight in network.state_dict().items():
            put(network, name, types.held(weight, matrix=name in matrices, product=name in products))


def put(network: nn.Module, name: str, weight: Weight) -> None:
    """Replace the tensor of that name by a weight, packed or not."""
    owner, _, leaf = name.rpartition(".")
    module = network.get_submodule(owner)
    if not isinstance(weight, Tensor):
        put_packed(module, leaf, weight)
        return
    is_parameter = leaf in module._parameters
    setattr(module, leaf, nn.Parameter(weight, requires_grad=False) if is_parameter else weight)
