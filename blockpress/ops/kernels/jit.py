"""How a kernel is declared: `triton.jit` of the unwrapped function.

Why: the tests' shape checker wraps every function of these rooms, and Triton, which reads a function's source and the
names in its module, would then read the wrapper's. With TRITON_INTERPRET=1 a kernel runs on the CPU, line by line.

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
"""Whether kernels run on the CPU; Triton reads the same variable when it is first imported."""

if INTERPRETED:
    from blockpress.ops.kernels.interpreter import mend

    mend()


def kernel(function: Callable[..., Any]) -> Any:
    """A Triton kernel, or a function that kernels call; `function` may be wrapped."""
    return triton.jit(inspect.unwrap(function))


def cdiv(count: int, tile: int) -> int:
    """How many tiles cover `count`.

    >>> cdiv(704, 64), cdiv(705, 64)
    (11, 12)
    """
    return -(-count // tile)


def power(count: int) -> int:
    """The smallest power of two that is at least `count`: a kernel's block sizes are powers of two.

    >>> power(1), power(8), power(9)
    (1, 8, 16)
    """
    return 1 << max(0, count - 1).bit_length()
