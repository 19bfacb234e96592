"""What loading has in common, whatever kind of file the weights come from: type, device, an empty network, its filling.

Why: a network is built without memory (on torch's meta device) and gets its weights one by one, so that none is in
memory twice. How one is read is for `load.py` (safetensors) and `gguf/load.py` to say.

Weights have two types: that in which they lie in memory, and that in which products are made (`Types`); or the products
of layers are made in integers, and their matrices lie in memory as those.

Invariant: a type, a device or a lack of room that ends a load is the caller's `RequestError`; sizes that no network can
have are a `ConfigError`; an error of our own passes as it is.

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
from blockpress.config.model import DTYPES as NAMES
from blockpress.errors import ConfigError, RequestError
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
"""The types that products are made in, by name: int8 beside those."""


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


@dataclass(frozen=True, kw_only=True)
class Types:
    """The type that weights are stored in while they are in memory, and the one that is computed in: it, or a wider
    one. `integers`: the layers' matrices are int8 codes in memory, and their products are made of those."""

    storage: torch.dtype
    compute: torch.dtype
    integers: bool = False

    def size(self, *, matrix: bool, product: bool = False) -> int:
        """Bytes of a value in memory."""
        if product and self.integers:
            return 1
        return (self.storage if matrix else self.compute).itemsize

    def held(self, weight: Weight, *, matrix: bool, product: bool = False) -> Weight:
        """A weight of the stored type, or a packed one, as the network holds it.

        A matrix as it is or, where it is a `product` and those are made in integers, rounded to them; what is small in
        the wider type.
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
    """The types that a caller asked for; None: the config's, and what is fast on that device (as "auto" is).

    Raises:
        RequestError: no such types, one to compute in that does not hold what is stored, or integers where they are not
            multiplied.
    """
    storage = choose_dtype(dtype, config)
    compute = COMPUTE_DTYPES.get(compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
    if compute_dtype is None or compute_dtype == "auto":
        fast = hardware.compute_dtype(storage, device)
        compute = fast if fast in (torch.float32, torch.int8) else storage
    stored, asked = (str(kind).removeprefix("torch.") for kind in (storage, compute))
    if compute is None or asked not in COMPUTE_DTYPES:
        raise RequestError(
            f"compute_dtype is {compute_dtype!r}",
            hint=f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, or auto for the fast one of this machine",
        )
    if compute == torch.int8:
        _check_integers(config, device)
        return Types(storage=storage, compute=torch.float32, integers=True)
    if compute not in (storage, torch.float32):
        raise RequestError(
            f"compute_dtype is {asked}, which does not hold the weights in {stored}",
            hint=f"give dtype {asked} instead to round the weights, or leave compute_dtype to auto",
        )
    return Types(storage=storage, compute=compute)


def _check_integers(config: ModelConfig, device: torch.device) -> None:
    """Raises RequestError: products of integers are not made there, or their sums would leave 32 bits."""
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


def compute_name(dtype: str, device: str) -> str:
    """The name of the type in which weights stored in `dtype` are computed on that device, unless told otherwise."""
    return str(hardware.compute_dtype(DTYPES[dtype], torch.device(device))).removeprefix("torch.")


def choose_device(device: torch.device | str) -> torch.device:
    """The device that a caller asked for.

    Raises:
        RequestError: torch knows none of that name, or cannot use it on this machine.
    """
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


def without_memory(make: Callable[[], Made]) -> Made:
    """What `make` gives, a network or a tower, with weights that have shapes and no memory.

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
    """Say so where the device has no room for weights of `size` bytes.

    Raises:
        RequestError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Of a CPU that is out of memory torch says so in the text alone.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise RequestError(
            f"device {str(device)!r} has no room for the weights, which take {size / 2**30:.1f} GiB",
            hint="give a device with more memory, a dtype of fewer bytes, or a checkpoint in fewer bits",
        ) from error


def packable(network: nn.Module) -> set[str]:
    """Weights of a network or a tower that may lie packed in memory."""
    names = set()
    for name, module in network.named_modules():
        if isinstance(module, Weighted):
            names.add(f"{name}.weight")
        elif isinstance(module, Experts):
            names |= {f"{name}.gate_up_proj", f"{name}.down_proj"}
    return names


def multiplied(network: nn.Module) -> set[str]:
    """Those of them that are multiplied as integers where products are made of those: a layer's and self-conditioning's
    matrices. The embedding, which is the head, and the router stay floats."""
    apart = ("embed_tokens.weight", "router.proj.weight")
    return {name for name in packable(network) if not name.endswith(apart)}


def hold(network: nn.Module, types: Types) -> None:
    """Let all weights, which are of the stored type, lie as `types` has it."""
    if types.storage != types.compute or types.integers:
        own, products = packable(network), multiplied(network)
        for name, weight in network.state_dict().items():
            put(network, name, types.held(weight, matrix=name in own, product=name in products))


def put(network: nn.Module, name: str, weight: Weight) -> None:
    """Let a weight, packed or not, take the place of the tensor of that name."""
    owner, _, leaf = name.rpartition(".")
    module = network.get_submodule(owner)
    if not isinstance(weight, Tensor):
        put_packed(module, leaf, weight)
        return
    is_parameter = leaf in module._parameters
    setattr(module, leaf, nn.Parameter(weight, requires_grad=False) if is_parameter else weight)
