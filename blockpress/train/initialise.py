"""Random initial weights from a seed."""

from __future__ import annotations

import torch

from blockpress.model import Network


def initialise(network: Network, seed: int) -> None:
    """Normal with a variance of 1 / inputs; norms and scales at 1. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0)
