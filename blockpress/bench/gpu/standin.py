"""A stand-in for jaxtyping on machines that do not have it: an annotated shape is then the plain tensor type.

Why: a bare GPU machine has torch and Triton alone, and the rooms below import the names of array types.

Invariant: where jaxtyping is installed, it is used.
Run it:  python -m pytest tests/ops/kernels
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

NAME = "jaxtyping"


class _Shape:
    """`Float[Tensor, "rows columns"]` is Tensor."""

    def __class_getitem__(cls, item: tuple[type, str]) -> type:
        return item[0]


class _Module(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Shape


def install() -> None:
    """Register the stand-in in `sys.modules`, unless the package is installed."""
    if NAME not in sys.modules and find_spec(NAME) is None:
        sys.modules[NAME] = _Module(NAME)
