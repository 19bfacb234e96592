"""How a kernel is declared: `triton.jit` of the function as it was written.

Why: the tests' shape checker wraps every function of these rooms, and Triton, which reads a function's source and the
names of its module, would then see the wrapper's. With TRITON_INTERPRET=1 a kernel runs on the CPU, line by line.

Invariant: a kernel is the same with the checker and without it.
Run it:  python -m pytest tests/ops/kernels
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU; Triton itself decides when it is first imported."""

if INTERPRETED:
    from blockpress.ops.kernels.interpreter import mend

    mend()


def kernel(function: Callable[..., Any]) -> Any:
    """A Triton kernel, or a function that kernels call; `function` may be wrapped."""
    return triton.jit(inspect.unwrap(function))


def cdiv(count: int, tile: int) -> int:
    """How many tiles hold `count`.

    >>> cdiv(704, 64), cdiv(705, 64)
    (11, 12)
    """
    return -(-count // tile)


def power(count: int) -> int:
    """The least power of two that is not below `count`: a kernel's blocks have such sizes.

    >>> power(1), power(8), power(9)
    (1, 8, 16)
    """
    return 1 << max(0, count - 1).bit_length()
