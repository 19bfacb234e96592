"""What every operation with a weight may ask of one that is packed into fewer bits, whatever its layout.

Every layout offers two readings of the same values:

    unpack(dtype)     the values, rounded as the layout's specification rounds them: the truth that tests compare
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

    Every tensor of it has the leading axes of the shape, so that one index selects from all of them alike.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked weight."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, scales included."""
        ...

    def __getitem__(self, index: int | slice | Tensor) -> Packed:
        """An expert, a slice of rows or a list of rows (repeats allowed) of the leading axis; views where that goes."""
        ...

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """All values as floats of `dtype`, each rounded as the specification of the layout has it."""
        ...

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Float32[Tensor, " rows"] | None]:
        """Of a matrix [rows, in]: the values, or values that a scale for each row has still to multiply.

        Codes are large numbers: in float16, whose range sums of their products leave, it is always the values.
        """
        ...

    def to(self, device: torch.device) -> Packed: ...


Weight = Tensor | Packed
