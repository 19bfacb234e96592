"""The interface of a weight that is packed into fewer bits, whatever its layout.

Every layout gives the same values in two ways:

    unpack(dtype)     the values, rounded as the layout's specification rounds them: the reference for the tests
    factors(dtype)    (matrix, scale), row r is matrix[r] * scale[r], unrounded: cheap where a row has one scale

The layouts are in `packed.py`, `blocks.py` and `integers.py`, the products in `linear.py` and `cpu/`.

Invariant: no operation here, and no import of another module of `ops`.
Run it:  python -m pytest tests/ops/test_linear.py
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor


@runtime_checkable
class Packed(Protocol):
    """A weight in fewer bits: [out, in], or [experts, out, in].

    All its tensors have the leading axes of the shape, so one index selects from all of them.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked weight."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales included."""
        ...

    def __getitem__(self, index: int | slice | Tensor) -> Packed:
        """An index, a slice or a list (repeats allowed) of the leading axis: experts or rows; views where possible."""
        ...

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """All values as floats of `dtype`, each rounded as the layout's specification says."""
        ...

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Float32[Tensor, " rows"] | None]:
        """The values of a matrix [rows, in], or values that are still to be multiplied by a scale per row.

        In float16 always the values: codes are large, and sums of their products would leave its range.
        """
        ...

    def to(self, device: torch.device) -> Packed: ...


Weight = Tensor | Packed
