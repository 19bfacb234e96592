"""Products with one weight in C++, read as it is stored: what `ops.linear` does in torch.

Run it:  python -m pytest tests/ops/test_cpu.py
"""

from __future__ import annotations

from ctypes import byref

import torch
from jaxtyping import Float
from torch import Tensor

from blockpress.ops.cpu import bridge
from blockpress.ops.cpu.bridge import Matrix


def linear(
    x: Float[Tensor, "*rows in"], weight: Matrix, out: Float[Tensor, "*rows out"] | None = None
) -> Float[Tensor, "*rows out"]:
    """x @ weight^T in x's type, summed in float32; `out`: where to write it, with any stride between rows."""
    assert x.shape[-1] == weight.columns, "C++ would read beyond the rows"
    if x.dtype == torch.float16:
        wide = linear(x.float(), weight)
        return wide.half() if out is None else out.copy_(wide)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    result = x.new_empty(*x.shape[:-1], weight.rows) if out is None else out
    rows = result.view(-1, weight.rows) if result.is_contiguous() else result
    assert rows.ndim == 2 and rows.stride(1) == 1 and rows.dtype == x.dtype, "rows of one stride"
    assert rows.shape == (len(flat), weight.rows), "a row for each of x"
    arguments = (flat.data_ptr(), len(flat), flat.stride(0), byref(weight))
    bridge.call("linear", x.dtype, *arguments, rows.data_ptr(), rows.stride(0))
    return result


def combine(share: Float[Tensor, "*rows vocab"], weight: Matrix) -> Float[Tensor, "*rows hidden"]:
    """share @ weight in share's type, summed in float32."""
    assert share.shape[-1] == weight.rows, "C++ would read beyond the rows"
    flat = bridge.widened(share).reshape(-1, share.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = torch.zeros(len(flat), weight.columns, dtype=torch.float32)
    arguments = (flat.data_ptr(), len(flat), flat.stride(0), byref(weight))
    bridge.call("combine", flat.dtype, *arguments, out.data_ptr())
    return out.to(share.dtype).view(*share.shape[:-1], weight.columns)
