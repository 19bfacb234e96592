"""The weights that a run begins with, and what becomes of them where they are written."""

from __future__ import annotations

import copy

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


def sharpened(network: Network, factor: float) -> Network:
    """A network whose logits, before their cap, are `factor` times as large: the final norm is scaled.

    Training follows trajectories into states that are open, and cross-entropy leaves the network as unsure as it should
    be there; the sampler stops at a fixed entropy. The factor says how much of that caution is worth its steps.
    """
    if factor == 1:
        return network
    network = copy.deepcopy(network)
    with torch.no_grad():
        network.norm.weight.mul_(factor)
    return network
