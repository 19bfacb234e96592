"""4-bit codes to bfloat16 in C++ (`native/unpack.cpp`), for the layouts of packed.py.

Invariant: what it gives is what the tables of packed.py give, to the last bit; where it does not fit, these are used.
Run it:  python -m pytest tests/ops/test_packed.py
"""

from __future__ import annotations

from ctypes import CDLL, c_long, c_void_p
from functools import cache

import torch
from jaxtyping import BFloat16, Float, Float32, Num, UInt8
from torch import Tensor

from blockpress.ops import compiled


def fits(packed: UInt8[Tensor, "*lead rows bytes"], group: int, dtype: torch.dtype) -> bool:
    """Whether `fours` may take it: on a CPU, into bfloat16, in groups of 16 columns or of whole 32."""
    if packed.device.type != "cpu" or dtype != torch.bfloat16 or packed.shape[-1] % 16 or packed.numel() == 0:
        return False
    return (group == 16 or group % 32 == 0) and not torch.compiler.is_compiling() and _library() is not None


def fours(
    packed: UInt8[Tensor, "*lead rows bytes"],
    table: Float32[Tensor, 16],
    group: int,
    scale: Float[Tensor, "*lead rows groups"] | Float32[Tensor, 256] | None = None,
    zero: Num[Tensor, "*lead rows groups"] | None = None,
    picks: UInt8[Tensor, "*lead rows groups"] | None = None,
) -> BFloat16[Tensor, "*lead rows columns"]:
    """(table[code] - zero) * scale of every half byte, the low one first, rounded once from float32.

    Args:
        group: columns that share a scale and a zero point.
        picks: the scales by number; `scale` is then the table of all 256.
    """
    library = _library()
    assert library is not None, "fits() comes first"
    packed = packed.contiguous()
    columns = 2 * packed.shape[-1]
    out = torch.empty(*packed.shape[:-1], columns, dtype=torch.bfloat16)
    scale, zero = (None if x is None else x.float().contiguous() for x in (scale, zero))
    picks = None if picks is None else picks.contiguous()
    pointers = [None if x is None else x.data_ptr() for x in (packed, table, scale, picks, zero, out)]
    library.unpack(*pointers, packed.numel() // packed.shape[-1], columns, group)
    return out


@cache
def _library() -> CDLL | None:
    library = compiled.library("unpack")
    if library is not None:
        library.unpack.argtypes, library.unpack.restype = [c_void_p] * 6 + [c_long] * 3, None
    return library
