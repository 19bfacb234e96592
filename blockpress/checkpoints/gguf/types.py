"""The types of GGUF tensors by their codes: plain floats, our block layouts, and those that the package unpacks.

Invariant: a `GgmlType` can always be read; the `gguf` package is imported only here, and only for a type that
`ops.blocks` does not unpack.

Run it:  python -m pytest tests/checkpoints/test_gguf.py -k other_types
Source: `ggml_type` in https://github.com/ggml-org/ggml/blob/master/include/ggml.h
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from blockpress.errors import CheckpointError, DamagedFile
from blockpress.ops.blocks import LAYOUTS, Layout

PLAIN: dict[int, tuple[str, torch.dtype]] = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
OURS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}


@dataclass(frozen=True, kw_only=True)
class GgmlType:
    """How a tensor is stored: blocks of `bytes` bytes with `values` values; floats have one value a block.

    Exactly one of `dtype` and `layout` is None.
    """

    name: str
    values: int
    bytes: int
    dtype: torch.dtype | None = None
    layout: Layout | None = None


def ggml_type(code: int, tensor: str) -> GgmlType:
    """The type with that code; `tensor` is for the error message.

    Raises:
        DamagedFile: no type has that code. CheckpointError: a type that nothing unpacks, or that needs `gguf`.
    """
    if code in PLAIN:
        name, dtype = PLAIN[code]
        return GgmlType(name=name, values=1, bytes=dtype.itemsize, dtype=dtype)
    layout = LAYOUTS[OURS[code]] if code in OURS else _others(code, tensor)
    return GgmlType(name=layout.name, values=layout.values, bytes=layout.bytes, layout=layout)


def _others(code: int, tensor: str) -> Layout:
    gguf = _package(code, tensor)
    try:
        kind = gguf.GGMLQuantizationType(code)
    except ValueError as error:
        raise DamagedFile(
            f"the tensor {tensor} has the type {code}, which no tensor has",
            hint="fetch the file again; if it is whole, a newer `gguf` may know the type",
        ) from error
    values, size = gguf.GGML_QUANT_SIZES[kind]

    def unpack(blocks: UInt8[Tensor, "blocks bytes"]) -> Float32[Tensor, "blocks values"]:
        floats = gguf.quants.dequantize(blocks.cpu().contiguous().numpy(), kind)
        return torch.from_numpy(floats).to(blocks.device)

    layout = Layout(name=kind.name, values=values, bytes=size, unpack=unpack)
    try:
        unpack(torch.zeros(1, size, dtype=torch.uint8))
    # An integer type (I32), or one that only llama.cpp's kernels know.
    except (NotImplementedError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the tensor {tensor} is stored as {kind.name}, which nothing unpacks",
            hint=f"take a file of one of {', '.join([*LAYOUTS, 'F16', 'BF16'])}",
        ) from error
    return layout


def _package(code: int, tensor: str) -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise CheckpointError(
            f"the tensor {tensor} has the type {code}, which blockpress does not unpack itself",
            hint="install the package that does: pip install 'blockpress[gguf]'",
        ) from error
    return gguf
