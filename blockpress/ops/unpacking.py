"""4-bit codes and e4m3 to bfloat16 and float32 in C++ (`native/unpack.cpp`), for the layouts of packed.py.

Invariant: results equal those of packed.py's tables to the last bit; the tables are used where C++ does not apply.
Run it:  python -m pytest tests/ops/test_unpacking.py
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_long, c_void_p
from functools import cache

import torch
from jaxtyping import Float, Float32, Num, Shaped, UInt8
from torch import Tensor

from blockpress.ops import compiled

KINDS = {torch.bfloat16: 0, torch.float32: 1}
ROUNDED = 2
"""The C++ code for float32 results that were rounded to bfloat16."""


def supports(packed: UInt8[Tensor, "*lead rows bytes"], group: int, dtype: torch.dtype) -> bool:
    """Whether `unpack_4bit` can: on a CPU, into bfloat16 or float32, in groups of 16 or a multiple of 32 columns."""
    if packed.shape[-1] % 16 or (group != 16 and group % 32):
        return False
    return _supported(packed, dtype)


def reads_e4m3(codes: Shaped[Tensor, "*any"], dtype: torch.dtype) -> bool:
    """Whether `unpack_e4m3` can: on a CPU, into bfloat16 or float32."""
    return _supported(codes, dtype)


def _supported(codes: Tensor, dtype: torch.dtype) -> bool:
    if codes.device.type != "cpu" or dtype not in KINDS or codes.numel() == 0:
        return False
    return not torch.compiler.is_compiling() and _library() is not None


def unpack_e4m3(codes: Shaped[Tensor, "*any"], dtype: torch.dtype) -> Float[Tensor, "*any"]:
    """Codes of float8_e4m3fn, or their bytes, as floats; every value is exact."""
    library = _library()
    assert library is not None, "call reads_e4m3() first"
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=dtype)
    library.e4m3(codes.data_ptr(), out.data_ptr(), codes.numel(), KINDS[dtype], torch.get_num_threads())
    return out


def unpack_4bit(
    packed: UInt8[Tensor, "*lead rows bytes"],
    table: Float32[Tensor, 16],
    group: int,
    dtype: torch.dtype,
    scale: Float[Tensor, "*lead rows groups"] | Float32[Tensor, 256] | None = None,
    zero: Num[Tensor, "*lead rows groups"] | None = None,
    picks: UInt8[Tensor, "*lead rows groups"] | None = None,
    rounded: bool = False,
) -> Float[Tensor, "*lead rows columns"]:
    """(table[code] - zero) * scale of every half byte, the low one first, rounded once from float32.

    Args:
        group: columns that share a scale and a zero point.
        dtype: bfloat16 or float32.
        picks: indices of the scales; `scale` is then the table of all 256.
        rounded: round to bfloat16, whatever `dtype` is.
    """
    library = _library()
    assert library is not None, "call supports() first"
    packed = packed.contiguous()
    columns = 2 * packed.shape[-1]
    out = torch.empty(*packed.shape[:-1], columns, dtype=dtype)
    kind = ROUNDED if rounded and dtype == torch.float32 else KINDS[dtype]
    scale, zero = (None if x is None else x.float().contiguous() for x in (scale, zero))
    picks = None if picks is None else picks.contiguous()
    pointers = [None if x is None else x.data_ptr() for x in (packed, table, scale, picks, zero, out)]
    library.unpack(*pointers, packed.numel() // packed.shape[-1], columns, group, kind, torch.get_num_threads())
    return out


@cache
def _library() -> CDLL | None:
    library = compiled.library("unpack")
    if library is not None:
        library.unpack.argtypes, library.unpack.restype = [c_void_p] * 6 + [c_long] * 3 + [c_int] * 2, None
        library.e4m3.argtypes, library.e4m3.restype = [c_void_p] * 2 + [c_long, c_int, c_int], None
    return library
