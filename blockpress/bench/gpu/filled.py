"""The published network with random weights on a device, for `steps` and the checks of whole forwards.

    format    experts               everything else
    bf16      bfloat16              bfloat16
    fp8       e4m3, a scale a row   bfloat16
    int4      groups of 32          bfloat16
    nvfp4     e2m1, groups of 16    bfloat16

Invariant: activations keep their size through the layers: matrices have variance 1 / inputs, norms and scalars are 1.
Run it:  python -m pytest tests/ops/kernels/test_harness.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockpress.bench.gpu.routed import weight
from blockpress.config import ModelConfig
from blockpress.costs import WIDTHS, WeightFormats, Width
from blockpress.model import Network
from blockpress.model.layers import put_packed
from blockpress.ops.weight import Packed

EXPERTS = {"bf16": "bfloat16", "fp8": "e4m3", "int4": "int4 g32", "nvfp4": "nvfp4"}
"""The name in `routed.weight` of each format's experts."""


def formats_named(name: str) -> WeightFormats:
    """The formats that the roofline is computed with."""
    if name == "fp8":
        base = WIDTHS["bf16"]
        return WeightFormats(
            experts=Width(size=1, math="fp8"), dense=base.dense, embedding=base.embedding, rest=base.rest
        )
    return WIDTHS["bf16" if name == "bf16" else "w4a16"]


def filled(config: ModelConfig, form: str, device: torch.device) -> Network:
    """A bfloat16 network whose experts are stored in the format `form`."""
    with torch.device("meta"):
        network = Network(config)
    for number, (name, old) in enumerate([*network.named_parameters(), *network.named_buffers()]):
        path, _, leaf = name.rpartition(".")
        _put(network.get_submodule(path), leaf, _random(name, old, form, device, number))
    return network.eval()


def _random(name: str, old: Tensor, form: str, device: torch.device, seed: int) -> Tensor | Packed:
    if old.ndim < 2:
        return torch.ones(old.shape, dtype=torch.bfloat16, device=device)
    if old.ndim == 3:
        experts, rows, columns = old.shape
        return weight(EXPERTS[form], (experts, rows, columns), device, seed)
    drawn = weight("bfloat16", (1, *old.shape), device, seed)
    assert isinstance(drawn, Tensor), name
    return drawn[0]


def _put(module: nn.Module, leaf: str, value: Tensor | Packed) -> None:
    if not isinstance(value, Tensor):
        put_packed(module, leaf, value)
    elif leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    else:
        setattr(module, leaf, value)
