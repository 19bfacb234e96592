"""Operations in Triton, for GPUs: each stands beside the plain version of its room and gives the same values.

    routing.py       top-k of the router's scores; tokens sorted by expert, and the tiles of them that products work on
    products.py      the two products of the experts, in bfloat16 and in fp8
    four_bits.py     the same for weights of 4 bits: int4 and e2m1
    experts.py       what `ops.experts.moe_forward` is here: routing, products, the sum over a token's experts
    vocabulary.py    what `ops.vocabulary.sample_from_hidden` is here; head.py the logits and their statistics,
                     probabilities.py the self-conditioning embedding
    attention.py     spans of a flat batch over pages
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
