"""Data parallelism: each process takes its share of a step's micro-batches, and gradients are summed.

Every process draws the same rows from (seed, step), runs micro-batches `rank, rank + world_size, ...`, and takes the
same optimizer step on the same summed gradient. On a CPU two processes of one thread each do about twice the work of
one process of two threads, since the tensors of a small network are too small to split.

Invariant: for a given number of processes a run is reproducible; another number sums in another order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Join the process group where a launcher (torchrun, or `blockpress train --workers`) has set one up."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leave the process group: a process that is still in it must not exit alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; rank 0 writes files and reports."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def anyone(wish: bool) -> bool:
    """Whether `wish` is true in any process. All must call it at the same point, or the others wait for ever."""
    flag = torch.tensor([float(wish)])
    sum_over_processes([flag])
    return bool(flag)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place, in one all-reduce."""
    if world_size() == 1:
        return
    listed = list(tensors)
    flat = torch.cat([x.flatten().float() for x in listed])
    dist.all_reduce(flat)
    for tensor, part in zip(listed, flat.split([x.numel() for x in listed]), strict=True):
        tensor.copy_(part.view_as(tensor))


def merge(tensor: Tensor, owned: Tensor) -> Tensor:
    """`tensor` with each row taken from the process that owns it (`owned`: a mask of rows, disjoint over processes)."""
    if world_size() == 1:
        return tensor
    part = torch.where(owned.view(-1, *(1,) * (tensor.ndim - 1)), tensor, torch.zeros_like(tensor))
    whole = part.to(torch.uint8) if tensor.dtype == torch.bool else part
    dist.all_reduce(whole)
    return whole.to(tensor.dtype)
