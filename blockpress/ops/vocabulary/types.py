"""Arguments and results of a step's pass over the vocabulary, on a processor and on a GPU alike.

They are a module of their own so that both versions, `step.py` and `ops/kernels/vocabulary.py`, can import them.

Invariant: no operation here, and no import of another module of `ops`.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

SignalKind = Literal["exact", "sparse"] | None
"""How the next self-conditioning embedding is computed: from all tokens, from the likeliest alone, or not at all."""

BannedTokens = tuple[Int[Tensor, " ids"], Bool[Tensor, "n ids"]]
"""Ids, and for each position which of them are banned."""


@dataclass(frozen=True)
class SampleStats:
    """A step's results for n positions: entropies in nats, and in `signal` the self-conditioning embedding in the
    hidden states' dtype, or None."""

    argmax: Int[Tensor, " n"]
    sample: Int[Tensor, " n"]
    entropy: Float32[Tensor, " n"]
    signal: Float[Tensor, "n hidden"] | None
