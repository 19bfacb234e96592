"""What the operations of this room share: the library, a weight as C++ sees it, and whether tensors may go there.

Invariant: a pointer is valid for as long as the tensor that it was taken from; callers keep that tensor.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL, c_int, c_int64, c_long, c_void_p
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blockpress.hardware import isa
from blockpress.ops import compiled

if TYPE_CHECKING:
    from blockpress.ops.linear import Weight

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ARGUMENTS: dict[str, list[type]] = {
    "linear": [c_void_p, c_long, c_long, c_void_p, c_void_p, c_long, c_int],
    "combine": [c_void_p, c_long, c_long, c_void_p, c_void_p, c_int],
    "mix": [c_void_p, c_long, c_long, c_long, *[c_void_p] * 5, c_int],
    "attend": [c_void_p, *[c_long] * 5, c_void_p, c_long, c_void_p, c_void_p, c_int],
    "before": [*[c_void_p] * 4, c_long, c_long, *[c_void_p] * 3, c_int],
    "after": [*[c_void_p] * 4, c_long, c_void_p, c_int, c_int],
}


class Matrix(ctypes.Structure):
    """A weight as it lies in memory; `native/gemm.h` declares the same."""

    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("rows", "columns", "step", "kind"))]


def stored(weight: Weight) -> Tensor | None:
    """The tensor that holds a weight's values as they are; None for codes, which have to be unpacked first."""
    tensor: Tensor | None = weight if isinstance(weight, Tensor) else getattr(weight, "values", None)
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return None
    return tensor if tensor.dtype in KINDS and tensor.stride(-1) == 1 else None


def matrix(tensor: Tensor) -> Matrix:
    """[rows, columns], or leading axes of a dense tensor flattened into its rows."""
    flat = tensor if tensor.ndim == 2 else tensor.flatten(0, -2)
    return Matrix(flat.data_ptr(), flat.shape[0], flat.shape[1], flat.stride(0), KINDS[flat.dtype])


def supports(x: Tensor) -> bool:
    """Whether activations like x may go to the C++ here: on a CPU, float32 or bfloat16, no gradient.

    Where the processor has matrix tiles for bfloat16 (AMX), torch's products in that type are several times as fast.
    """
    if torch.is_grad_enabled() or type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return False
    if x.dtype not in SUFFIXES or torch.compiler.is_compiling():
        return False
    return library() is not None and not (x.dtype == torch.bfloat16 and _has_tiles())


def for_product(x: Tensor, weight: Weight) -> Tensor | None:
    """The weight as it is stored, if its product with x is quicker in C++ than in torch; else None.

    Torch is a little quicker where both are bfloat16 and the processor multiplies that type.
    """
    if not supports(x) or (x.dtype == torch.bfloat16 and isa() == "avx512_bf16"):
        return None
    return stored(weight)


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Run an operation on torch's number of threads."""
    getattr(library(), f"{name}_{SUFFIXES[dtype]}")(*arguments, torch.get_num_threads())


@cache
def library() -> CDLL | None:
    """The functions; None where they cannot be built."""
    library = compiled.library("forward")
    if library is not None:
        for name, types in _ARGUMENTS.items():
            for suffix in SUFFIXES.values():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = types, None
    return library


@cache
def _has_tiles() -> bool:
    library = compiled.library("experts")
    return library is not None and bool(library.has_tiles())
