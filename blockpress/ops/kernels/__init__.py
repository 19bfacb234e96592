"""Operations in Triton, for GPUs: each gives the values of its plain version in `ops`.

    routing.py       top-k of the router's scores; tokens sorted by expert and cut into tiles for the products
    products.py      the two products of the experts, in bfloat16 and in fp8
    four_bits.py     the same for 4-bit weights: int4 and e2m1
    experts.py       `ops.experts.moe_forward`: routing, products, the sum over a token's experts
    vocabulary.py    `ops.vocabulary.sample_from_hidden`; head.py computes the logits and their statistics,
                     probabilities.py the self-conditioning embedding
    attention.py     attention of a flat batch over paged keys and values
    jit.py           how a kernel is declared; interpreter.py    how it runs where there is no GPU

Invariant: importing this package imports no Triton, and nothing outside it needs Triton.

Run it:  make check-gpu      on a machine without a GPU: TRITON_INTERPRET=1 python -m blockpress.bench.gpu check
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
