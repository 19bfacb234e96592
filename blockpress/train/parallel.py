"""Several processes that train one network: each takes its share of a step's micro-batches, gradients are summed.

Every process draws the same rows from (seed, step), runs the parts `rank, rank + world_size, ...`, and takes the same
optimizer step on the same summed gradient. On a CPU two processes of one thread each do about twice the work of one
process of two threads, since the tensors of a small network are too short to be split.

Invariant: for a given number of processes a run repeats itself; another number sums in another order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Join the other processes where a launcher (torchrun, or `blockpress train --workers`) has set them up."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Part from the other processes; a process that is still joined may not end by itself."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes files and reports."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def anyone(wish: bool) -> bool:
    """Whether any process wishes it. All must ask at the same point, or the others would wait for ever."""
    asked = torch.tensor([float(wish)])
    sum_over_processes([asked])
    return bool(asked)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all processes, in place, in one exchange."""
    if world_size() == 1:
        return
    listed = list(tensors)
    flat = torch.cat([x.flatten().float() for x in listed])
    dist.all_reduce(flat)
    for tensor, part in zip(listed, flat.split([x.numel() for x in listed]), strict=True):
        tensor.copy_(part.view_as(tensor))


def merge(tensor: Tensor, own: Tensor) -> Tensor:
    """`tensor` with each row as the process has it that holds it in its `own` (a mask; no row is of two processes)."""
    if world_size() == 1:
        return tensor
    part = torch.where(own.view(-1, *(1,) * (tensor.ndim - 1)), tensor, torch.zeros_like(tensor))
    whole = part.to(torch.uint8) if tensor.dtype == torch.bool else part
    dist.all_reduce(whole)
    return whole.to(tensor.dtype)
