"""What the operations of this room share: the library, a weight as C++ sees it, and which tensors C++ takes.

Invariant: a pointer is valid only while its tensor lives; callers keep the tensor alive.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import CDLL, c_int, c_int64, c_long, c_void_p
from functools import cache

import torch
from torch import Tensor, nn

from blockpress.hardware import isa
from blockpress.ops import compiled
from blockpress.ops.integers import IntegerWeight
from blockpress.ops.packed import Codes, Float4, HalfFloats, Nibbles, scale_table
from blockpress.ops.weight import Weight

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""The activations that C++ reads as they are; float16 is widened to float32 for the call, and its result rounded."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_E4M3, _INT8, _NIBBLES, _E2M1 = 3, 4, 5, 6
INT8_ROWS = 7

_ARGUMENTS: dict[str, list[type]] = {
    "linear": [c_void_p, c_long, c_long, c_void_p, c_void_p, c_long, c_int],
    "combine": [c_void_p, c_long, c_long, c_void_p, c_void_p, c_int],
    "mix": [c_void_p, c_long, c_long, c_long, *[c_void_p] * 5, c_int],
    "attend": [c_void_p, *[c_long] * 5, c_void_p, c_long, c_void_p, c_void_p, c_int],
    "before": [*[c_void_p] * 4, c_long, c_long, *[c_void_p] * 3, c_int],
    "after": [*[c_void_p] * 4, c_long, c_void_p, c_int, c_int],
}


class Matrix(ctypes.Structure):
    """A weight in memory; mirrors `native/weight.h`."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("rows", "columns", "step", "kind")),
        *((name, c_void_p) for name in ("scale", "zero", "outer", "table")),
        *((name, c_int64) for name in ("group", "halves", "divides")),
    ]


def matrix(weight: Weight) -> Matrix | None:
    """[rows, columns], or leading axes flattened into rows; None for what C++ cannot read in place.

    That is GGUF's blocks, float16 scales, and tensors other than plain CPU ones.
    """
    if isinstance(weight, Tensor):
        return _floats(weight)
    if isinstance(weight, HalfFloats):
        return _floats(weight.values)
    if isinstance(weight, IntegerWeight):
        return _integers(weight)
    if not isinstance(weight, Codes | Nibbles | Float4):
        return None
    if not all(_plain(tensor) and tensor.is_contiguous() for tensor in weight.tensors().values()):
        return None
    result = _float4(weight) if isinstance(weight, Float4) else _scaled(weight)
    if result is not None:
        result.columns = result.step = weight.shape[-1]
        result.rows, result.group = math.prod(weight.shape[:-1]), weight.group
    return result


def _floats(tensor: Tensor) -> Matrix | None:
    if not _plain(tensor) or tensor.dtype not in KINDS or tensor.stride(-1) != 1:
        return None
    if tensor.ndim != 2 and not tensor.is_contiguous():
        return None
    flat = tensor if tensor.ndim == 2 else tensor.flatten(0, -2)
    return Matrix(flat.data_ptr(), flat.shape[0], flat.shape[1], flat.stride(0), KINDS[flat.dtype])


def _integers(weight: IntegerWeight) -> Matrix | None:
    codes, scale = weight.codes, weight.scale
    if not (_plain(codes) and codes.is_contiguous() and _plain(scale) and scale.is_contiguous()):
        return None
    result = Matrix(data=codes.data_ptr(), kind=INT8_ROWS, scale=scale.data_ptr())
    result.columns = result.step = result.group = weight.shape[-1]
    result.rows = math.prod(weight.shape[:-1])
    return result


def _scaled(weight: Codes | Nibbles) -> Matrix | None:
    scale, codes = weight.scale, weight.codes if isinstance(weight, Codes) else weight.packed
    if scale.dtype not in SUFFIXES:
        return None
    kind = _NIBBLES if isinstance(weight, Nibbles) else _INT8 if codes.dtype == torch.int8 else _E4M3
    halves = 0 if scale.dtype == torch.float32 else 1 if scale.shape[-1] > 1 else 2
    result = Matrix(data=codes.data_ptr(), kind=kind, scale=scale.data_ptr(), halves=halves)
    result.zero = None if weight.zero_point is None else weight.zero_point.data_ptr()
    return result


def _float4(weight: Float4) -> Matrix:
    result = Matrix(data=weight.packed.data_ptr(), kind=_E2M1, scale=weight.scale.data_ptr(), divides=weight.divides)
    result.outer = None if weight.global_scale is None else weight.global_scale.data_ptr()
    result.table = scale_table(weight.kind, weight.device).data_ptr()  # kept alive by the function's cache
    return result


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def supports(x: Tensor) -> bool:
    """Whether C++ should take activations like x: on a CPU, floats of 16 or 32 bits, no gradients, no autocast.

    Next to a "portable" build of ours all of torch's products are several times as fast.
    """
    return _reads(x) and _worth()


def _reads(x: Tensor) -> bool:
    """Whether C++ can take x, faster or not."""
    if torch.is_grad_enabled() or type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return False
    return x.dtype in KINDS and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


def for_product(x: Tensor, weight: Weight) -> Matrix | None:
    """The weight as C++ reads it, if C++ is to multiply it with x; integers are faster there at every level."""
    if isinstance(weight, IntegerWeight):
        return matrix(weight) if _reads(x) and library() is not None else None
    return matrix(weight) if supports(x) else None


def takes_tiles(weight: Matrix) -> bool:
    """Whether activations in bfloat16 are multiplied with the weight on matrix tiles (Intel's AMX)."""
    return has_tiles() and weight.kind not in (KINDS[torch.float32], KINDS[torch.float16], INT8_ROWS)


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Run an operation with torch's number of threads."""
    getattr(library(), f"{name}_{SUFFIXES[dtype]}")(*arguments, torch.get_num_threads())


def widened(x: Tensor) -> Tensor:
    """x in a type that C++ reads: float16 becomes float32."""
    return x.float() if x.dtype == torch.float16 else x


def held_bytes() -> int:
    """Bytes that C++ keeps for the calling thread between calls, outside torch's allocator."""
    loaded = library()
    return 0 if loaded is None else int(loaded.held_bytes())


def give_back() -> None:
    """Free what C++ keeps for the calling thread."""
    loaded = library()
    if loaded is not None:
        loaded.give_back()


@cache
def library() -> CDLL | None:
    """The functions; None where they cannot be built."""
    library = compiled.library("forward")
    if library is not None:
        for name, types in _ARGUMENTS.items():
            for suffix in SUFFIXES.values():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = types, None
        library.held_bytes.restype, library.give_back.restype = c_long, None
    return library


@cache
def _worth() -> bool:
    return library() is not None and isa() != "portable"


@cache
def has_tiles() -> bool:
    """Whether C++ multiplies bfloat16 on matrix tiles: the processor has them, and the system lets us use them."""
    loaded = library()
    return loaded is not None and bool(loaded.uses_tiles())
