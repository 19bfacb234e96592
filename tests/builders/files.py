"""What the tests do to the files of a checkpoint: read all of it, change some of it, and compare."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockpress.checkpoints import load_network
from blockpress.errors import BlockpressError
from blockpress.model import Network

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in the directory, read by the library alone."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the single file with what `change` made of its tensors."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """A tensor's type, shape and bytes."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors agree to the last bit."""
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below the directory and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(path: Path, load: Callable[..., Network] = load_network, **arguments: Any) -> BlockpressError:
    """The error that loading raises: of ours, on one line, and with a hint."""
    with pytest.raises(BlockpressError) as caught:
        load(path, **arguments)
    error = caught.value
    assert error.message, "an error says what is wrong"
    assert error.hint, "an error says what to do"
    assert "\n" not in str(error), "an error is one line"
    return error


def figures(network: Network) -> Tensor:
    """Logits of the causal pass and of a canvas behind it, which use every weight and both scalars of each layer."""
    draw = torch.Generator().manual_seed(7)
    prompt = torch.randint(0, network.config.vocab_size, (1, 11), generator=draw)
    canvas = torch.randint(0, network.config.vocab_size, (1, network.config.canvas_length), generator=draw)
    with torch.no_grad():
        hidden, cache = network.read(prompt, network.empty_cache(1))
        first = network.logits(network.denoise(canvas, cache, None))
        again = network.logits(network.denoise(canvas, cache, network.soft_embedding(first)))
        return torch.cat((network.logits(hidden), first, again), dim=1)


def check_runs_as(network: Network, floats: Network, figures: Callable[[Network], Tensor] = figures) -> None:
    """What a float32 network computes is what `floats`, one of the same weights, computes, but for rounding.

    Products of packed and of plain weights sum in different orders, and a random network makes of that what it will:
    2e-6 to 1e-5 of the logits, as the processor has it. So both are held against `floats` in float64, and what that is
    off its own float32 run says how much rounding comes to.
    """
    exact = figures(copy.deepcopy(floats).double())
    rounding = (figures(floats) - exact).norm()
    assert rounding < 1e-4 * exact.norm(), "else it is no measure of anything"
    assert (figures(network) - exact).norm() <= 4 * rounding
